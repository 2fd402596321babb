"""Values of params in an optimizer's state are found, and moments are not taken for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from galore_optax.trace.interpreter import depends
from galore_optax.trace.remembered_params import remembers_params

PARAMS = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32), "b": jax.ShapeDtypeStruct((6,), "f4")}


def average_of_params(start):
    """Weights averaged over steps, in a state that starts as `start` of them."""

    def update(updates, state, params):
        return updates, jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state, params)

    init = lambda params: jax.tree.map(start, params)  # noqa: E731
    return optax.chain(optax.adam(0.1), optax.GradientTransformation(init, update))


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
    assert remembers_params(inner, PARAMS)


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
    assert not remembers_params(inner, PARAMS)


def test_only_leaves_that_are_projected_count():
    labels = {"w": "moments", "b": "params"}
    inner = optax.partition({"moments": optax.adam(0.1), "params": optax.contrib.dog(1.0)}, labels)
    assert remembers_params(inner, PARAMS)
    assert remembers_params(inner, PARAMS, {"w": False, "b": True})
    assert not remembers_params(inner, PARAMS, {"w": True, "b": False})
    assert not remembers_params(optax.lbfgs(), PARAMS, False)


def test_an_inner_with_arguments_of_its_own_is_judged_by_its_init():
    def update(updates, state, params=None, *, temperature):
        return jax.tree.map(lambda u: u * temperature, updates), state

    stateless = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    keeps = optax.GradientTransformationExtraArgs(lambda params: params, update)
    assert not remembers_params(stateless, PARAMS)
    assert remembers_params(keeps, PARAMS)


def test_is_found_of_sharded_params():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
        params = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=rows)}
        assert remembers_params(optax.lbfgs(linesearch=None), params)
        assert not remembers_params(optax.adamw(0.1), params)


def marks(function, *inputs, **options):
    """Which outputs depend on each input alone."""
    traced = jax.make_jaxpr(function)(*inputs)
    one_hot = np.eye(len(inputs), dtype=bool).tolist()
    return [depends(traced, row, **options) for row in one_hot]


def test_loops_are_followed_turn_by_turn():
    def shift(a, b, c):  # after three turns, a comes from c
        return jax.lax.fori_loop(0, 3, lambda i, x: (x[1], x[2], x[2]), (a, b, c))

    assert marks(shift, 1.0, 2.0, 3.0) == [[True] + [False] * 2, [True, True, False], [True] * 3]

    def scanned(carry, xs):
        return jax.lax.scan(lambda c, x: (c + 1.0, x * 2.0), carry, xs)

    assert marks(scanned, 1.0, jnp.ones(3)) == [[True, False], [False, True]]


def test_the_end_of_a_loop_is_a_choice():
    def until(limit, x):
        return jax.lax.while_loop(
            lambda s: s[0] < limit, lambda s: (s[0] + 1.0, 2.0 * s[1]), (0.0, x)
        )

    assert marks(until, 3.0, 1.0) == [[True, True], [False, True]]
    assert marks(until, 3.0, 1.0, through_choices=False) == [[False, False], [False, True]]


@pytest.mark.parametrize(
    "choose", [jnp.where, lambda p, a, b: jax.lax.cond(p, lambda: a, lambda: b)]
)
def test_a_choice_is_no_value(choose):
    assert marks(choose, True, 1.0, 2.0) == [[True], [True], [True]]
    assert marks(choose, True, 1.0, 2.0, through_choices=False) == [[False], [True], [True]]


def test_an_element_in_a_loop_is_no_scalar():
    def doubled(xs):
        return jax.lax.map(lambda x: 2.0 * x, xs)

    assert marks(doubled, jnp.ones(3), through_scalars=False) == [[True]]
    assert marks(lambda x: x.sum() * jnp.ones(3), jnp.ones(3), through_scalars=False) == [[False]]
