"""What the GPU's kernel adds to weights, interpreted, is what XLA adds in several passes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
    GaLoreDimensionNumbers,
    apply_updates,
    galore,
    quantize_weights,
    subspace_parts,
    unstacked,
    without_refresh,
)
from galore_optax.projection import factored
from galore_optax.projection.factored import FactoredUpdate
from galore_optax.quantization.array import is_quantized, quantize
from galore_optax.quantization.codes import Affine
from galore_optax.quantization.product_added import Factors, add_product, fits_sum
from galore_optax.quantization.weights import rounded_sum

SEED = jnp.array([1, 2], jnp.uint32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


# Where a product and what codes stand for are exact, no compiler can round them in another way.


def sixteenths(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape) / 16, jnp.bfloat16)


def weight(shape, block):
    numbers = np.random.default_rng(0).integers(0, 256, shape)
    numbers[..., ::64], numbers[..., 1::64] = 0, 255  # of each block
    plain = jnp.asarray(numbers / 64, jnp.bfloat16)
    return plain if block is None else quantize(plain, Affine(8), block=block)


@pytest.mark.parametrize("block", [256, 64, None])
@pytest.mark.parametrize(
    ("shape", "rank", "transposed"),
    [((128, 512), 64, False), ((2, 70, 600), 40, False), ((2, 70, 300), 40, True)],
)
def test_a_product_is_added_bit_for_bit_as_one_that_is_stored(shape, rank, transposed, block):
    *batch, n, m = shape
    right = (m, rank) if transposed else (rank, m)
    left, right = sixteenths(1, *batch, n, rank), sixteenths(2, *batch, *right)
    left = left.at[..., :3, :].set(0)  # rows of blocks that stay
    factors, before = Factors(left, right, None, transposed), weight(shape, block)
    assert fits_sum(before, factors, SEED)
    got = add_product(before, factors, SEED, leaf=5, interpret=True)
    product = left @ (jnp.swapaxes(right, -1, -2) if transposed else right)
    expected = rounded_sum(before, product, SEED, 5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    old, new = (x.codes if is_quantized(x) else x for x in (before, got))
    np.testing.assert_array_equal(new[..., :3, :], old[..., :3, :])
    assert (new[..., 3:, :] != old[..., 3:, :]).mean() > 0.1


def test_decay_is_that_of_each_matrix():
    shape, slopes = (2, 70, 300), jnp.array([-0.1, 0.2])
    left, right = jnp.zeros((2, 70, 32), jnp.bfloat16), jnp.zeros((2, 32, 300), jnp.bfloat16)
    for block in (256, None):
        before = normal(0, *shape)
        before = quantize(before, Affine(8), block=block) if block else before
        got = add_product(before, Factors(left, right, slopes, False), SEED, interpret=True)
        old, new = (x.dequantize() if block else x for x in (before, got))
        old, new = (x.astype(jnp.float32) for x in (old, new))
        np.testing.assert_allclose(new[0], 0.9 * old[0], atol=0.05)
        np.testing.assert_allclose(new[1], 1.2 * old[1], atol=0.05)
        assert abs(jnp.mean(new[0] - 0.9 * old[0])) < 2e-4


def test_what_it_does_not_take_is_left_to_xla():
    factors = Factors(normal(1, 64, 32), normal(2, 32, 300), None, False)
    for other, seed in [
        (normal(0, 64, 300), None),  # XLA adds while it makes the product
        (normal(0, 64, 300).astype(jnp.float32), SEED),
        (quantize(normal(0, 64, 300), Affine(4), block=256), SEED),
        (quantize(normal(0, 64, 300), Affine(8), block=512), SEED),
        (quantize(normal(0, 64, 300), Affine(8), block=64, axis=-2), SEED),
    ]:
        assert not fits_sum(other, factors, seed)
    wide = factors._replace(left=factors.left.astype(jnp.float32))
    assert not fits_sum(normal(0, 64, 300), wide, SEED)


PARAMS = {
    "stack": normal(0, 2, 72, 160),
    "tall": normal(1, 300, 264),
    "heads": normal(2, 96, 4, 20),
    "norm": normal(3, 96),
}
NUMBERS = {
    "stack": GaLoreDimensionNumbers(1, 2),
    "tall": GaLoreDimensionNumbers(),
    "heads": GaLoreDimensionNumbers(0, (1, 2)),
    "norm": None,
}
INNERS = {
    "decay": optax.adamw(0.1, weight_decay=0.5),
    "separate matrices": optax.chain(
        optax.clip_by_block_rms(1.0), optax.add_decayed_weights(0.5), optax.scale(-0.1)
    ),
}


@pytest.mark.parametrize(
    ("inner", "side", "unstack", "kernels"),
    [
        ("decay", "smaller", None, 2),  # heads have three axes
        pytest.param("separate matrices", "larger", None, 2, marks=pytest.mark.slow),
        pytest.param("decay", "larger", 2, 1, marks=pytest.mark.slow),
        ("decay", "both", None, 0),
    ],
)
def test_factored_updates_change_weights_as_arrays_do(inner, side, unstack, kernels, monkeypatch):
    numbers = NUMBERS | ({"stack": GaLoreDimensionNumbers()} if unstack else {})
    tx = galore(16, INNERS[inner], side=side, weight_dimension_numbers=numbers)
    tx = unstacked(tx, lambda params: {k: {"stack": unstack, "norm": 1}.get(k) for k in params})
    if unstack:
        tx = without_refresh(tx)
    parts, params = subspace_parts(tx), quantize_weights(PARAMS, lambda path, _: "tall" in path)
    gradient = jax.tree.map(lambda x: 0.1 * x + 0.01, PARAMS)
    monkeypatch.setattr("galore_optax.inner._warn", lambda text: None)
    state = jax.jit(tx.init)(params)
    small = jax.jit(parts.project)(gradient, state)
    kinds, made = [], []

    def new(factored):
        updates, _ = parts.update_projected(small, state, params, factored=factored)
        kinds.append({k for k, x in updates.items() if isinstance(x, FactoredUpdate)})
        return apply_updates(params, updates, jax.random.key(0))

    def interpreted(*args, **kwargs):
        made.append(args)
        return add_product(*args, **kwargs, interpret=True)

    expected, same = (jax.jit(new, static_argnums=0)(x) for x in (False, True))
    assert kinds == [set(), {*PARAMS} - {"norm", *(["stack"] if unstack else [])}]
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    monkeypatch.setattr(factored, "add_product", interpreted)
    monkeypatch.setattr(factored, "on_one_gpu", lambda kernel, _, *args: kernel(*args))
    got = jax.jit(lambda: new(True))()
    assert len(made) == kernels
    for k, x in got.items():
        a, b = (np.asarray(y.dequantize() if is_quantized(y) else y, np.float32)
                for y in (x, expected[k]))  # fmt: skip
        np.testing.assert_allclose(a, b, atol=0.04)
        assert np.linalg.norm(a - b) < 0.004 * np.linalg.norm(b)


def test_a_program_for_an_nvidia_gpu_adds_each_stack_in_one_kernel():
    tx = galore(16, optax.adamw(0.1, weight_decay=0.5), weight_dimension_numbers=NUMBERS)
    parts = subspace_parts(tx)

    def step(params, state, small):
        updates, state = parts.update_projected(small, state, params, factored=True)
        return apply_updates(params, updates, jax.random.key(0)), state

    state = jax.eval_shape(tx.init, PARAMS)
    given = PARAMS, state, jax.eval_shape(parts.project, PARAMS, state)
    text = jax.jit(step).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
