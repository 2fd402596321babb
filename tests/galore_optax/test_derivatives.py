"""Derivatives through updates, as of a learning rate or of initial params, have no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import normal

from galore_optax import galore

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
