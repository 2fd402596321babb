"""Sharded params: the unsharded result, and a state sharded like the params, without gathering."""

import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_optax import GaLoreDimensionNumbers, galore
from galore_optax.sharding import state_shardings

SHAPES = {"wide": (64, 256), "stack": (3, 64, 32), "square": (64, 64), "bias": (8,)}
NUMBERS = {
    "wide": GaLoreDimensionNumbers(),
    "stack": GaLoreDimensionNumbers(1, 2),
    "square": GaLoreDimensionNumbers(),
    "bias": None,
}
SPECS = {
    "rows": {"wide": P("fsdp"), "stack": P(None, "fsdp"), "square": P("data"), "bias": P()},
    "columns": {
        "wide": P(None, "data"),
        "stack": P(None, None, "fsdp"),
        "square": P(None, "fsdp"),
        "bias": P("data"),
    },
    "both": {
        "wide": P("fsdp", "data"),
        "stack": P(None, "data", "fsdp"),
        "square": P("data", "fsdp"),
        "bias": P("fsdp"),
    },
}


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def run(tx, params, state, place):
    update = jax.jit(tx.update)
    for i in range(1, 4):
        updates, state = update(place(tree(i)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("layout", "inner"),
    [("rows", "adamw"), ("columns", "adamw"), ("both", "adamw"), ("both", "adafactor")],
)
def test_sharded_params_give_the_unsharded_result(axis_type, layout, inner):
    inner = {"adamw": optax.adamw(0.01, weight_decay=0.1), "adafactor": optax.adafactor(0.01)}[
        inner
    ]
    tx = galore(8, inner, update_proj_gap=2, weight_dimension_numbers=NUMBERS)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS[layout].items()}
    expected, _ = run(tx, tree(0), tx.init(tree(0)), lambda x: x)
    with jax.set_mesh(mesh):
        wanted = state_shardings(tx, tree(0), shardings)
        params = jax.device_put(tree(0), shardings)
        state = jax.jit(tx.init, out_shardings=wanted)(params)
        got, state = run(tx, params, state, lambda x: jax.device_put(x, shardings))
    for name in SHAPES:
        # Sums over devices round in another order.
        np.testing.assert_allclose(got[name], expected[name], atol=2e-5, err_msg=name)


def test_the_state_keeps_the_axes_that_it_shares_with_the_params():
    tx = galore(8, optax.adam(0.01), weight_dimension_numbers=NUMBERS)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS["both"].items()}
    state = state_shardings(tx, tree(0), shardings)
    assert state.bases["wide"].spec == P("fsdp", None)
    assert state.bases["stack"].spec == P(None, "fsdp", None)  # projected on the output, of 32
    assert state.inner[0].mu["wide"].spec == P(None, "data")
    assert state.inner[0].mu["stack"][0].spec == P("data", None)
    assert state.inner[0].mu["bias"].spec == P("fsdp")
    assert state.count.spec == P()
    assert {s.mesh for s in jax.tree.leaves(state)} == {mesh}


def test_no_step_gathers_a_whole_matrix():
    tx = galore(8, optax.adamw(0.01, weight_decay=0.1), weight_dimension_numbers=NUMBERS)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS["both"].items()}
    wanted = state_shardings(tx, tree(0), shardings)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree(0), shardings
    )
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, abstract),
        wanted,
    )
    update = jax.jit(tx.update, out_shardings=(shardings, wanted))
    program = update.lower(abstract, state, abstract).compile().as_text()
    gathered = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"f32\[([\d,]+)\][^=]*? all-gather\(", program)
    ]
    assert "all-reduce" in program
    assert max(gathered, default=0) < 64 * 32  # the smallest matrix
