"""Any optimizer with its moments in another dtype or in few bits, beside the one with floats."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from inners import FEW, INNERS, TARGET, arguments
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from paths import FIXTURES

from galore_optax import (
    GaLoreDimensionNumbers,
    QuantizedArray,
    adamw8bit,
    cast_state,
    galore,
    galore_adafactor,
    galore_adamw,
    quantize_state,
    quantize_weights,
)
from galore_optax.memory import tree_bytes
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.sharding import state_shardings

PUBLISHED = np.load(FIXTURES / "bitsandbytes.npz")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def run(tx, params, grads):
    """Params and state after a step for each of the gradients."""

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def quantized_leaves(state):
    return [x for x in jax.tree.leaves(state, is_leaf=is_quantized) if is_quantized(x)]


# `cast_state`.


def in_bfloat16(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def test_a_second_moment_of_bfloat16_params_decays_in_float32_only():
    params = in_bfloat16({"w": jnp.ones((4, 8)), "b": jnp.ones(3)})
    grads = [jax.tree.map(jnp.ones_like, params)] + 1500 * [jax.tree.map(jnp.zeros_like, params)]
    _, lost = run(optax.adam(1e-3), params, grads)
    _, kept = run(cast_state(optax.adam(1e-3)), params, grads)
    _, wide = run(optax.adam(1e-3), in_float32(params), in_float32(grads))
    jax.tree.map(np.testing.assert_array_equal, kept, wide)
    np.testing.assert_allclose(kept[0].nu["w"], 0.001 * 0.999**1500, rtol=1e-4)
    assert (lost[0].nu["w"] > 0.00099).all()
    _, low = run(quantize_state(optax.adam(1e-3)), params, grads)  # too small to be quantized
    jax.tree.map(np.testing.assert_array_equal, low, wide)


@pytest.mark.parametrize("recipe", [galore_adamw, galore_adafactor])
def test_galores_moments_in_float32_follow_those_of_float32_params(recipe):
    """Stacks, moments carried over at refreshes, and decay of whole matrices."""
    params = in_bfloat16({"w": normal(0, 3, 24, 40), "b": normal(1, 5)})
    grads = [in_bfloat16({"w": normal(i, 3, 24, 40), "b": normal(i, 5)}) for i in range(5)]
    numbers = {"w": GaLoreDimensionNumbers(1, 2), "b": None}
    options = dict(rank=4, update_proj_gap=2, weight_decay=0.5, weight_dimension_numbers=numbers)
    tx = recipe(0.1, **options, state_dtype=jnp.float32)
    got, state = run(tx, params, grads)
    exact, wide = run(recipe(0.1, **options), in_float32(params), in_float32(grads))
    assert jax.tree.structure(state) == jax.tree.structure(wide)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.bases)} == {jnp.dtype(jnp.bfloat16)}
    for x, y in zip(jax.tree.leaves(state.inner), jax.tree.leaves(wide.inner), strict=True):
        assert x.dtype == y.dtype
        assert np.linalg.norm(x - y) <= 0.03 * np.linalg.norm(y)
    for name, x in in_float32(got).items():
        assert off(x, exact[name]) < 0.05 * off(params[name], exact[name])
    without = run(recipe(0.1, **options), params, grads)[1]
    assert tree_bytes(without.inner) < 0.6 * tree_bytes(state.inner)


def test_a_state_may_have_less_precision_than_its_params_and_no_params():
    tx = cast_state(optax.adam(0.1), jnp.bfloat16)
    params = {"w": normal(0, 4, 8)}
    state = tx.init(params)
    assert state[0].mu["w"].dtype == jnp.bfloat16
    assert tx.update(params, state)[0]["w"].dtype == jnp.float32


def test_python_numbers_among_params_and_gradients_are_updated_as_by_optax():
    params, grads = {"w": jnp.ones((4, 6)), "bias": 1.5}, {"w": jnp.ones((4, 6)), "bias": 0.5}
    plain, expected = optax.adamw(0.1, weight_decay=0.1), None
    for tx in (plain, cast_state(plain), quantize_state(plain)):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        expected = expected or updates
        np.testing.assert_array_equal(updates["bias"], expected["bias"])


@pytest.mark.parametrize("dtype", [jnp.int8, "x", 3])
def test_a_dtype_that_is_no_float_is_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype=.* is not a float type; give one, such as jnp"):
        cast_state(optax.adam(0.1), dtype)
    with pytest.raises(ValueError, match=r"is not an optax.GradientTransformation"):
        cast_state(optax.adam)  # pyrefly: ignore
    with pytest.raises(ValueError, match=r"state_dtype=.* with bits=8: .* leave one of them out"):
        galore_adamw(0.1, 4, bits=8, state_dtype=jnp.float32)


# bitsandbytes.

LEARNING_RATE, DECAY, RANK = 0.01, 0.1, 16
RECORDED = {
    "adamw/blocks are rows": lambda x: x,
    "adamw/blocks are no rows": lambda x: x.reshape(*x.shape[:-2], 16, 320),
    # Theirs are (out, in).
    "galore/blocks are rows": lambda x: np.swapaxes(x, -2, -1),
    "galore/blocks are no rows": lambda x: x,
}


def recorded(name):
    order = RECORDED[name]
    return order(PUBLISHED["weight"]).astype(np.float32), order(PUBLISHED["grads"])


def moved(name, quantized):
    """By how much the recorded gradients move the weights."""
    weight, grads = recorded(name)
    rate, decay = LEARNING_RATE, DECAY if name.startswith("adamw") else 0.0
    tx = optax.adamw(rate, weight_decay=decay)
    tx = quantize_state(tx) if quantized else tx
    if name.startswith("galore"):
        tx = galore(RANK, tx, subspace="svd", moments="keep")
    params, state = run(tx, jnp.asarray(weight), jnp.asarray(grads, jnp.float32))
    assert len(quantized_leaves(state)) == (2 if quantized else 0)
    return np.asarray(params) - weight


def off(a, b):
    """Root mean square of a difference, beside that of what is right."""
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


@pytest.mark.parametrize("name", RECORDED)
def test_adamw_follows_bitsandbytes_also_inside_galore(name):
    """Blocks of ours lie within rows. Where theirs do too the two are one optimizer, but that

    - the largest of a block is exact here where it is negative too (0.7% off with them),
    - what is not zero is never coded as zero here,
    - their kernel for CPUs has one code for all below 2^-15 of the largest; a search for the
      nearest, as on GPUs, is recorded beside it.
    """
    kernel, nearest = (PUBLISHED[f"{name}/{how}"] for how in ("kernel", "nearest"))
    if name.startswith("galore"):
        kernel, nearest = kernel.T, nearest.T
    ours, floats = moved(name, quantized=True), moved(name, quantized=False)
    if name.endswith("no rows"):
        # Another block has another largest element, here up to 100 times as large: as far from
        # each other as each is from AdamW with floats.
        assert off(ours, nearest) < 1.5 * (off(ours, floats) + off(nearest, floats))
        return
    # Six steps, each with moments that are up to 0.7% off where a block has its largest.
    assert off(ours, nearest) < 0.004 < off(floats, nearest)
    assert off(ours, kernel) < 0.005 < off(floats, kernel)
    # All but a few elements take the same codes, and are equal to float32's rounding of weights.
    assert np.quantile(np.abs(ours - nearest), 0.6) < 1e-6 * (1 if "adamw" in name else 10)


def published_moment(x, signed):
    """A moment coded and read, by the published map and the two rules above, in float64."""
    table = PUBLISHED["map/signed" if signed else "map/unsigned"].astype(np.float64)
    scale = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    unit = x / scale
    found = table[np.abs(table[:, None] - unit[:, None, :]).argmin(axis=1)]
    least = np.abs(table[table != 0]).min()
    return np.where((found == 0) & (x != 0), np.sign(unit) * least, found) * scale


def test_it_is_the_published_update_step_by_step():
    weight, grads = recorded("adamw/blocks are rows")
    x, first, second = weight.astype(np.float64), 0.0, 0.0
    for t, grad in enumerate(grads.astype(np.float64), start=1):
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        x = x - LEARNING_RATE * (step + DECAY * x)
        first, second = published_moment(first, True), published_moment(second, False)
    ours = moved("adamw/blocks are rows", quantized=True)
    apart = np.abs(ours - (x - weight))
    # float32's rounding, but where it takes a number to the other side of a middle: a step of a
    # code is up to a half of a small number.
    assert np.quantile(apart, 0.99) < 2e-6
    assert off(ours, x - weight) < 1e-3


# What is stored, and how.

PARAMS = {"w": normal(0, 16, 512), "b": normal(1, 512), "s": jnp.float32(1)}
GRADS = [jax.tree.map(lambda x: normal(i, *jnp.shape(x)), PARAMS) for i in range(3)]  # noqa: B023


@pytest.fixture(scope="module")
def plain():
    """What a loop of steps gives."""
    return {bits: run(quantize_state(optax.adamw(0.01), bits), PARAMS, GRADS) for bits in (8, 4)}


@pytest.mark.parametrize(("bits", "block"), [(8, 256), (4, 128)])
def test_large_arrays_of_floats_are_stored_and_others_stay(bits, block):
    floats = jax.eval_shape(optax.adam(0.1).init, PARAMS)
    state = jax.eval_shape(quantize_state(optax.adam(0.1), bits).init, PARAMS)
    assert jax.eval_shape(dequantized, state) == floats
    for moment, signed in ((state[0].mu, True), (state[0].nu, False)):
        assert isinstance(moment["w"], QuantizedArray)
        assert (moment["w"].code.bits, moment["w"].block) == (bits, block)
        assert moment["w"].shape == (16, 512)
        table = moment["w"].code.decode(jnp.arange(2**bits), jnp.float32(1), None)
        assert (table.min() < 0) == signed
        assert moment["b"].shape == (512,)
        assert not is_quantized(moment["b"])
    assert state[0].count.dtype == jnp.int32
    # The threshold is of elements, and integers are left whatever it is.
    few = jax.eval_shape(quantize_state(optax.adam(0.1), bits, min_size=512).init, PARAMS)
    assert len(quantized_leaves(few)) == 4
    every = jax.eval_shape(quantize_state(optax.adam(0.1), bits, min_size=0).init, PARAMS)
    assert len(quantized_leaves(every)) == 4
    none = jax.eval_shape(quantize_state(optax.adam(0.1), bits, min_size=8193).init, PARAMS)
    assert none == floats


def test_which_have_no_sign_can_be_told():
    paths = []

    def unsigned(path):
        paths.append(path)
        return "nu" in path

    state = jax.eval_shape(quantize_state(optax.adam(0.1), unsigned=unsigned).init, PARAMS)
    by_itself = jax.eval_shape(quantize_state(optax.adam(0.1)).init, PARAMS)
    assert state == by_itself
    assert "[0].nu['w']" in paths
    wrong = quantize_state(optax.sgd(0.1, momentum=0.9), unsigned=lambda path: True)
    state = wrong.update(GRADS[0], wrong.init(PARAMS))[1]
    np.testing.assert_array_equal(state[0].trace["w"].dequantize() == 0, GRADS[0]["w"] <= 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_updates_are_close_to_those_with_floats(bits, plain):
    exact, _ = run(optax.adamw(0.01), PARAMS, GRADS)
    got, state = plain[bits]
    np.testing.assert_array_equal(got["b"], exact["b"])  # left as it is
    moved = np.asarray(exact["w"] - PARAMS["w"])
    # Root mean square; measured 1.0% and 11%.
    assert off(np.asarray(got["w"] - PARAMS["w"]), moved) < (0.02 if bits == 8 else 0.2)
    assert (np.asarray(state[0].nu["w"].dequantize()) > 0).all()


def test_other_dtypes_and_zero_gradients_stay():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = quantize_state(optax.adam(0.01))
    zeros = jax.tree.map(jnp.zeros_like, params)
    got, state = run(tx, params, [zeros, zeros])
    jax.tree.map(np.testing.assert_array_equal, got, params)
    moment = state[0].mu["w"]
    assert moment.dtype == jnp.float32  # in which a step computes
    assert moment.scales.dtype == jnp.float32
    assert not any(x.dequantize().any() for x in quantized_leaves(state))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_numbers_of_float32_are_stored_as_smaller_ones_are(bits):
    tx = quantize_state(optax.scale_by_rms(0.5), bits)
    grads = {"w": jnp.linspace(0.1, 1.9, 64 * 256).reshape(64, 256)}
    update = jax.jit(tx.update)
    _, small = update(grads, tx.init(grads))
    _, large = update(jax.tree.map(lambda x: x * 2.0**63, grads), tx.init(grads))
    stored = [state.nu["w"].dequantize() for state in (small, large)]
    np.testing.assert_array_equal(stored[1] / 2.0**126, stored[0])


def rounding_to_zero(x):
    """A naive signed 8-bit code: the nearest of even steps, of which one is zero."""
    scale = jnp.abs(x).max(axis=-1, keepdims=True) / 127
    return jnp.round(x / scale) * scale


def test_a_tiny_second_moment_beside_a_large_one_does_not_become_zero():
    """Where it does, the next update is a first moment over eps, or a square root of little."""
    sizes = 10.0 ** -jnp.arange(0, 8, 8 / 512)  # of one row, from 1 to 1e-8
    steady = [jnp.tile(sizes, (16, 1))] * 10
    largest = {}
    for bits in (8, 4):
        _, state = run(tx := quantize_state(optax.scale_by_adam(), bits), steady[0], steady)
        updates, _ = tx.update(steady[0] * 0, state)
        largest[bits] = jnp.abs(updates).max()
    adam = optax.scale_by_adam()
    state = run(adam, steady[0], steady)[1]
    exact = jnp.abs(adam.update(steady[0] * 0, state)[0]).max()
    state = state._replace(nu=rounding_to_zero(state.nu))
    naive = jnp.abs(adam.update(steady[0] * 0, state)[0]).max()
    assert exact < 1
    # A second moment may be too large, never too small by more than its code.
    assert max(largest.values()) < 2
    assert naive > 1000


# What is compiled.


def compiled(inner, donate=(1,)):
    tx = quantize_state(inner)
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    return state, jax.jit(tx.update, donate_argnums=donate).lower(params, state, params).compile()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("inner", [optax.adamw(0.1), optax.sgd(0.1, momentum=0.9)])
def test_no_float_moment_outlives_a_step(inner):
    state, program = compiled(inner)
    floats = 4 * 1024 * 1024
    assert tree_bytes(state) < 0.51 * floats  # two moments of one byte and 1/64
    memory = program.memory_analysis()
    # Buffers of a few bytes, as counters and the pointers of the outputs, are padded.
    room = 1024
    assert memory.argument_size_in_bytes - (2 * floats + tree_bytes(state)) < room
    assert memory.output_size_in_bytes - (floats + tree_bytes(state)) < room
    # Nothing of the state is held twice.
    assert memory.alias_size_in_bytes >= tree_bytes(state)


@pytest.mark.usefixtures("optimized")
def test_no_code_is_looked_up():
    for bits in (8, 4):
        tx = quantize_state(optax.adamw(0.1), bits)
        state = jax.eval_shape(tx.init, PARAMS)
        program = jax.jit(tx.update).lower(PARAMS, state, PARAMS).compile().as_text()
        assert not re.search(r"\b(gather|scatter|sort|dynamic-slice)\(", program)


# Where JAX carries it.


def assert_close(got, expected):
    """Params to float32's rounding; codes to a step of one where a middle is near."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[0], expected[0])
    for a, b in zip(quantized_leaves(got[1]), quantized_leaves(expected[1]), strict=True):
        apart = np.abs(np.asarray(a.codes, int) - np.asarray(b.codes, int))
        assert apart.max() <= 1
        assert apart.mean() < 1e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_carried_by_a_scan_and_donated(bits, plain):
    tx = quantize_state(optax.adamw(0.01), bits)

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry, grads):
        return jax.lax.scan(step, carry, grads)[0]

    carry = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    got = train(carry, jax.tree.map(lambda *x: jnp.stack(x), *GRADS))
    assert all(x.is_deleted() for x in jax.tree.leaves(carry))
    assert_close(got, plain[bits])


def test_vmap_over_layers_gives_each_layer_its_own():
    """As an update layer by layer has it: `init` mapped over a stack, one layer read at a time."""
    tx = quantize_state(optax.adam(0.01))
    stack, grads = normal(0, 3, 16, 512), normal(1, 3, 16, 512)
    state = jax.jit(jax.vmap(tx.init))(stack)
    assert state[0].mu.codes.shape == (3, 16, 512)
    assert state[0].mu.scales.shape == (3, 16, 2)
    updates, new = jax.jit(jax.vmap(tx.update))(grads, state, stack)
    update = jax.jit(tx.update)
    for i in range(3):
        one, own = update(grads[i], jax.tree.map(lambda x: x[i], state), stack[i])  # noqa: B023
        np.testing.assert_allclose(updates[i], one, atol=1e-8)
        there = jax.tree.map(lambda x: x[i], new)  # noqa: B023
        assert jax.tree.structure(there) == jax.tree.structure(own)
        assert_close((one, there), (one, own))


SPECS = [P("data", "fsdp"), P(None, ("data", "fsdp"))]


@pytest.mark.parametrize(
    ("axis_type", "spec", "bits"),
    [
        (AxisType.Auto, SPECS[0], 8),
        (AxisType.Explicit, SPECS[0], 8),
        (AxisType.Explicit, SPECS[1], 4),
    ],
)
def test_sharded_state_is_the_unsharded_one_and_sharded_as_the_params(spec, bits, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    # 2,048 are 8 blocks, which divide over 8 devices; 520 are 3, one of them short.
    params = {str(n): normal(n, 8, n) for n in (2048, 520)}
    grads = [jax.tree.map(lambda x: normal(i, *x.shape), params) for i in range(2)]  # noqa: B023
    tx = quantize_state(optax.adam(0.01), bits)
    expected = run(tx, params, grads)
    shardings = {name: NamedSharding(mesh, spec) for name in params}
    wanted = state_shardings(tx, params, shardings)
    # Codes as the params where pairs of them divide; scales where blocks do.
    moments, split = wanted[0].mu, np.prod([mesh.shape[a] for a in np.atleast_1d(spec[1])])
    for n in (2048, 520):
        moment = moments[str(n)]
        pairs, blocks = n * bits // 8, -(-n // (256 if bits == 8 else 128))
        assert moment.codes.spec == P(spec[0], spec[1] if pairs % split == 0 else None)
        assert moment.scales.spec == P(spec[0], spec[1] if blocks % split == 0 else None)
    placed = jax.device_put(params, shardings)
    state = jax.jit(tx.init, out_shardings=wanted)(placed)
    at = {} if axis_type is AxisType.Explicit else {"out_shardings": (shardings, wanted)}
    update = jax.jit(tx.update, **at)
    for grad in grads:
        updates, state = update(jax.device_put(grad, shardings), state, placed)
        placed = optax.apply_updates(placed, updates)
    assert_close((placed, state), expected)
    stayed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)
    assert all(jax.tree.leaves(stayed))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_checkpoint_brings_it_back_bit_for_bit(bits, tmp_path, plain):
    state = plain[bits][1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        back = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.Param(jax.random.normal(rngs.params(), (2, 64, 64)) / 8)
        self.head = nnx.Linear(64, 128, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers[...]:
            x = jnp.tanh(x @ layer)
        return self.head(x)


STACKED = GaLoreDimensionNumbers(-2, -1)
IN_NNX = {
    "8 bits": quantize_state(optax.adamw(0.01)),
    "in galore": galore(
        8, quantize_state(optax.adamw(0.01), 4, min_size=256), subspace="svd", update_proj_gap=2,
        projection_bits=4, weight_dimension_numbers=STACKED,
    ),
    # With floats: the matrices of a stack, and the bases of both sides, were refused alike.
    "galore on both sides": galore(
        8, optax.adamw(0.01), side="both", subspace="svd", weight_dimension_numbers=STACKED
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_NNX)
def test_nnx_optimizer_takes_it(name):
    @nnx.jit
    def create():
        model = Stack(nnx.Rngs(0))
        return model, nnx.Optimizer(model, IN_NNX[name], wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x):
        def mean_square(model):
            return jnp.mean((model(x) - x[:, :1]) ** 2)

        value, grads = nnx.value_and_grad(mean_square)(model)
        optimizer.update(model, grads)
        return value

    model, optimizer = create()
    losses = [float(train_step(model, optimizer, normal(0, 32, 64))) for _ in range(4)]
    assert losses[3] < losses[2] < losses[1] < losses[0]


# Every optimizer.

ONE = {"w": FEW["w"]}
# Others run outside of jit, where most operations are compiled for another optimizer already.
WITH_LOOPS = {"lbfgs", "scale_by_lbfgs", "galore", "scale_by_galore", "muon", "sophia"}


def descend(tx, name, steps):
    def step(params, state):
        value, grads = jax.value_and_grad(distance)(params)
        updates, state = tx.update(grads, state, params, **arguments(name, value))
        return optax.apply_updates(params, updates), state

    params, state = ONE, tx.init(ONE)
    step = jax.jit(step) if name in WITH_LOOPS else step
    for _ in range(steps):
        params, new = step(params, state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        state = new
    floats = jax.tree.leaves((params, dequantized(state)))
    assert all(jnp.isfinite(x).all() for x in floats)
    return params, state


def distance(params):
    return jnp.sum((params["w"] - TARGET["w"]) ** 2) / 2


@pytest.mark.filterwarnings("ignore:quantize_state stores")
@pytest.mark.parametrize("name", INNERS)
def test_any_optimizer_runs_in_it(name):
    descend(quantize_state(INNERS[name], min_size=8), name, steps=2)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adan", "lion"])
def test_several_run_in_it_within_galore(name):
    inner = quantize_state(INNERS[name], min_size=8)
    tx = galore(4, inner, update_proj_gap=2, subspace="svd")
    params, state = descend(tx, name, steps=3)  # the third with a refresh
    assert quantized_leaves(state.inner)
    assert distance(params) < distance(ONE)


# Moments of few bits when the subspace changes.


@pytest.mark.parametrize(
    ("moments", "bits"), [("rotate", 8), ("rotate", 4), ("keep", 8), ("reset", 8)]
)
def test_moments_are_carried_over_as_those_with_floats_are(moments, bits):
    """The same step from the same state, with a refresh in it."""
    options = dict(update_proj_gap=2, subspace="svd", moments=moments)
    inner = optax.scale_by_adam()
    few = galore(8, quantize_state(inner, bits, min_size=256), **options)
    floats = galore(8, inner, **options)
    state, update = jax.jit(few.init)(params := normal(0, 32, 300)), jax.jit(few.update)
    for i in range(1, 3):
        _, state = update(normal(i, 32, 300), state, params)
    assert len(quantized_leaves(state)) == 2
    _, got = update(normal(3, 32, 300), state, params)
    _, exact = jax.jit(floats.update)(
        normal(3, 32, 300), state._replace(inner=dequantized(state.inner)), params
    )
    np.testing.assert_allclose(got.bases, exact.bases, atol=1e-6)
    assert not np.allclose(got.bases, state.bases, atol=0.1)
    for name in ("mu", "nu"):
        a = np.asarray(getattr(got.inner, name).dequantize())
        b = np.asarray(getattr(exact.inner, name))
        # Stored twice: when turned and after the step. An eighth of the largest in 4 bits, where
        # the squares from 49/64 to 1 are the widest gap; an 0.7th of a percent in 8.
        gap = {8: 0.0071, 4: 0.13 if name == "mu" else 0.25}[bits]
        assert np.abs(a - b).max() <= 2 * gap * np.abs(b).max()
        assert off(a, b) < (0.02 if bits == 8 else 0.25)


def test_an_inner_that_remembers_the_params_is_refused_as_it_is_with_floats():
    inner = optax.contrib.schedule_free_adamw(0.1)
    params = normal(0, 64, 128)
    for quantized in (quantize_state(inner), quantize_state(inner, min_size=8)):
        with pytest.raises(ValueError, match=r"inner.*remembers the params.*moments="):
            galore(8, quantized).init(params)


# What an error of rounding would ruin.

SECOND_MOMENTS = {
    "yogi": (optax.yogi(1e-2), "[0].nu"),
    "simplified_ademamix": (optax.contrib.simplified_ademamix(1e-3), "[0].n"),
    "prodigy": (optax.contrib.prodigy(1.0), ".exp_avg_sq"),
    "dadapt_adamw": (optax.contrib.dadapt_adamw(1.0), ".exp_avg_sq"),
    "momo_adam": (optax.contrib.momo_adam(1e-2), ".exp_avg_sq"),
}


@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_in_4_bits_what_an_update_divides_by_never_becomes_zero(name):
    tx, path = SECOND_MOMENTS[name]
    sizes = 10.0 ** -jax.random.uniform(jax.random.key(5), (16, 512), maxval=3.0)
    grads = [sizes * (1 + normal(i, 16, 512)) for i in range(20)]

    def largest(tx):
        tx = optax.with_extra_args_support(tx)
        step = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))
        params, updates = jnp.zeros((16, 512)), []
        state = tx.init(params)
        for grad in grads:
            update, state = step(grad, state, params)
            params = params + update
            updates.append(jnp.max(jnp.abs(update)))
        return float(max(updates))

    with pytest.warns(UserWarning, match=f"{re.escape(path)}.* in 8 bits: the update may divide"):
        got = largest(quantize_state(tx, 4))
    assert got < 100 * largest(tx)  # a division by zero made it a million times as large


def test_what_cannot_be_traced_is_held_in_8_bits_unless_told():
    def needs(updates, state, params=None, *, mine):
        return jax.tree.map(lambda u: u * mine, updates), state

    own = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), needs)
    inner = optax.chain(optax.scale_by_adam(), own)
    params = normal(0, 16, 512)
    with pytest.warns(UserWarning, match="in 8 bits"):
        state = quantize_state(inner, 4).init(params)
    assert [x.code.bits for x in quantized_leaves(state)] == [8, 8]
    state = quantize_state(inner, 4, unsigned=lambda path: "nu" in path).init(params)
    assert [x.code.bits for x in quantized_leaves(state)] == [4, 4]


@pytest.mark.filterwarnings("ignore:quantize_state stores")  # one of two is matched
@pytest.mark.parametrize("bits", [8, 4])
def test_a_root_of_a_difference_of_averages_stays_a_number(bits):
    tx, mean = quantize_state(optax.rmsprop(1e-3, centered=True), bits), normal(0, 16, 512)
    with pytest.warns(UserWarning, match=r"\[0\].nu as floats: the update takes a root"):
        _, state = run(tx, mean, [mean + 0.1 * normal(i, 16, 512) for i in range(20)])
    updates, _ = tx.update(mean, state)
    assert jnp.isfinite(updates).all()


def test_a_state_with_a_random_key_is_held_in_few_bits():
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(1e-2))
    tx, params = quantize_state(noisy), normal(0, 16, 512)
    state = tx.init(params)
    assert len(quantized_leaves(state)) == 2
    updates, _ = tx.update(params, state, params)
    assert jnp.isfinite(updates).all()


def test_a_state_that_is_in_few_bits_already_is_refused():
    for inner in (
        quantize_state(optax.adam(1e-2)),
        galore(8, optax.adam(1e-2), projection_bits=4),
    ):
        with pytest.raises(ValueError, match="inner: its state is quantized already"):
            quantize_state(inner).init(normal(0, 512, 1024))


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bits=2), "bits=2 is unknown; choose one of 8, 4"),
        (dict(bits=None), "bits=None is unknown; choose one of 8, 4"),
        (dict(bits=[8]), r"bits=\[8\] is unknown"),
        (dict(bits=jnp.array(8)), "bits=.* under optax.inject_hyperparams name it in static_args"),
        (dict(min_size=-1), "min_size=-1 must be an integer of at least 0"),
        (dict(min_size=0.5), "min_size=0.5 must be an integer"),
        (dict(min_size=True), "min_size=True must be an integer"),
        (dict(unsigned="nu"), "unsigned='nu' is not a function"),
        (dict(inner=optax.adam), "inner=.* is not an optax.GradientTransformation; give one, such"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_state(**dict(inner=optax.adam(0.1)) | arguments)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights_are_updated_without_galore_as_their_values_are(bits):
    weights = quantize_weights({"w": normal(0, 64, 256), "b": normal(1, 8)}, bits=bits)
    grads = {"w": normal(2, 64, 256), "b": normal(3, 8)}
    tx = adamw8bit(0.01, weight_decay=0.1)
    updates, state = jax.jit(tx.update)(grads, tx.init(weights), weights)
    floats = dequantized(weights)
    expected, same = jax.jit(tx.update)(grads, tx.init(floats), floats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state, same)


def test_a_warning_is_given_once_and_not_at_each_eager_update():
    inner = quantize_state(optax.rmsprop(0.1, centered=True), min_size=1)
    tx, params = galore(4, inner, moments="reset", subspace="random"), {"w": normal(0, 16, 32)}
    with warnings.catch_warnings(record=True, action="always") as caught:
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(params, state, params)
    texts = [str(w.message) for w in caught]
    assert any("as floats" in text for text in texts)
    assert len({*texts}) == len(texts)
