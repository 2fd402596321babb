"""Weights in 8 bits: computed with a layer at a time, and written back with the right mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_optax import (
    GaLoreDimensionNumbers,
    QuantizedArray,
    apply_updates,
    galore_adamw,
    q_galore_adamw8bit,
    quantize_nf4,
    quantize_weights,
)
from galore_optax.adapters.base import product
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.quantization.codes import elements, random_bits
from galore_optax.quantization.weights import value_and_grad
from models.llama.config import LlamaConfig
from models.llama.model import Llama


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def step_of(weights: QuantizedArray) -> jax.Array:
    """The distance between two neighbouring values of the code, for each element."""
    one = jnp.ones_like(weights.codes)
    zero = jnp.zeros_like(weights.codes)
    up, down = (QuantizedArray(c, weights.scales, weights.offsets, *static(weights))
                for c in (one, zero))  # fmt: skip
    return up.dequantize() - down.dequantize()


def static(x: QuantizedArray) -> tuple:
    return x.code, x.block, x.axis, x.dtype, x.odd


PARAMS = {"w": normal(0, 64, 300), "stack": normal(1, 3, 64, 300), "norm": jnp.ones(300)}


def test_by_default_large_matrices_are_stored_in_8_bits():
    held = quantize_weights({**PARAMS, "small": normal(2, 4, 4)})
    assert {name for name, x in held.items() if is_quantized(x)} == {"w", "stack"}
    assert held["stack"].shape == (3, 64, 300)
    # A byte a weight, and a scale and an offset (8 bytes) for each of two blocks in a row.
    assert held["w"].nbytes == 64 * 300 + 64 * 2 * 8


@pytest.mark.parametrize(
    "which",
    [
        {"a": {"w": True}, "b": False},
        {"a": True, "b": False},
        lambda path, leaf: path == "['a']['w']" and leaf.ndim == 2,
    ],
    ids=["tree", "prefix", "function"],
)
def test_which_leaves_may_be_a_tree_a_prefix_or_a_function(which):
    held = quantize_weights({"a": {"w": normal(0, 8, 8)}, "b": normal(0, 64, 300)}, which)
    assert is_quantized(held["a"]["w"])
    assert not is_quantized(held["b"])


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="bits=3 is unknown; choose one of 8, 4"):
        quantize_weights(PARAMS, bits=3)


@pytest.mark.parametrize(
    "weights",
    [5 + jnp.abs(normal(0, 64, 300)), -5 - jnp.abs(normal(0, 64, 300)), jnp.full((64, 300), 0.3)],
    ids=["positive", "negative", "constant"],
)
def test_groups_of_one_sign_and_of_one_number_are_exact_to_half_a_step(weights):
    held = quantize_weights({"w": weights})["w"]
    error = jnp.abs(held.dequantize() - weights)
    # And the rounding of float32 sums of numbers up to 10.
    assert bool(jnp.all(error <= 0.5 * step_of(held) + 1e-6))


def loss(params, x):
    def layer(x, w):
        w = w.dequantize() if hasattr(w, "dequantize") else w
        return jnp.tanh(x @ w @ w.T / 300), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["stack"])
    w = params["w"].dequantize() if hasattr(params["w"], "dequantize") else params["w"]
    return jnp.sum((x @ w * params["norm"]) ** 2)


def test_the_gradient_is_that_with_respect_to_the_dequantized_weight():
    held, x = quantize_weights(PARAMS), normal(3, 5, 64)
    value, grads = jax.jit(value_and_grad(loss))(held, x)
    expected_value, expected = jax.value_and_grad(loss)(dequantized(held), x)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for name in PARAMS:
        # float32 sums, in another order
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spec", [P("data", "fsdp"), P(None, ("fsdp", "data")), P()])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_gradient_is_sharded_as_the_weight_under_explicit_axes(bits, spec):
    weight = jax.random.normal(jax.random.key(0), (64, 512))
    rows = jax.random.normal(jax.random.key(1), (16, 64))

    def loss(params):
        return jnp.sum(product(rows, params["w"]) ** 2)

    expected = value_and_grad(loss)(quantize_weights({"w": weight}, bits=bits))
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))  # explicit axes are its default
    with jax.set_mesh(mesh):
        weight = jax.device_put(weight, NamedSharding(mesh, spec))
        params = quantize_weights({"w": weight}, bits=bits)
        value, grads = jax.jit(value_and_grad(loss))(params)
        assert jax.typeof(grads["w"]) == jax.typeof(weight)
        new = jax.jit(apply_updates)(params, grads, jax.random.key(0))
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, params)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grads["w"], expected[1]["w"], rtol=1e-3, atol=1e-3)


def test_the_gradient_is_summed_over_the_devices_of_a_shard_map():
    params = quantize_weights({"w": jax.random.normal(jax.random.key(0), (64, 64))})
    rows = jax.random.normal(jax.random.key(1), (8, 64))

    def gradient(params, rows):
        return value_and_grad(lambda p: jnp.sum(product(rows, p["w"]) ** 2))(params)[1]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    summed = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(params, rows)
    expected = gradient(params, rows)
    np.testing.assert_allclose(summed["w"], expected["w"], rtol=1e-3, atol=1e-3)


def test_a_value_with_an_auxiliary_output_is_passed_on():
    held = quantize_weights(PARAMS)
    (_, aux), grads = value_and_grad(lambda p: (loss(p, normal(3, 5, 64)), "aux"), has_aux=True)(
        held
    )
    assert aux == "aux"
    assert grads["w"].shape == (64, 300)


def test_a_step_makes_no_float_copy_of_the_weights():
    layers, width = 16, 256
    held = jax.eval_shape(
        quantize_weights, {"w": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}
    )

    def objective(params, x):
        def layer(x, w):
            return jnp.tanh(product(x, w)), None

        return jnp.sum(jax.lax.scan(layer, x, params["w"])[0])

    def temporaries(function):
        compiled = jax.jit(function).lower(held, jax.ShapeDtypeStruct((8, width), jnp.float32))
        return compiled.compile().memory_analysis().temp_size_in_bytes

    matrix = 4 * width * width
    # Forward: a few matrices for the layer at hand. Backward: the gradient is an output, so a few
    # more, and the activations of 16 layers; a float copy would be 16 matrices.
    assert temporaries(objective) < 4 * matrix
    assert temporaries(value_and_grad(objective)) < 8 * matrix


def mean_of_sums(params, updates, draws: int):
    @jax.jit
    def one(key):
        return dequantized(apply_updates(params, updates, key))

    keys = jax.random.split(jax.random.key(0), draws)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape), one(keys[0]))
    for key in keys:
        total = jax.tree.map(
            jnp.add, total, jax.tree.map(lambda x: x.astype(jnp.float32), one(key))
        )
    return jax.tree.map(lambda x: x / draws, total)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_of_rounded_sums_is_the_sum(dtype):
    draws = 400
    held = quantize_weights({"w": normal(0, 32, 256).astype(dtype)})
    # A hundredth of a step: rounded to the nearest, nothing of it would arrive.
    updates = {"w": 2e-4 * jnp.abs(normal(1, 32, 256)) + 1e-4}
    before = held["w"].dequantize(jnp.float32)
    mean = mean_of_sums(held, updates, draws)["w"]
    # Over all elements: 8192 x 400 draws of half a step of 0.02 leave 6e-6 of deviation.
    moved = jnp.mean(mean - before)
    wanted = jnp.mean(updates["w"])
    atol = 5 * 0.5 * 0.025 / np.sqrt(mean.size * draws)
    if dtype == jnp.bfloat16:
        atol += 2e-5  # what is compared was rounded to bfloat16 when dequantized
    np.testing.assert_allclose(moved, wanted, atol=atol)


def test_random_bits_have_any_shape_and_no_pattern():
    for shape in [(), (1,), (5,), (3, 7), (2, 3, 5), (0, 4)]:
        bits = random_bits(jax.random.key(0), elements(shape))
        assert (bits.shape, bits.dtype) == (shape, jnp.uint32)
    bits = random_bits(jax.random.key(0), elements((64, 1001)))
    other = random_bits(jax.random.key(1), elements((64, 1001)))
    assert abs(np.corrcoef(np.ravel(bits), np.ravel(other))[0, 1]) < 0.02
    for bit in range(32):
        assert np.mean((np.asarray(bits) >> bit) & 1) == pytest.approx(0.5, abs=0.01)
    drawn = np.asarray(bits, np.float64) / 2**32
    # 64,000 numbers: means and correlations deviate by 0.004 or less.
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    for shifted in (drawn[:, 1:], drawn[:, 2:], np.roll(drawn, 1, axis=0)):
        first = drawn[:, : shifted.shape[1]]
        assert abs(np.corrcoef(first.ravel(), shifted.ravel())[0, 1]) < 0.02


def test_the_mean_of_rounded_bfloat16_sums_is_the_sum():
    weights = {"w": normal(0, 64, 64).astype(jnp.bfloat16)}
    updates = {"w": jnp.full((64, 64), 1e-4)}
    mean = mean_of_sums(weights, updates, 400)["w"]
    moved = mean - weights["w"].astype(jnp.float32)
    # Steps are 2^-7 of the number; a draw deviates by half of one at most.
    deviation = 0.5 * 2**-7 * jnp.abs(weights["w"].astype(jnp.float32)) / np.sqrt(400)
    assert bool(jnp.all(jnp.abs(moved - 1e-4) <= 6 * deviation + 1e-6))


def test_rounding_to_the_nearest_loses_small_updates():
    held = quantize_weights({"w": normal(0, 32, 256)})
    updates = {"w": jnp.full((32, 256), 1e-4)}
    # A constant update moves whole groups by their offset: but for one element of each.
    updates["w"] = updates["w"].at[:, 0].set(0).at[:, 1:].mul(jnp.sign(normal(2, 32, 255)))
    same = apply_updates(held, updates, None)["w"].codes == held["w"].codes
    assert float(jnp.mean(same)) > 0.99
    moved = apply_updates(held, updates, jax.random.key(0))["w"].codes != held["w"].codes
    assert float(jnp.mean(moved)) > 0.003


def test_groups_without_an_update_stay_bit_for_bit():
    for bits in (8, 4):
        held = quantize_weights({"w": normal(0, 32, 600)}, bits=bits)
        updates = {"w": jnp.zeros((32, 600)).at[3, 300].set(1.0)}
        new = apply_updates(held, updates, jax.random.key(0))["w"]
        same = np.asarray(new.dequantize() == held["w"].dequantize())
        assert same[np.arange(32) != 3].all()
        assert same[3, :256].all()
        assert same[3, 512:].all()
        assert not same[3, 256:512].all()


def test_what_is_not_finite_stays_so_in_bfloat16():
    weights = {"w": jnp.array([1.0, 1.0, 1.0], jnp.bfloat16)}
    updates = {"w": jnp.array([jnp.nan, jnp.inf, -jnp.inf])}
    new = apply_updates(weights, updates, jax.random.key(0))["w"]
    assert jnp.isnan(new[0])
    assert new[1:].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_weights_are_updated_as_optax_does(dtype):
    params, updates = {"w": normal(0, 4, 4).astype(dtype)}, {"w": 1e-3 * normal(1, 4, 4)}
    new = apply_updates(params, updates, jax.random.key(0))
    np.testing.assert_array_equal(new["w"], optax.apply_updates(params, updates)["w"])


def test_python_numbers_among_params_are_kept_and_updated_as_by_optax():
    params = quantize_weights({"w": jnp.ones((64, 64)), "scale": 1.5})
    assert params["scale"] == 1.5
    updates = {"w": jnp.ones((64, 64)), "scale": 0.25}
    assert apply_updates(params, updates, jax.random.key(0))["scale"] == 1.75
    with pytest.raises(ValueError, match=r"the leaf at \['scale'\], of shape \(\) and dtype float"):
        quantize_weights({"scale": 1.5}, True)


def test_the_same_key_repeats_the_rounding_and_another_does_not():
    held, updates = quantize_weights(PARAMS), jax.tree.map(lambda x: 0.01 * x, PARAMS)
    first, again, other = (apply_updates(held, updates, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first["w"].codes, again["w"].codes)
    assert bool(jnp.any(first["w"].codes != other["w"].codes))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_with_64_bit_numbers_enabled_weights_are_rounded_by_the_same_random_numbers(bits):
    w, update = {"w": normal(0, 4, 256)}, {"w": jnp.full((4, 256), 1e-3)}

    def rounded():
        params = {"w": w["w"].astype(jnp.bfloat16)}
        if bits < 16:
            params = quantize_weights(w, lambda *_: True, bits=bits)
        return apply_updates(params, update, jax.random.key(0))

    expected = rounded()
    with jax.enable_x64(True):
        found = rounded()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_with_64_bit_numbers_enabled_random_bits_are_the_same_32():
    expected = random_bits(jax.random.key(0), elements((4, 8)))
    with jax.enable_x64(True):
        found = random_bits(jax.random.key(0), elements((4, 8)))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_galore_takes_quantized_weights_for_what_they_stand_for():
    held, plain = quantize_weights(PARAMS), PARAMS
    numbers = {"w": GaLoreDimensionNumbers(), "stack": GaLoreDimensionNumbers(1, 2), "norm": None}
    tx = galore_adamw(1e-2, 8, weight_decay=0.1, weight_dimension_numbers=numbers)
    grads = jax.tree.map(lambda x: x + 1.0, plain)
    states = [tx.init(held), tx.init(dequantized(held))]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    results = [
        jax.jit(tx.update)(grads, state, params)[0]
        for state, params in zip(states, (held, dequantized(held)), strict=True)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_q_galore_fits_a_matrix_and_stochastic_rounding_is_what_makes_it():
    target, x = normal(0, 64, 256) / 8, normal(1, 512, 64)
    y = x @ target
    tx = q_galore_adamw8bit(0.01, 16, update_proj_gap=5, scale=1.0)

    def train(rounding: bool) -> float:
        params = quantize_weights({"w": jnp.zeros((64, 256)) + 1e-3 * normal(2, 64, 256)})
        state = tx.init(params)

        def objective(p):
            return jnp.mean((x @ p["w"].dequantize() - y) ** 2)

        @jax.jit
        def step(params, state, key):
            value, grads = value_and_grad(objective)(params)
            updates, state = tx.update(grads, state, params)
            return apply_updates(params, updates, key if rounding else None), state, value

        for i in range(120):
            params, state, value = step(params, state, jax.random.key(i))
        return float(value)

    start = float(jnp.mean(y**2))
    assert train(rounding=True) < 0.2 * start


def test_a_llama_computes_with_quantized_layers_as_with_their_values():
    config = LlamaConfig(
        vocab_size=64, width=64, mlp_width=96, layers=2, heads=4, kv_heads=2, max_length=32
    )
    graph, state = nnx.split(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(state)
    held = quantize_weights(params, lambda path, _: "attention'" in path or "mlp'" in path)
    assert sum(map(is_quantized, jax.tree.leaves(held, is_leaf=is_quantized))) == 7
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
    logits = nnx.merge(graph, held)(tokens)
    np.testing.assert_allclose(logits, nnx.merge(graph, dequantized(held))(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(which="w"), "which='w' is neither a function of path and leaf nor a tree of boo"),
        (dict(which={"w": 1, "b": False}), "which=.* is neither"),
        (dict(which=lambda path, leaf: True), r"which: the leaf at \['n'\], of shape \(\)"),
        (dict(block=3.5), "block=3.5 must be an integer of at least 1"),
        (dict(block=True), "block=True must be an integer"),
        (dict(params=quantize_weights({"w": jnp.ones((64, 256))})), "is already stored in 8 bits"),
    ],
)
def test_what_cannot_be_quantized_is_named(arguments, message):
    params = {"w": jnp.ones((64, 256)), "n": jnp.ones(())}
    with pytest.raises(ValueError, match=message):
        quantize_weights(**dict(params=params) | arguments)


def test_what_cannot_be_added_is_named():
    params = {"w": jnp.ones((64, 256))}
    with pytest.raises(ValueError, match="key=0 must be a key"):
        apply_updates(params, params, 0)
    with pytest.raises(ValueError, match=r"updates: the one at \['w'\] is a QuantizedArray"):
        apply_updates(params, quantize_weights(params), jax.random.key(0))
    frozen = {"w": quantize_nf4(params["w"])}
    with pytest.raises(ValueError, match=r"scales of the one at \['w'\] .*double=False"):
        apply_updates(frozen, params, None)


def test_a_group_that_is_touched_keeps_its_other_numbers_in_the_mean():
    x = jnp.tile(jnp.arange(256.0), (64, 1))
    params = quantize_weights({"w": x})
    updates = {"w": jnp.zeros((64, 256)).at[:, 3].set(1e-3)}
    add = jax.jit(lambda key: apply_updates(params, updates, key)["w"].dequantize() - x)
    moved = jnp.mean(jax.vmap(add)(jax.random.split(jax.random.key(0), 300)), (0, 1))
    # Rounded up by chance where the sum with a random number is rounded up: one in 2^17 each.
    np.testing.assert_allclose(jnp.delete(moved, 3), 0, atol=0)
    np.testing.assert_allclose(moved[3], 1e-3, atol=1e-3)
