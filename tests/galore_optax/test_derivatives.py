"""Derivatives through updates, as of a learning rate or of initial params, have no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import normal

from galore_optax import apply_updates, galore, quantize_nf4, quantize_state, quantize_weights

W = {"w": jnp.ones((64, 128))}
# Columns of the gradient, and with them moments, are zero.
START, TARGET = normal(0, 8, 12).at[:, 3].set(0), normal(1, 8, 12).at[:, 3].set(0)


def loss(weight):
    return jnp.sum((weight - TARGET) ** 2)


def after_training(rate, start, **options):
    """The loss after three updates, each with a refresh."""
    # With eps in the root: Adam itself has no derivative at a second moment of zero.
    tx = galore(3, optax.adam(rate, eps_root=1e-12), update_proj_gap=1, **options)

    def step(carry, _):
        weight, state = carry
        updates, state = tx.update(jax.grad(loss)(weight), state, weight)
        return (optax.apply_updates(weight, updates), state), None

    (weight, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=3)
    return loss(weight)


@pytest.mark.parametrize("options", [{}, {"moments": "reset"}])
def test_gradients_and_jvps_through_refreshes_are_finite_where_moments_are_zero(options):
    def trained(rate, start):
        return after_training(rate, start, **options)

    @jax.jit
    def derivatives(rate):
        by_rate, by_start = jax.grad(trained, (0, 1))(rate, START)
        forward = jax.jvp(lambda rate: trained(rate, START), (rate,), (1.0,))[1]
        return by_rate, by_start, forward

    by_rate, by_start, forward = derivatives(0.1)
    assert np.isfinite(by_start).all()
    np.testing.assert_allclose(by_rate, forward, rtol=1e-3)


def _after_two_steps(rate):
    tx, w = quantize_state(optax.sgd(rate, momentum=0.9), min_size=1), jnp.ones((4, 16))
    state = tx.init(w)
    for _ in range(2):
        updates, state = tx.update(w, state, w)
        w += updates
    return jnp.sum(w)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.sum(quantize_nf4(jnp.full((64, 8), x)).dequantize()),
        lambda x: jnp.sum(apply_updates(quantize_weights(W), {"w": x * W["w"]}, None)["w"].scales),
        _after_two_steps,
    ],
)
@pytest.mark.parametrize("derivative", [jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
def test_a_derivative_through_codes_is_refused(derivative, function):
    jax.jit(function)(0.1)
    with pytest.raises(ValueError, match="a derivative is asked for through the codes"):
        jax.jit(derivative(function))(0.1)


@pytest.mark.parametrize("shape", [(8, 16), (2048, 1024)])  # the second takes several turns
def test_weights_rounded_at_random_have_the_derivative_of_the_sum(shape):
    w = jnp.ones(shape, jnp.bfloat16)

    def loss(updates):
        new = apply_updates(w, updates, jax.random.key(0))
        return jnp.sum(3.0 * new.astype(jnp.float32))

    found = jax.jit(jax.grad(loss))(jnp.full(shape, 1e-3))
    np.testing.assert_array_equal(found, np.full(shape, 3.0))
