"""NF4 against what bitsandbytes wrote (fixtures/make_nf4.py), and double quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import FIXTURES

from galore_optax.quantization.array import is_quantized, quantize_nf4, stored_like
from galore_optax.quantization.codes import NF4

THEIRS = dict(np.load(FIXTURES / "nf4.npz"))
WEIGHT = jnp.asarray(THEIRS["weight"].T)  # ours is (in, out)


def codes_of(weight) -> np.ndarray:
    """Unpacked, (in, out): the first of two in a byte's lower half."""
    packed = np.asarray(quantize_nf4(weight).codes)
    return np.stack([packed & 15, packed >> 4], axis=1).reshape(weight.shape)


def test_codes_scales_and_values_are_bitsandbytes():
    held = quantize_nf4(WEIGHT, double=False)
    np.testing.assert_array_equal(codes_of(WEIGHT).T, THEIRS["codes"])
    np.testing.assert_array_equal(held.scales.T, THEIRS["scales"])
    # A product of two float32 numbers.
    np.testing.assert_allclose(held.dequantize().T, THEIRS["values"], rtol=1e-6)


def test_double_quantization_loses_no_more_than_bitsandbytes_does():
    values = np.asarray(quantize_nf4(WEIGHT).dequantize()).T
    ours, theirs = (
        np.sqrt(np.mean((x - THEIRS["values"]) ** 2)) for x in (values, THEIRS["double_values"])
    )
    assert 0 < ours < theirs
    # Next to the error of the 4-bit codes it is nothing.
    assert ours < 0.05 * np.sqrt(np.mean((THEIRS["values"] - THEIRS["weight"]) ** 2))


@pytest.mark.parametrize("double", [False, True])
def test_a_layer_of_a_stack_is_that_layer(double):
    stack = jax.random.normal(jax.random.key(0), (3, 100, 40))  # the last block is shorter
    held = quantize_nf4(stack, double=double)
    assert held.shape == stack.shape
    assert is_quantized(held.scales) is double
    layers = jax.lax.map(lambda layer: layer.dequantize(), held)
    # A product and a sum, rounded once or twice.
    np.testing.assert_allclose(layers, held.dequantize(), rtol=1e-6)
    for i in range(3):
        alone = quantize_nf4(stack[i], double=double).dequantize()
        np.testing.assert_allclose(layers[i], alone, rtol=1e-6)


def test_what_is_stored_like_it_has_its_structure():
    held = quantize_nf4(WEIGHT.astype(jnp.bfloat16))
    again = stored_like(2 * WEIGHT, held)
    assert jax.tree.structure(again) == jax.tree.structure(held)
    assert again.dequantize().dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.codes, quantize_nf4(WEIGHT).codes)
    np.testing.assert_array_equal(stored_like(0 * WEIGHT, held).dequantize(), 0)


def test_it_does_not_round_at_random():
    with pytest.raises(ValueError, match="only affine codes round stochastically"):
        NF4().encode(jnp.ones((1, 4)), -1, jax.random.key(0))
