"""Decay inside galore reaches the whole matrix; other uses of the params are left to the inner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from galore_optax import GaLoreDimensionNumbers, galore
from galore_optax.trace.params_use import (
    acts_within_subspace,
    decoupled_decay,
    remembers_params,
)
from galore_optax.trace.traced import trace

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
    "noise after adamw": optax.chain(
        optax.adamw(0.1, weight_decay=0.2), optax.add_noise(0.01, 0.55, key=0)
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


def traced(inner, params):
    return trace(optax.with_extra_args_support(inner), params)


def slopes(inner, params=None, updates=None):
    """One number for each leaf; None where there is no decoupled decay."""
    params = {"w": WEIGHT} if params is None else params
    updates = {"w": GRAD} if updates is None else updates
    found = decoupled_decay(traced(inner, params))
    if found is None:
        return None
    states = jax.tree.leaves(inner.init(params))
    made = found(jax.tree.leaves(updates), states, jax.tree.leaves(params))
    return [None if s is None else float(s.ravel()[0]) for s in made]


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


def by_gradient_norm(decay):
    """SGD whose decay is in proportion to the norm of all gradients."""

    def update(updates, state, params):
        norm = optax.tree.norm(updates)
        return jax.tree.map(lambda u, p: -0.1 * (u + decay * norm * p), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


DECAYS_BY_ARRAYS = {
    "apply_if_finite": optax.apply_if_finite(optax.adamw(0.1, weight_decay=0.2), 3),
    "skip_not_finite": optax.MultiSteps(
        optax.adamw(0.1, weight_decay=0.2), 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "skip_large_updates": optax.MultiSteps(
        optax.adamw(0.1, weight_decay=0.2),
        1,
        should_skip_update_fn=functools.partial(optax.skip_large_updates, max_squared_norm=100.0),
    ).gradient_transformation(),
    "by gradient norm": by_gradient_norm(0.2),
}


@pytest.mark.parametrize("bad", [None, jnp.nan, 100.0])
@pytest.mark.parametrize("name", DECAYS_BY_ARRAYS)
def test_a_decay_that_arrays_decide_is_that_of_the_inner(name, bad):
    """Such as none at all in a step that is skipped, because of any of the gradients."""
    inner = DECAYS_BY_ARRAYS[name]
    params = {"bias": jnp.arange(1.0, 4.0), "w": WEIGHT[:2]}  # no side is longer than the rank
    grads = {"bias": jnp.array([1.0, bad or -2.0, 3.0]), "w": GRAD[:2]}
    expected, _ = inner.update(grads, inner.init(params), params)
    tx = galore(2, inner, scale=1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


def test_a_decay_is_that_of_the_arguments_which_are_given():
    def update(updates, state, params, value=None, **_):
        rate = 0.1 if value is None else 0.1 * value
        return jax.tree.map(lambda u, p: -rate * (u + 0.2 * p), updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, weight, grad = galore(2, inner, scale=1.0), WEIGHT[:2], GRAD[:2]
    for given in ({}, {"value": jnp.float32(3)}):
        updates, _ = tx.update(grad, tx.init(weight), weight, **given)
        expected, _ = inner.update(grad, optax.EmptyState(), weight, **given)
        np.testing.assert_allclose(updates, expected, rtol=1e-6)


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
    found = slopes(inner, params, params)
    assert found[0] is found[1] is None  # count, empty
    np.testing.assert_allclose(found[2], -0.02, rtol=1e-6)


# Remembered params.

SHAPES = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32), "b": jax.ShapeDtypeStruct((6,), "f4")}


def average_of_params(start):
    """Weights averaged over steps, in a state that starts as `start` of them."""

    def update(updates, state, params):
        return updates, jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state, params)

    init = lambda params: jax.tree.map(start, params)  # noqa: E731
    return optax.chain(optax.adam(0.1), optax.GradientTransformation(init, update))


def remembers(inner, params, counts=True):
    """Whether the state holds values of the params, of those leaves that count."""
    marks = [bool(c) for c in jax.tree.leaves(jax.tree.broadcast(counts, params))]
    return remembers_params(traced(inner, params), marks)


@pytest.mark.parametrize(
    "inner",
    [
        optax.apply_if_finite(optax.lbfgs(linesearch=None), 3),
        optax.MultiSteps(optax.lbfgs(linesearch=None), 2).gradient_transformation(),
        optax.chain(optax.clip(1.0), optax.lbfgs()),
        optax.flatten(optax.contrib.prodigy()),
        optax.contrib.mechanize(optax.sgd(0.1)),
        optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
        optax.inject_hyperparams(optax.contrib.dog)(1.0),
        average_of_params(lambda p: p),
        average_of_params(jnp.zeros_like),
    ],
)
def test_params_are_found_wherever_they_are_kept(inner):
    assert remembers(inner, SHAPES)


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1)),  # L2 in the moments
        optax.lars(0.1, weight_decay=0.1),  # a trust ratio in the momentum
        optax.adafactor(0.1, momentum=0.9),
        optax.lamb(0.1, weight_decay=0.1),
        optax.chain(optax.sgd(0.1), optax.scale_by_zoom_linesearch(5)),
        optax.contrib.sophia(0.1),  # the curvature at the params
        optax.contrib.sam(optax.adam(0.1), optax.sgd(0.1), opaque_mode=True),
        optax.snapshot("norm", lambda updates: optax.tree.norm(updates)),
        optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation(),
    ],
)
def test_moments_that_params_entered_are_moments(inner):
    assert not remembers(inner, SHAPES)


def test_only_leaves_that_are_projected_count():
    labels = {"w": "moments", "b": "params"}
    inner = optax.partition({"moments": optax.adam(0.1), "params": optax.contrib.dog(1.0)}, labels)
    assert remembers(inner, SHAPES)
    assert remembers(inner, SHAPES, {"w": False, "b": True})
    assert not remembers(inner, SHAPES, {"w": True, "b": False})
    assert not remembers(optax.lbfgs(), SHAPES, False)


def test_an_inner_with_arguments_of_its_own_is_judged_by_its_init():
    def update(updates, state, params=None, *, temperature):
        return jax.tree.map(lambda u: u * temperature, updates), state

    stateless = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    keeps = optax.GradientTransformationExtraArgs(lambda params: params, update)
    assert not remembers(stateless, SHAPES)
    assert remembers(keeps, SHAPES)


def test_is_found_of_sharded_params():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
        params = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=rows)}
        assert remembers(optax.lbfgs(linesearch=None), params)
        assert not remembers(optax.adamw(0.1), params)


# Any other use.


def cautious(weight_decay):
    """Decay where the update and the weight have the same sign."""

    def update(updates, state, params):
        def one(u, p):
            return u - weight_decay * jnp.where(u * p < 0, p, 0.0)

        return jax.tree.map(one, updates, params), state

    masked = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(optax.adam(0.1), masked)


WITHIN_SUBSPACE = {
    "cautious decay": cautious(0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.2),
    "scaled adafactor with decay": optax.adafactor(0.1, weight_decay_rate=0.1),
    "clipped after adamw": optax.chain(optax.adamw(0.1, weight_decay=0.2), optax.clip(1.0)),
    "averaged after adamw": optax.chain(optax.adamw(0.1, weight_decay=0.2), optax.ema(0.9)),
    "zero_nans after adamw": optax.chain(optax.adamw(0.1, weight_decay=0.2), optax.zero_nans()),
    # A derivative that is linear in the params, though not one number for a whole leaf.
    "centralized after adamw": optax.chain(optax.adamw(0.1, weight_decay=0.2), optax.centralize()),
    # Decay added to a moment is no regularization of the gradient.
    "momo": optax.contrib.momo(0.1, weight_decay=0.2),
}
HARMLESS = {
    "l2 before a sign": OTHER["decay by coordinate"],
    "l2 before adam": OTHER["l2 before adam"],
    "l2 in a trust ratio": optax.lars(0.1, weight_decay=0.2),
    "scaled adafactor": optax.adafactor(0.1),
    "lamb without decay": optax.lamb(0.1),
    **UNUSED,
}


@pytest.mark.parametrize("name", WITHIN_SUBSPACE)
def test_a_use_that_acts_within_the_subspace_warns_once_and_names_the_way_to_say_it(name):
    inner = WITHIN_SUBSPACE[name]
    tx = galore(2, inner)
    with pytest.warns(UserWarning, match=r"uses params elementwise.*decoupled_decay=") as seen:
        state = tx.init(WEIGHT)
    assert len(seen) == 1
    tx.update(GRAD, state, WEIGHT, value=1.0)  # without another warning
    for decided in (True, False):
        galore(2, inner, decoupled_decay=decided).init(WEIGHT)


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_decay_of_an_inner_that_remembers_params_warns_too(moments):
    inner = optax.contrib.schedule_free_adamw(0.1, weight_decay=0.2)
    with pytest.warns(UserWarning, match=r"uses params elementwise") as seen:
        galore(2, inner, moments=moments).init(WEIGHT)
    assert "decoupled_decay=True" not in str(seen[0].message)
    galore(2, inner, moments=moments, decoupled_decay=False).init(WEIGHT)


@pytest.mark.parametrize("name", HARMLESS)
def test_regularization_of_the_gradient_and_scalars_are_harmless(name):
    assert not acts_within_subspace(traced(HARMLESS[name], {"w": WEIGHT}), [True])
    galore(2, HARMLESS[name]).init(WEIGHT)
