"""Decay inside galore reaches the whole matrix; other uses of the params are left to the inner."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import GaLoreDimensionNumbers, galore
from galore_optax.trace.decoupled_decay import decay_slopes

WEIGHT = jax.random.normal(jax.random.key(0), (8, 12))
GRAD = jax.random.normal(jax.random.key(1), (8, 12))

DECOUPLED = {
    "adamw": optax.adamw(0.1, weight_decay=0.2),
    "adamw with a schedule": optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.2),
    "lion": optax.lion(0.1, weight_decay=0.2),
    "adan": optax.adan(0.1, weight_decay=0.2),
    "nadamw": optax.nadamw(0.1, weight_decay=0.2),
    "sgd, then decay": optax.chain(optax.sgd(0.1), optax.add_decayed_weights(-0.02)),
    "adamw that skips what is not finite": optax.apply_if_finite(
        optax.adamw(0.1, weight_decay=0.2), 3
    ),
    "adamw with hyperparameters in its state": optax.inject_hyperparams(optax.adamw)(
        0.1, weight_decay=0.2
    ),
}
UNUSED = {
    "adam": optax.adam(0.1),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(0.1),
    "adafactor without scaling": optax.adafactor(0.1, multiply_by_parameter_scale=False),
    "yogi": optax.yogi(0.1),
    "radam": optax.radam(0.1),
    "adagrad": optax.adagrad(0.1),
    "adabelief": optax.adabelief(0.1),
}
OTHER = {
    "lamb": optax.lamb(0.1, weight_decay=0.2),
    "lars": optax.lars(0.1, weight_decay=0.2),
    "adafactor": optax.adafactor(0.1),
    "l2 before adam": optax.chain(optax.add_decayed_weights(0.2), optax.adam(0.1)),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
    "dog": optax.contrib.dog(0.1),
    "cocob": optax.contrib.cocob(0.1),
    "prodigy": optax.contrib.prodigy(0.1),
    "decay by coordinate": optax.chain(
        optax.add_decayed_weights(0.2), optax.scale_by_sign(), optax.scale(-0.1)
    ),
}


def slopes(inner):
    inner = optax.with_extra_args_support(inner)
    return decay_slopes(
        inner.init, inner.update, {"w": GRAD}, inner.init({"w": WEIGHT}), {"w": WEIGHT}
    )


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_decay_is_recognised_with_its_rate(name):
    np.testing.assert_allclose(slopes(DECOUPLED[name])[0], -0.02, rtol=1e-6)


@pytest.mark.parametrize("name", UNUSED)
def test_an_inner_that_does_not_use_params_has_no_decay(name):
    assert slopes(UNUSED[name]) == [None]


@pytest.mark.parametrize("name", OTHER)
def test_other_uses_of_params_are_no_decay(name):
    assert slopes(OTHER[name]) is None


def test_a_slope_that_differs_by_coordinate_is_no_decay():
    def update(updates, state, params):
        return jax.tree.map(lambda u, p: u * p + 0.1 * p, updates, params), state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    assert slopes(inner) is None


@pytest.mark.parametrize("name", DECOUPLED)
def test_decay_reaches_the_whole_matrix_unscaled(name):
    tx = galore(2, DECOUPLED[name], scale=0.25)
    updates, _ = tx.update(GRAD, tx.init(WEIGHT), WEIGHT)
    zero_updates, _ = tx.update(GRAD, tx.init(WEIGHT), jnp.zeros_like(WEIGHT))
    np.testing.assert_allclose(updates - zero_updates, -0.02 * WEIGHT, atol=1e-6)


def test_a_masked_decay_reaches_only_what_it_masks():
    params = {"a": WEIGHT, "b": jnp.stack([WEIGHT, WEIGHT]), "c": jnp.ones(3)}
    numbers = {"a": GaLoreDimensionNumbers(), "b": GaLoreDimensionNumbers(1, 2), "c": None}
    inner = optax.adamw(0.1, weight_decay=0.2, mask={"a": False, "b": True, "c": True})
    tx = galore(2, inner, weight_dimension_numbers=numbers)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    with_decay, _ = tx.update(params, state, params)
    without, _ = tx.update(params, state, zeros)
    got = jax.tree.map(jnp.subtract, with_decay, without)
    np.testing.assert_allclose(got["a"], 0, atol=1e-7)
    np.testing.assert_allclose(got["b"], -0.02 * params["b"], atol=1e-6)
    np.testing.assert_allclose(got["c"], -0.02 * params["c"], atol=1e-6)


def test_an_argument_overrides_the_rule():
    inner = optax.adamw(0.1, weight_decay=0.2)
    tx = galore(2, inner, decoupled_decay=False, scale=1.0)
    state = tx.init(WEIGHT)
    updates, new_state = tx.update(GRAD, state, WEIGHT)
    basis = new_state.bases
    small, _ = inner.update(basis.T @ GRAD, inner.init(basis.T @ WEIGHT), basis.T @ WEIGHT)
    np.testing.assert_allclose(updates, basis @ small, atol=1e-6)
    forced = galore(2, optax.adamw(0.1, weight_decay=0.2), decoupled_decay=True, scale=1.0)
    ruled = galore(2, optax.adamw(0.1, weight_decay=0.2), scale=1.0)
    np.testing.assert_array_equal(
        forced.update(GRAD, forced.init(WEIGHT), WEIGHT)[0],
        ruled.update(GRAD, ruled.init(WEIGHT), WEIGHT)[0],
    )


def test_an_inner_that_scales_by_its_params_sees_the_projected_weights():
    inner = optax.adafactor(0.1, min_dim_size_to_factor=2)
    tx = galore(2, inner, scale=1.0)
    state = tx.init(WEIGHT)
    updates, new_state = tx.update(GRAD, state, WEIGHT)
    basis = new_state.bases
    small, _ = inner.update(basis.T @ GRAD, state.inner, basis.T @ WEIGHT)
    np.testing.assert_allclose(updates, basis @ small, atol=1e-6)


def test_integers_and_empty_leaves_do_not_hide_decay():
    params = {"w": WEIGHT, "count": jnp.arange(3), "empty": jnp.zeros((0, 4))}
    inner = optax.adamw(0.1, weight_decay=0.2)
    found = decay_slopes(inner.init, inner.update, params, inner.init(params), params)
    assert found[0] is found[1] is None  # count, empty
    np.testing.assert_allclose(found[2], -0.02, rtol=1e-6)
