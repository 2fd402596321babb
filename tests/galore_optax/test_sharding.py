"""Sharded params: the unsharded result, and a state sharded like the params, without gathering."""

import functools
import inspect
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_optax import (
    Adaptive,
    Alice,
    GaLoreDimensionNumbers,
    Staggered,
    adamw8bit,
    alice,
    apollo_adamw,
    fira_adamw,
    galore,
    galore_adamw,
    muon,
    q_galore_adamw8bit,
    quantize_state,
    racs,
)
from galore_optax.projection.dimension_numbers import TuckerDimensionNumbers
from galore_optax.sharding import state_shardings

AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


class Leaf(NamedTuple):
    shape: tuple[int, ...]
    numbers: Any
    spec: P


MATRIX, HEADS = GaLoreDimensionNumbers(), GaLoreDimensionNumbers(0, (1, 2))
LAYERS = GaLoreDimensionNumbers(-2, -1)

# No matrix has fewer elements than WHOLE, and no device more than half of it.
WHOLE = 32 * 64
LEAVES = {
    "rows": Leaf((32, 64), MATRIX, P("fsdp")),
    "columns": Leaf((32, 64), MATRIX, P(None, "data")),
    "both": Leaf((32, 64), MATRIX, P("data", "fsdp")),
    "tall": Leaf((64, 32), MATRIX, P(("data", "fsdp"))),
    "layers": Leaf((4, 32, 64), LAYERS, P("fsdp", None, "data")),
    "heads": Leaf((32, 4, 16), HEADS, P("data", "fsdp")),
    "kernel": Leaf(
        (2, 2, 16, 32), TuckerDimensionNumbers((0, 1, 2, 3)), P(None, None, "data", "fsdp")
    ),
    "embedding": Leaf((32, 64), None, P("data", "fsdp")),
    "bias": Leaf((8,), None, P("fsdp")),
}

ADAMW = optax.adamw(0.01, weight_decay=0.1)
OPTIONS = {
    "adamw": {"inner": ADAMW},
    "adafactor, both sides": {"inner": optax.adafactor(0.01), "side": "both"},
    "reset, power": {"inner": ADAMW, "moments": "reset", "subspace": "power"},
    "keep, svd": {"inner": ADAMW, "moments": "keep", "subspace": "svd"},
    "random, staggered": {
        "inner": ADAMW,
        "subspace": "random",
        "update_proj_gap": Staggered(2),
    },
    "alice": {"inner": ADAMW, "recover": Alice(0.01, tracking=0.9)},
}


def mesh_of(axis_type):
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axis_type,) * 2)


def transformation(options, names):
    numbers = {name: LEAVES[name].numbers for name in names}
    chosen = {"update_proj_gap": 2} | OPTIONS[options]
    return galore(4, **chosen, weight_dimension_numbers=numbers)


def tree(seed, names):
    keys = jax.random.split(jax.random.key(seed), len(names))
    return {
        name: jax.random.normal(key, LEAVES[name].shape)
        for key, name in zip(keys, names, strict=True)
    }


class Run(NamedTuple):
    params: Any
    state: Any
    wanted: Any  # the state's shardings
    program: str


@functools.cache
def run(options, names, axis_type=None):
    """Three steps, with a refresh at the first and the third; unsharded without an axis type."""
    tx = transformation(options, names)
    place, wanted, at = lambda x: x, None, {}
    params = tree(0, names)
    if axis_type is not None:
        mesh = mesh_of(axis_type)
        shardings = {name: NamedSharding(mesh, LEAVES[name].spec) for name in names}
        wanted = state_shardings(tx, params, shardings)
        place = functools.partial(jax.device_put, device=shardings)
        if axis_type is AxisType.Auto:  # under explicit axes the types say it
            at = {"out_shardings": (shardings, wanted)}
    params = place(params)
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    update = jax.jit(tx.update, **at).lower(params, state, params).compile()
    for i in range(1, 4):
        updates, state = update(place(tree(i, names)), state, params)
        params = optax.apply_updates(params, updates)
    return Run(params, state, wanted, update.as_text())


CASES = [("adamw", tuple(LEAVES))] + [(options, ("both", "layers")) for options in [*OPTIONS][1:]]


@pytest.mark.parametrize(
    ("options", "names", "axis_type"),
    [
        pytest.param(*case, axis, marks=[pytest.mark.slow] * (i > 0 and axis is AxisType.Auto))
        for i, case in enumerate(CASES)
        for axis in AXIS_TYPES
    ],
)
def test_sharded_params_give_the_unsharded_result(options, names, axis_type):
    expected, got = run(options, names), run(options, names, axis_type)
    for name in names:
        # Sums over devices round in another order.
        np.testing.assert_allclose(got.params[name], expected.params[name], atol=2e-5, err_msg=name)
    stayed = jax.tree.map(
        lambda x, wanted: x.sharding.is_equivalent_to(wanted, x.ndim), got.state, got.wanted
    )
    assert all(jax.tree.leaves(stayed))


def sizes(program):
    """Elements of every array of floats in one device's program."""
    return {math.prod(map(int, s.split(","))) for s in re.findall(r"\bf32\[([\d,]+)\]", program)}


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_no_step_brings_a_whole_matrix_onto_a_device_nor_does_a_refresh(axis_type):
    program = run("adamw", tuple(LEAVES), axis_type).program
    assert "all-reduce" in program
    assert max(sizes(program)) == WHOLE // 2


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_only_the_exact_svd_gathers_its_matrix(axis_type):
    names = ("both", "layers")
    assert WHOLE in sizes(run("keep, svd", names, axis_type).program)
    assert max(sizes(run("reset, power", names, axis_type).program)) == WHOLE // 2


def abstract(shapes, specs, mesh):
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, shape in shapes.items()
    }
    return params, shardings


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_a_stack_split_by_layers_is_refreshed_without_gathering_the_stack(axis_type):
    mesh = mesh_of(axis_type)
    params, shardings = abstract({"w": (8, 16, 32)}, {"w": P("fsdp")}, mesh)
    tx = galore(4, optax.adam(0.01), weight_dimension_numbers=LAYERS)
    wanted = state_shardings(tx, params, shardings)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        wanted,
    )
    update = jax.jit(tx.update, out_shardings=(shardings, wanted)).lower(params, state)
    program = update.compile().as_text()
    assert max(sizes(program)) == 2 * 16 * 32  # a device's own two layers


def test_the_state_keeps_the_axes_that_it_shares_with_the_params():
    tx = transformation("adamw", tuple(LEAVES))
    mesh = mesh_of(AxisType.Auto)
    shardings = {name: NamedSharding(mesh, leaf.spec) for name, leaf in LEAVES.items()}
    state = state_shardings(tx, tree(0, tuple(LEAVES)), shardings)
    bases, moments = state.bases, state.inner[0].mu
    assert bases["rows"].spec == P("fsdp", None)
    assert moments["rows"].spec == P(None, None)
    assert bases["columns"].spec == P(None, None)
    assert moments["columns"].spec == P(None, "data")
    assert bases["both"].spec == P("data", None)
    assert moments["both"].spec == P(None, "fsdp")
    assert bases["tall"].spec == P(None, None)  # projected on the output
    assert moments["tall"].spec == P(("data", "fsdp"), None)
    assert bases["layers"].spec == P("fsdp", None, None)
    assert moments["layers"].spec == P("fsdp", None, "data")
    # Of an inner that gets each layer by itself the moments have no axis of layers: its part of the
    # mesh splits the other side.
    lamb = galore(
        4, optax.lamb(1e-3), weight_dimension_numbers={n: LEAVES[n].numbers for n in LEAVES}
    )
    of_each = state_shardings(lamb, tree(0, tuple(LEAVES)), shardings).inner[0].mu["layers"]
    assert {m.spec for m in of_each} == {P(None, ("data", "fsdp"))}
    assert bases["heads"].spec == P("data", None)
    assert moments["heads"].spec == P(None, "fsdp")
    assert [b.spec for b in bases["kernel"]] == [P("data", None), P("fsdp", None)]
    assert moments["kernel"].spec == P(None, None, None, None)
    assert moments["embedding"].spec == P("data", "fsdp")
    assert moments["bias"].spec == P("fsdp")
    assert state.count.spec == P()
    assert {s.mesh for s in jax.tree.leaves(state)} == {mesh}


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    shapes, specs = {"w": (2048, 5461)}, {"w": P("data", "fsdp")}
    mesh = mesh_of(AxisType.Auto)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    state = state_shardings(galore(128, optax.adam(0.01)), params, shardings)
    assert state.bases["w"].spec == P("data", None)
    assert state.inner[0].mu["w"].spec == P(None, None)


SPLITS = [None, "data", "fsdp", ("data", "fsdp")]


@settings(max_examples=30, deadline=None)
@given(
    stack=st.lists(st.sampled_from([1, 2, 3, 8]), max_size=2),
    matrix=st.tuples(*[st.sampled_from([1, 2, 3, 8, 16, 30, 48])] * 2),
    data=st.data(),
    inner=st.sampled_from([optax.adam(1.0), optax.adafactor(1.0), optax.sm3(1.0)]),
    side=st.sampled_from(["smaller", "larger", "both"]),
    rank=st.integers(1, 10),
)
def test_every_leaf_of_the_state_divides_over_its_devices(stack, matrix, data, inner, side, rank):
    shape = (*stack, *matrix)
    used: set[str] = set()
    spec: list[Any] = []
    for _ in shape:
        axes = data.draw(st.sampled_from(SPLITS))
        names = {axes} if isinstance(axes, str) else set(axes or ())
        spec.append(None if names & used else axes)
        used |= set() if names & used else names
    numbers = data.draw(st.sampled_from([LAYERS, TuckerDimensionNumbers((0, 1))]))
    tx = galore(rank, inner, side=side, weight_dimension_numbers=numbers)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    shardings = {"w": NamedSharding(mesh_of(AxisType.Auto), P(*spec))}
    state = state_shardings(tx, params, shardings)
    jax.tree.map(lambda x, s: s.shard_shape(x.shape), jax.eval_shape(tx.init, params), state)


def test_explicit_types_survive_a_scan_over_steps_and_injected_hyperparams():
    mesh = mesh_of(AxisType.Explicit)
    params, _ = abstract({"w": (16, 32)}, {"w": P("data", "fsdp")}, mesh)
    make = optax.inject_hyperparams(galore_adamw, static_args=("rank", "update_proj_gap", "seed"))

    def train(params):
        tx = make(0.01, 4, weight_decay=0.1)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0]

    with jax.set_mesh(mesh):
        params, state = jax.eval_shape(jax.jit(train), params)
    assert params["w"].sharding.spec == P("data", "fsdp")
    assert state.inner_state.bases["w"].sharding.spec == P("data", None)
    assert state.inner_state.inner[0].mu["w"].sharding.spec == P(None, "fsdp")


@pytest.mark.parametrize("recipe", [fira_adamw, apollo_adamw, alice, racs, muon])
def test_injected_hyperparams_reach_whole_updates_under_explicit_types(recipe):
    mesh = mesh_of(AxisType.Explicit)
    params, _ = abstract({"w": (16, 32)}, {"w": P("data", "fsdp")}, mesh)
    known = inspect.signature(recipe).parameters
    static = {"rank", "update_proj_gap", "seed", "tracking", "steps"} & {*known}
    rank = {"rank": 4} if "rank" in known else {}
    for rate in (0.01, optax.linear_schedule(0.0, 0.01, 10)):
        tx = optax.inject_hyperparams(recipe, static_args=static)(rate, **rank)
        with jax.set_mesh(mesh):
            updates, _ = jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p), p), params)
        assert updates["w"].sharding.spec == P("data", "fsdp")


def test_explicit_types_need_neither_jit_nor_a_mesh_in_context():
    sharding = NamedSharding(mesh_of(AxisType.Explicit), P("data", "fsdp"))
    params = {"w": jax.device_put(jnp.ones((16, 32)), sharding)}
    tx = galore(4, optax.sgd(1.0), subspace="random")
    updates, state = tx.update(params, tx.init(params))
    assert updates["w"].sharding == sharding
    assert state.bases["w"].sharding.spec == P("data", None)


def test_an_inner_that_explicit_types_cannot_express_says_what_to_do():
    mesh = mesh_of(AxisType.Explicit)
    params, _ = abstract({"w": (16, 32)}, {"w": P("data", "fsdp")}, mesh)
    tx = galore(4, optax.contrib.momo(), moments="keep")  # an inner product over a sharded axis
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"inner: .* give the mesh automatic"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, value=jnp.zeros([])), params)


def test_a_split_that_merging_cannot_keep_is_named():
    mesh = mesh_of(AxisType.Auto)
    params, shardings = abstract({"w": (32, 4, 16)}, {"w": P(None, None, "fsdp")}, mesh)
    tx = galore(4, optax.adam(0.01), weight_dimension_numbers=HEADS)
    with pytest.warns(UserWarning, match=r"\['w'\] is split along axis 2, .* split axis 1 instead"):
        state_shardings(tx, params, shardings)


@pytest.mark.parametrize(
    ("shardings", "message"),
    [
        ({"w": P("data")}, r"at \['w'\] must be a jax.sharding.NamedSharding"),
        ({}, "over 0 meshes"),
    ],
)
def test_shardings_without_a_mesh_are_refused(shardings, message):
    params = {name: jax.ShapeDtypeStruct((16, 32), jnp.float32) for name in shardings}
    with pytest.raises(ValueError, match=message):
        state_shardings(galore(4, optax.adam(0.01)), params, shardings)


LOW_BIT = functools.partial(quantize_state, min_size=1)
QUICK = functools.partial(galore, 4, subspace="random")  # to compile
STATES = {
    "plain": QUICK(ADAMW),
    "8 bits": QUICK(LOW_BIT(ADAMW)),
    "4 bits": QUICK(LOW_BIT(ADAMW, 4)),
    "Q-GaLore": QUICK(LOW_BIT(ADAMW), projection_bits=4, update_proj_gap=Adaptive(2)),
    "8 bits without galore": LOW_BIT(ADAMW),
}


@pytest.mark.parametrize(
    ("name", "spec"), [("Q-GaLore", None), *((name, P("data", "fsdp")) for name in STATES)]
)
def test_a_mesh_in_context_changes_nothing_outside_of_jit(name, spec):
    tx, value = STATES[name], np.asarray(tree(0, ("rows",))["rows"])
    params = {"w": jnp.asarray(value)}
    expected, _ = tx.update(params, tx.init(params), params)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))  # explicit axes, as is its default
    with jax.set_mesh(mesh):
        params = {"w": jnp.asarray(value)}
        if spec is not None:
            params = jax.device_put(params, NamedSharding(mesh, spec))
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.typeof(updates["w"]) == jax.typeof(params["w"])
    atol = 1e-5 if name == "plain" else 1e-3  # sums in another order, which codes may round apart
    np.testing.assert_allclose(updates["w"], expected["w"], atol=atol)


@pytest.mark.parametrize("make", [optax.adamw, galore_adamw, adamw8bit, q_galore_adamw8bit])
def test_a_state_is_made_of_sharded_shapes_as_of_sharded_arrays(make):
    tx = make(0.01) if make in (optax.adamw, adamw8bit) else make(0.01, 4)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data", "fsdp"))
        of_shapes = tx.init({"w": jax.ShapeDtypeStruct((32, 256), jnp.float32, sharding=sharding)})
        of_arrays = tx.init({"w": jnp.zeros((32, 256), device=sharding)})
    same = jax.tree.map(lambda x, y: jax.typeof(x) == jax.typeof(y), of_shapes, of_arrays)
    assert all(jax.tree.leaves(same))


def test_an_nnx_optimizer_is_made_and_updated_with_a_mesh_in_context():
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "fsdp"))):
        model = nnx.Linear(32, 64, rngs=nnx.Rngs(0))
        grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer = nnx.Optimizer(model, q_galore_adamw8bit(0.01, 4), wrt=nnx.Param)
        before = np.asarray(model.kernel[...])
        nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(
            model, optimizer, grads
        )
    assert not np.array_equal(before, model.kernel[...])


@pytest.mark.parametrize("name", ["plain", "Q-GaLore"])
def test_each_device_of_a_shard_map_trains_on_its_own_gradients(name):
    tx = STATES[name]
    mesh = jax.make_mesh((8,), ("member",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((2, 16, 32) if name == "plain" else (32, 64))}
    if name == "plain":
        tx = galore(4, optax.adamw(0.1), weight_dimension_numbers=LAYERS)
    grads = {k: jax.random.normal(jax.random.key(1), (8, *x.shape)) for k, x in params.items()}
    state = tx.init(params)

    def train(params, state, grads):
        own = jax.tree.map(lambda x: x[0], grads)
        for _ in range(2):
            updates, state = tx.update(own, state, params)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda x: x[None], params)

    specs = P(), P(), P("member")
    mapped = jax.shard_map(train, mesh=mesh, in_specs=specs, out_specs=P("member"))
    got = jax.jit(mapped)(params, state, grads)
    one = jax.jit(train)(params, state, jax.tree.map(lambda x: x[3:4], grads))
    atol = 2e-5 if name == "plain" else 1e-3
    for k in params:
        np.testing.assert_allclose(got[k][3], one[k][0], atol=atol)
        assert not np.allclose(got[k][3], got[k][4], atol=1e-4)


@pytest.mark.parametrize("inner", [optax.adamw(0.01), LOW_BIT(ADAMW)])
def test_a_state_that_is_made_within_a_shard_map_keeps_its_type(inner):
    tx = optax.apply_if_finite(galore(4, inner, update_proj_gap=Adaptive(2)), 3)
    mesh = jax.make_mesh((8,), ("member",), axis_types=(AxisType.Auto,))

    def train(params):
        state = jax.eval_shape(tx.init, params)
        updates, new = jax.eval_shape(tx.update, params, tx.init(params), params)
        old, new = jax.tree.leaves(state.inner_state), jax.tree.leaves(new.inner_state)
        assert [x.manual_axis_type for x in old] == [x.manual_axis_type for x in new]
        return updates

    mapped = jax.shard_map(train, mesh=mesh, in_specs=P("member"), out_specs=P("member"))
    jax.eval_shape(mapped, {"w": jnp.ones((16 * 8, 32))})


def test_large_low_bit_states_are_updated_in_chunks_within_a_shard_map():
    tx, params = adamw8bit(0.01), {"w": jnp.ones((2048, 512))}
    mesh = jax.make_mesh((2,), ("member",), axis_types=(AxisType.Auto,))
    state, factors = tx.init(params), jnp.array([1.0, -1.0])

    def update(params, state, factor):
        return tx.update({"w": factor * params["w"]}, state, params)[0]["w"]

    specs = P(), P(), P("member")
    mapped = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=P("member")))
    assert "scan[" in str(jax.make_jaxpr(mapped)(params, state, factors))
    got = mapped(params, state, factors)
    np.testing.assert_allclose(got[::2048, 0], [-0.01, 0.01], rtol=1e-4)


@pytest.mark.parametrize("tx", [galore(4, optax.lamb(0.01)), LOW_BIT(ADAMW)])
def test_optax_way_to_map_specs_over_a_state_is_an_error_where_they_cannot_fit(tx):
    params, specs = {"w": jnp.ones((32, 64)), "b": jnp.ones(8)}, {"w": P("data"), "b": P()}
    with pytest.raises(ValueError, match=r"pytree structure error.*\n.*\['[wb]'\]"):
        optax.tree_utils.tree_map_params(tx, lambda _, spec: spec, tx.init(params), specs)
