"""What the GPU's kernel computes, interpreted, is what XLA computes: codes equal bit for bit."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import apply_updates, product, quantize_state, quantize_weights, value_and_grad
from galore_optax.quantization import elementwise, weights
from galore_optax.quantization.array import dequantized, is_quantized, quantize
from galore_optax.quantization.codes import Affine
from galore_optax.quantization.kernel import in_one_kernel
from galore_optax.quantization.product import fits_product, kernel_product

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
# Rows of whole blocks, with a shorter last block, of less than a block, and of an odd length.
SHAPES = {"blocks": (2, 16, 512), "ragged": (8, 1300), "narrow": (64, 200), "odd": (40, 257)}


def tree(dtype=np.float32):
    return {k: jnp.asarray(RNG.standard_normal(s), dtype) for k, s in SHAPES.items()}


@pytest.fixture(autouse=True)
def each_test_draws_the_same_numbers_whichever_ran_before():
    RNG.bit_generator.state = START


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Has a CPU run what is lowered for an NVIDIA GPU, with kernels interpreted."""
    kernels = []

    def counted(*args, **kwargs):
        kernels.append(args)
        return in_one_kernel(*args, **kwargs, interpret=True)

    monkeypatch.setattr(elementwise, "on_one_gpu", lambda kernel, _, *args: kernel(*args))
    for module in (elementwise, weights):
        monkeypatch.setattr(module, "in_one_kernel", counted)
    return kernels


@contextlib.contextmanager
def on_a_cpu(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(elementwise, "on_one_gpu", lambda _, otherwise, *args: otherwise(*args))
        yield


def same(got, expected):
    """Codes are equal; floats, which compilers add up in other ways, nearly."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if a.dtype == jnp.uint8:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(
                *(np.asarray(x, np.float32) for x in (a, b)), rtol=2e-6, atol=1e-7
            )


INNERS = {
    "adamw": optax.adamw(optax.cosine_decay_schedule(0.01, 9), weight_decay=0.1),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01, momentum=0.9),
    "adan": optax.adan(0.01),  # chooses by a scalar, keeps the last gradient
}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        pytest.param(name, bits, marks=[pytest.mark.slow] * ((bits == 4) != (name == "adan")))
        for name in INNERS
        for bits in (8, 4)
    ],
)
def test_a_state_is_updated_in_one_kernel_for_each_leaf(name, bits, on_a_gpu, monkeypatch):
    tx = quantize_state(INNERS[name], bits)
    params, gradients = tree(), [tree(), tree()]
    state = tx.init(params)
    for gradient in gradients:
        del on_a_gpu[:]
        got = tx.update(gradient, state, params)
        assert len(on_a_gpu) == len(SHAPES)
        with on_a_cpu(monkeypatch):
            expected = tx.update(gradient, state, params)
        same(got, expected)
        state = got[1]


def _of_arrays(function, *arrays, **_):
    return function(*arrays)


def test_nan_stays_where_a_kernels_maximum_drops_it(monkeypatch):
    # In Triton the maximum of NaN and -1 is -1: clipped, NaN in a gradient was a number.
    x = jnp.array([jnp.nan, -3.0, 0.5, 3.0])
    traced = jax.make_jaxpr(lambda x: (jnp.clip(x, -1, 1), jax.lax.clamp(-1.0, x, 1.0)))(x).jaxpr
    in_triton = {
        jax.lax.max_p: jnp.fmax,
        jax.lax.min_p: jnp.fmin,
        jax.lax.clamp_p: lambda low, x, high: jnp.fmin(jnp.fmax(low, x), high),
    }
    for primitive, function in in_triton.items():
        monkeypatch.setattr(primitive, "bind", partial(_of_arrays, function))
    values = elementwise._Values(zip(traced.invars, [x], strict=True))
    values.evaluate(traced.eqns, x.shape)
    for result in map(values.of, traced.outvars):
        np.testing.assert_array_equal(result, [jnp.nan, -1, 0.5, 1])


def test_gradients_in_bfloat16_get_updates_in_bfloat16(on_a_gpu):
    tx, params = quantize_state(optax.adam(0.01)), tree(jnp.bfloat16)
    updates, state = tx.update(tree(jnp.bfloat16), tx.init(params), params)
    assert len(on_a_gpu) == len(SHAPES)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    sums = [jax.tree.map(jnp.sum, dequantized(state[0].nu))]
    for _ in range(10):  # moments decay in float32: in bfloat16 0.1% less is nothing less
        _, state = tx.update(zeros, state, params)
    sums.append(jax.tree.map(jnp.sum, dequantized(state[0].nu)))
    for before, after in zip(*map(jax.tree.leaves, sums), strict=True):
        np.testing.assert_allclose(after / before, 0.999**10, rtol=2e-4)


def test_an_update_that_triton_lacks_is_not_given_to_it(on_a_gpu):
    def update(updates, state, params=None):
        new = jax.tree.map(lambda m, g: 0.9 * m + jax.lax.erf(g), state, updates)
        return new, new

    tx = quantize_state(optax.GradientTransformation(optax.tree.zeros_like, update))
    tx.update(tree(), tx.init(tree()))
    assert not on_a_gpu


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_added_to_and_rounded_in_one_kernel(bits, key, on_a_gpu, monkeypatch):
    params = quantize_weights(tree(), bits=bits)
    updates = jax.tree.map(lambda x: 0.01 * x, tree())
    updates["blocks"] = updates["blocks"].at[0].set(0)
    got = apply_updates(params, updates, key)
    kernels = len(on_a_gpu)
    with on_a_cpu(monkeypatch):
        expected = apply_updates(params, updates, key)
    same(got, expected)
    assert kernels == sum(x.axis == -1 for x in jax.tree.leaves(params, is_leaf=is_quantized))
    np.testing.assert_array_equal(got["blocks"].codes[0], params["blocks"].codes[0])


def test_it_is_one_custom_call_in_a_program_for_an_nvidia_gpu():
    tx = quantize_state(optax.adam(0.01))
    params = {"w": jax.ShapeDtypeStruct((1024, 1000), jnp.float32)}
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_with_codes_is_that_with_the_matrix(bits, transposed):
    matrix = jnp.asarray(RNG.standard_normal((200, 700)), jnp.bfloat16)
    weight = quantize(matrix, Affine(bits))
    rows = jnp.asarray(RNG.standard_normal((50, 700 if transposed else 200)), jnp.bfloat16)
    assert fits_product(rows, weight)
    got = kernel_product(rows, weight, transposed=transposed, interpret=True)
    wide = weight.dequantize(jnp.float32).astype(jnp.bfloat16).astype(jnp.float32)
    expected = rows.astype(jnp.float32) @ (wide.T if transposed else wide)
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=0.01, atol=0.3)
    off = np.linalg.norm(got.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert off < 0.004  # one rounding to bfloat16


def test_a_product_of_few_rows_has_the_gradients_of_the_matrix():
    weight = quantize(jnp.asarray(RNG.standard_normal((128, 256)), jnp.bfloat16), Affine(8))
    rows = jnp.asarray(RNG.standard_normal((32, 128)), jnp.bfloat16)

    def loss(params, times):
        made = times(params["rows"], params["w"])
        return jnp.sum(jnp.square(made.astype(jnp.float32)))

    params = {"rows": rows, "w": weight}
    _, got = value_and_grad(partial(loss, times=product))(params)
    _, expected = value_and_grad(
        partial(loss, times=lambda rows, weight: rows @ weight.dequantize())
    )(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)
