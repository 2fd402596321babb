"""`unstacked`: to a transformation the layers of a stack are leaves of their own."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_optax import (
    GaLoreDimensionNumbers,
    galore,
    galore_adafactor,
    quantize_state,
    unstacked,
)
from galore_optax.sharding import state_shardings
from galore_optax.transformation import subspace_parts

ROUNDING = dict(rtol=1e-6, atol=1e-8)
AXES = {"norm": 1, "up": 2, "head": None, "bias": 1}


def tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"norm": (8, 16), "up": (8, 12, 16), "head": (16, 10), "bias": (10,)}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def apart(params):
    return {**params, "norm": tuple(params["norm"]), "up": tuple(params["up"])}


def axes(params):
    return {k: AXES[k] for k in params}


def trajectory(tx, params, split=lambda x: x, steps=4):
    here, state = split(params), tx.init(split(params))
    for step in range(steps):
        updates, state = jax.jit(tx.update)(split(tree(step)), state, here)
        here = optax.apply_updates(here, updates)
    return here, state


@pytest.mark.parametrize(
    "tx",
    [
        optax.adafactor(0.01, min_dim_size_to_factor=4, momentum=0.9),
        optax.lamb(0.01),
        quantize_state(optax.adam(0.01), min_size=100),
        galore(3, optax.adafactor(0.01, min_dim_size_to_factor=3), update_proj_gap=2),
    ],
    ids=["adafactor", "lamb", "8 bits", "galore"],
)
def test_numbers_and_state_are_those_of_leaves_of_their_own(tx):
    got, state = trajectory(unstacked(tx, axes), tree())
    expected, theirs = trajectory(tx, tree(), apart)
    # They are programs of their own, which XLA need not round alike.
    jax.tree.map(partial(np.testing.assert_allclose, **ROUNDING), apart(got), expected)
    jax.tree.map(partial(np.testing.assert_allclose, **ROUNDING), state, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what galore leaves out
        whole, _ = trajectory(tx, tree())
    assert not np.allclose(got["norm"], whole["norm"], rtol=1e-4, atol=1e-6)


def test_an_update_in_parts_is_handed_on():
    numbers = {"norm": None, "up": GaLoreDimensionNumbers(1, 2), "head": None, "bias": None}
    plain = galore_adafactor(0.01, 3, weight_dimension_numbers=numbers)
    tx = unstacked(plain, lambda params: {**dict.fromkeys(params), "norm": 1})
    in_parts = subspace_parts(tx)
    params, state = tree(), tx.init(tree())
    whole, expected = tx.update(tree(1), state, params)
    state = in_parts.refresh(tree(1), state, params)
    parts, state = in_parts.update_projected(in_parts.project(tree(1), state), state, params)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert subspace_parts(unstacked(optax.adam(0.1), axes)) is None


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_stack_that_is_sharded_gives_the_same(kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    specs = {"norm": P("a", "b"), "up": P("a", None, "b"), "head": P("b", None), "bias": P()}
    tx = unstacked(
        quantize_state(optax.adafactor(0.01, min_dim_size_to_factor=4), min_size=100), axes
    )
    expected, _ = trajectory(tx, tree())
    at = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    with jax.set_mesh(mesh):
        params = jax.device_put(tree(), at)
        state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, at))(params)
        update = jax.jit(tx.update)
        for step in range(4):
            updates, state = update(jax.device_put(tree(step), at), state, params)
            params = optax.apply_updates(params, updates)
    for key, x in expected.items():
        np.testing.assert_allclose(params[key], x, atol=2e-6)
        if kind == AxisType.Explicit:
            assert updates[key].sharding.is_equivalent_to(at[key], x.ndim)


def test_the_state_can_be_made_of_shapes_alone():
    tx = unstacked(quantize_state(optax.adam(0.01), min_size=100), axes)
    shapes = jax.eval_shape(lambda: tree())
    made, expected = tx.init(shapes), tx.init(tree())
    assert jax.tree.structure(made) == jax.tree.structure(expected)
    assert [x.shape for x in jax.tree.leaves(made)] == [x.shape for x in jax.tree.leaves(expected)]


def test_a_number_of_axes_that_is_none_is_refused_with_the_place():
    tx = unstacked(optax.adam(0.01), lambda params: {**axes(params), "up": -1})
    with pytest.raises(
        ValueError, match=r"param_axes: -1 at \['up'\] must be an integer of at least 0"
    ):
        tx.init(tree())
