"""`QuantizedArray`: numbers come back within their code's bound, wherever JAX carries them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from paths import FIXTURES

from galore_optax import QuantizedArray, quantize_nf4
from galore_optax.quantization.array import dequantized, quantize, stored_like
from galore_optax.quantization.codes import Affine, Dynamic, Table
from galore_optax.quantization.state import CODES

PUBLISHED = np.load(FIXTURES / "bitsandbytes.npz")

SIGNED = {"8-bit": (Dynamic(signed=True), 256), "4-bit": (CODES[4][0], 128)}
UNSIGNED = {"8-bit": (Dynamic(signed=False), 256), "4-bit": (CODES[4][1], 128)}
AFFINE = {"8-bit affine": (Affine(8), 256), "4-bit affine": (Affine(4), 256)}
SCALED = {f"{n}, signed": c for n, c in SIGNED.items()} | {
    f"{n}, unsigned": c for n, c in UNSIGNED.items()
}
ALL = SCALED | AFFINE
DTYPES = ["float16", "bfloat16", "float32", "float64"]
# Tiny ones, blocks that end short, and blocks along another axis than the last.
SHAPES = [(1,), (2, 300), (300, 3)]

KINDS = ["normal", "wide", "positive", "negative", "constant", "zeros", "denormal", "spike"]


def numbers(shape, kind, exponent, seed, dtype):
    """Finite numbers of a kind, about 10**exponent in size where the dtype has such."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape)
    size = 10.0**exponent
    if kind == "wide":
        x = x * 10.0 ** random.uniform(-30, 0, shape)
    elif kind == "positive":
        x = np.abs(x) + 1
    elif kind == "negative":
        x = -np.abs(x) - 1
    elif kind == "constant":
        x = np.full(shape, x.flat[0])
    elif kind == "zeros":
        x = np.zeros(shape)
    elif kind == "denormal":
        size = float(jnp.finfo(dtype).tiny) / 3
    elif kind == "spike":
        x.flat[0] = 1e8
    largest = float(jnp.finfo(dtype).max) / 4
    x = np.clip(x * size, -largest, largest)
    x[random.random(shape) < 0.1] = 0
    return x.astype(jnp.dtype(dtype))


arrays = st.builds(
    numbers,
    st.sampled_from(SHAPES),
    st.sampled_from(KINDS),
    st.sampled_from([-30, -12, 0, 3, 30]),
    st.integers(0, 2**16),
    st.sampled_from(DTYPES),
)
quick = settings(max_examples=20, deadline=None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def stored(x, code, block):
    return quantize(x, code, block=block)


@jax.jit
def read(q):
    return q.dequantize()


@functools.partial(jax.jit, static_argnums=(1, 2))
def stored_twice(x, code, block):
    """The array as codes and what they give, and the same of what they give."""
    first = quantize(x, code, block=block)
    once = jax.lax.optimization_barrier(first.dequantize())  # rounded to its dtype in between
    second = quantize(once, code, block=block)
    return first, once, second, second.dequantize()


def values(code):
    """Of each code its number, where the scale is 1."""
    with jax.enable_x64(True):
        return np.asarray(code.decode(jnp.arange(2**code.bits), jnp.ones((), jnp.float64), None))


def blocks_of(q, *others):
    """Of every block its elements in each array like `q`."""
    others = [np.moveaxis(np.asarray(x, np.float64), q.axis, -1) for x in others]
    flat = [x.reshape(-1, x.shape[-1]) for x in others]
    for row in zip(*flat, strict=True):
        for start in range(0, len(row[0]), q.block):
            yield [x[start : start + q.block] for x in row]


def rounding(dtype):
    """Relative, of the dtype itself and of the float32 (or wider) in which codes are computed."""
    eps = float(jnp.finfo(dtype).eps)
    return max(eps, 16 * float(jnp.finfo(jnp.promote_types(dtype, "float32")).eps))


def smallest(dtype):
    """Below it the dtype, or float32 in between, has no normal numbers: it may be taken for 0."""
    between = jnp.promote_types(dtype, "float32")
    return max(float(jnp.finfo(dtype).tiny), float(jnp.finfo(between).tiny))


def outcome(x, code, block):
    with jax.enable_x64(x.dtype == np.float64):
        first, once, second, twice = stored_twice(x, code, block)
    assert (once.dtype, once.shape) == (first.dtype, first.shape) == (x.dtype, x.shape)
    assert np.isfinite(once).all()
    return first, once, second, twice


@quick
@given(name=st.sampled_from([*SCALED]), x=arrays)
def test_each_number_becomes_the_nearest_of_its_blocks_values(name, x):
    code, block = SCALED[name]
    unsigned, table = "unsigned" in name, values(code)
    x = np.abs(x) if unsigned else x
    first, once, second, twice = outcome(x, code, block)
    least = np.abs(table[table != 0]).min()
    for one, back in blocks_of(first, x, once):
        scale = (one.max() if one.max() >= -one.min() else one.min()) or 1
        error = np.abs(table - (one / scale)[:, None]).min(axis=1)
        # What is not zero becomes the least value rather than zero, under these codes.
        away = unsigned or code.bits == 8
        bound = np.where(one == 0, 0, np.maximum(error, least if away else 0)) * abs(scale)
        slack = rounding(x.dtype) * np.maximum(np.abs(one), np.abs(back)) + 3 * smallest(x.dtype)
        assert (np.abs(back - one) <= bound + slack).all()
        # Zeros stay zeros, signs stay signs, and what has none and is not zero stays so.
        assert not back[one == 0].any()
        assert (back * one >= 0).all()
        if unsigned and least * one.max() > smallest(x.dtype):
            assert (back[one > smallest(x.dtype)] > 0).all()
    # Numbers that were stored once are stored without a change.
    np.testing.assert_array_equal(twice, once)
    # Below the dtype's normal numbers two codes may stand for one number.
    if np.all(least * np.abs(np.asarray(first.scales, np.float64)) > smallest(x.dtype)):
        np.testing.assert_array_equal(second.codes, first.codes)


@quick
@given(name=st.sampled_from([*AFFINE]), x=arrays)
def test_each_number_is_within_half_a_step_of_its_affine_blocks_range(name, x):
    code, block = AFFINE[name]
    first, once, _, twice = outcome(x, code, block)
    for one, back, again in blocks_of(first, x, once, twice):
        step = (one.max() - one.min()) / (2**code.bits - 1)
        slack = rounding(x.dtype) * np.abs(one).max() + 3 * smallest(x.dtype)
        assert (np.abs(back - one) <= step / 2 + slack).all()
        # The ends are there, whatever the sign of the block.
        np.testing.assert_allclose([back.min(), back.max()], [one.min(), one.max()], atol=slack)
        # A step is a quotient, hence rounded.
        np.testing.assert_allclose(again, back, rtol=0, atol=slack)


def test_what_is_below_zero_is_zero_without_a_sign():
    x = jnp.array([-5.0, -1e-30, 0.0, 1e-30, 2.0])
    for code, block in UNSIGNED.values():
        got = read(stored(x, code, block))
        assert not got[:3].any()
        assert (got[3:] > 0).all()
        assert not read(stored(-jnp.abs(x), code, block)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ALL)
def test_a_block_with_a_number_that_is_not_finite_is_not_finite(name, bad):
    code, block = ALL[name]
    if name.endswith("unsigned") and bad < 0:
        pytest.skip("less than zero, which is zero without a sign")
    x = np.ones(
        (64, 2 * block), np.float32
    )  # so many that XLA's CPU compiler drops NaN in a maximum
    x[0, 3] = bad
    got = np.asarray(read(stored(x, code, block)))
    assert not np.isfinite(got[0, :block]).any()
    np.testing.assert_array_equal(got[0, block:], 1)
    np.testing.assert_array_equal(got[1:], 1)


# bitsandbytes.


def test_the_values_of_dynamic_codes_are_those_of_bitsandbytes():
    for signed, name in ((True, "signed"), (False, "unsigned")):
        # To float32's rounding of products.
        np.testing.assert_allclose(
            values(Dynamic(signed=signed)), PUBLISHED[f"map/{name}"], rtol=3e-7
        )


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_codes_are_those_of_bitsandbytes(name):
    """But for three things: the sign of a block, and what would be coded as zero.

    Our scale has the sign of the block's largest element, which is exact so; theirs is positive,
    and where that element is negative it becomes 0.993 of itself. Of such a block our codes are
    mirrored. And what is not zero is the least value here, zero there.
    """
    blocks, theirs = PUBLISHED[f"blocks/{name}"], PUBLISHED[f"nearest/{name}"].astype(int)
    q = stored(blocks, Dynamic(signed=name == "signed"), 256)
    np.testing.assert_array_equal(np.abs(q.scales[:, 0]), PUBLISHED[f"scales/{name}"])
    ours, mirrored = np.asarray(q.codes, int), np.asarray(q.scales) < 0
    zero = 127 if name == "signed" else 0
    largest = np.abs(blocks) == np.abs(blocks).max(axis=1, keepdims=True)
    rounded_to_zero = (theirs == zero) & (blocks != 0)
    other = (largest & mirrored) | rounded_to_zero | (q.scales[:, :1] == 0)
    np.testing.assert_array_equal(np.where(mirrored, 254 - ours, ours)[~other], theirs[~other])
    assert (np.abs(ours - zero)[rounded_to_zero] == 1).all()
    assert not q.dequantize()[-1].any()  # the block of zeros


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_no_number_is_further_off_than_with_bitsandbytes_kernel_for_cpus(name):
    """It looks up multiples of 2^-15 of the block's largest: its codes are not all the nearest."""
    x = PUBLISHED[f"blocks/{name}"].astype(np.float64)
    scales = PUBLISHED[f"scales/{name}"].astype(np.float64)[:, None]
    theirs = PUBLISHED[f"map/{name}"][PUBLISHED[f"kernel/{name}"]] * scales
    ours = np.asarray(read(stored(x.astype(np.float32), Dynamic(signed=name == "signed"), 256)))
    # What would be zero is the least value here.
    least = 5.5e-7 if name == "signed" else 3.25e-7
    error = np.abs(ours - x)
    assert (error <= np.maximum(np.abs(theirs - x), least * scales) + 2e-7 * scales).all()
    assert error.sum() < np.abs(theirs - x).sum()


# Rounding at random.


def test_rounding_at_random_is_exact_in_the_mean():
    x = jax.random.normal(jax.random.key(0), (256,))
    keys = jax.random.split(jax.random.key(1), 4000)
    for bits in (4, 8):
        many = jax.vmap(lambda k: quantize(x, Affine(bits), key=k).dequantize())(keys)  # noqa: B023
        step = float(x.max() - x.min()) / (2**bits - 1)
        assert jnp.abs(many - x).max() <= step * (1 + 1e-5)
        # 4.5 standard deviations of the mean of a variable in an interval of one step.
        np.testing.assert_allclose(many.mean(0), x, atol=4.5 * step / 2 / math.sqrt(len(keys)))


# Where JAX carries it.

X = jax.random.normal(jax.random.key(0), (3, 10, 300))
FORMS = {
    name: stored(X, *ALL[name]) for name in ("8-bit, signed", "4-bit, unsigned", "4-bit affine")
}


def same(a, b):
    """Bit for bit, with what is static."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", FORMS)
def test_it_passes_through_jit_scan_vmap_and_tree_map(name):
    q = FORMS[name]

    @jax.jit
    def carried(q):
        kept, rows = jax.lax.scan(lambda q, _: (q, jax.tree.map(lambda x: x[1], q)), q, length=2)
        # One matrix after the other, as a scan over layers has them, or all of them at once.
        _, scanned = jax.lax.scan(lambda carry, q: (carry, q.dequantize()), None, q)
        mapped = jax.vmap(lambda q: q.dequantize())(q)
        one = jax.tree.map(lambda x: x[0], rows).dequantize()
        return q, kept, scanned, mapped, one

    passed, kept, scanned, mapped, one = carried(q)
    same(passed, q)
    same(kept, q)
    same(jax.tree.map(lambda x: x, q), q)
    whole = read(q)
    # An affine code is a product and a sum, which XLA may fuse: an ulp of the largest.
    atol = 5e-7 if name in AFFINE else 0
    np.testing.assert_allclose(scanned, whole, rtol=0, atol=atol)
    np.testing.assert_allclose(mapped, whole, rtol=0, atol=atol)
    np.testing.assert_allclose(one, whole[1], rtol=0, atol=atol)


@pytest.mark.parametrize("name", FORMS)
def test_vmap_over_a_leading_axis_makes_the_whole(name):
    q = FORMS[name]
    make = functools.partial(quantize, code=q.code, block=q.block)
    made = jax.jit(jax.vmap(make))(X)
    same(made, q)
    assert made.shape == X.shape


def test_it_is_donated():
    q = quantize(X)

    @functools.partial(jax.jit, donate_argnums=0)
    def halved(q):
        return stored_like(q.dequantize() / 2, q)

    taken = jax.tree.map(jnp.copy, q)
    new = halved(taken)
    assert all(x.is_deleted() for x in jax.tree.leaves(taken))
    np.testing.assert_allclose(new.dequantize(), q.dequantize() / 2, rtol=1e-6)
    same(stored_like(X, q), q)
    assert stored_like(X, X) is X


def abstract(shape, *code, dtype=jnp.float32, **options):
    make = functools.partial(quantize, **options)
    return jax.eval_shape(lambda x: make(x, *code), jax.ShapeDtypeStruct(shape, dtype))


def test_bytes_are_those_of_codes_and_scales():
    shape = (16, 512)
    q = abstract(shape, dtype=jnp.bfloat16)
    assert isinstance(q, QuantizedArray)
    assert (q.shape, q.ndim, q.size, q.dtype) == (shape, 2, 8192, jnp.bfloat16)
    assert q.nbytes == 16 * 512 + 16 * 2 * 4
    assert abstract(shape, Affine(4)).nbytes == 16 * 512 // 2 + 2 * 16 * 2 * 4
    assert abstract(shape, CODES[4][0], block=128).nbytes == 16 * 512 // 2 + 16 * 4 * 4
    assert FORMS["8-bit, signed"].nbytes == 9000 + 30 * 2 * 4


def test_blocks_run_along_the_last_axis_unless_it_is_short():
    for shape, scales in {
        (4, 600): (4, 3),
        (600, 4): (3, 4),
        (600, 127): (3, 127),
        (600, 128): (600, 1),
        (10, 20): (10, 1),
        (2, 300, 300): (2, 300, 2),
    }.items():
        assert abstract(shape).scales.shape == scales
    assert abstract((600, 4), axis=-1).scales.shape == (600, 1)
    assert abstract((600, 4), axis=0, block=100).scales.shape == (6, 4)


def test_dequantizing_a_tree_leaves_other_leaves_as_they_are():
    q = quantize(X)
    tree = dequantized({"a": q, "b": [X, None]})
    np.testing.assert_array_equal(tree["a"], q.dequantize())
    assert tree["b"][0] is X


# Sharding.

SPECS = [P("data", None, "fsdp"), P(None, "fsdp", "data"), P(None, None, ("data", "fsdp"))]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("name", "spec"), [("8-bit, signed", spec) for spec in SPECS] + [("4-bit affine", SPECS[2])]
)
def test_sharded_codes_are_the_unsharded_ones(name, spec, axis_type):
    code, block = ALL[name]
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    # 2,048 elements are 8 blocks, 768 are 3, and 264 are 2 of which one is short.
    xs = [jax.random.normal(jax.random.key(n), (2, 4, n)) for n in (2048, 768, 264)]

    @jax.jit
    def there_and_back(xs):
        qs = [quantize(x, code, block=block) for x in xs]
        return qs, [q.dequantize() for q in qs]

    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in xs]
    qs, back = there_and_back(placed)
    for x, y, q in zip(xs, back, qs, strict=True):
        expected = stored(x, code, block)
        jax.tree.map(np.testing.assert_array_equal, q, expected)
        # An affine code is a product and a sum, which XLA may fuse.
        np.testing.assert_allclose(y, read(expected), rtol=0, atol=5e-7 if name in AFFINE else 0)
        if axis_type is AxisType.Explicit:
            assert q.codes.sharding.spec == y.sharding.spec
            split = math.prod(mesh.shape[a] for a in np.atleast_1d(spec[2]))
            for part in (q.codes, q.scales):  # as x is, where they divide
                last = spec[2] if part.shape[2] % split == 0 else None
                assert part.sharding.spec == P(*spec[:2], last)


# Bad input.


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (
            jnp.ones(()),
            {},
            r"x of shape \(\) and dtype float32 cannot be quantized; give a floating",
        ),
        (jnp.ones((0, 3)), {}, r"x of shape \(0, 3\)"),
        (jnp.ones(3, jnp.int32), {}, "dtype int32 cannot be quantized"),
        (jnp.ones(3), {"block": 0}, "block=0 is not accepted with 8 bits; give"),
        (jnp.ones(3), {"code": Affine(4), "block": 3}, "block=3 .* 4 bits; .* an even number"),
        (jnp.ones(3), {"key": jax.random.key(0)}, "key: only affine codes round stochastically"),
        (
            jnp.ones(3),
            {"key": jax.random.key(0), "code": Table((0.0, 1.0), bits=4)},
            "key: only affine codes",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        quantize(x, **options)


@pytest.mark.parametrize(
    "function",
    [
        optax.tree.norm,
        optax.tree.sum,
        optax.tree.max,
        optax.tree.min,
        lambda tree: optax.tree.vdot(tree, tree),
        lambda tree: optax.tree.scale(2.0, tree),
        lambda tree: optax.tree.clip(tree, 0.0, 1.0),
        lambda tree: optax.tree.add_scale(tree, 0.5, tree),
        lambda tree: optax.incremental_update(tree, tree, 0.5),
        lambda tree: optax.ema(0.9).update(tree, optax.ema(0.9).init(tree)),
        lambda tree: optax.MultiSteps(optax.sgd(0.1), 2).init(tree),
    ],
    ids=lambda function: getattr(function, "__name__", "function"),
)
@pytest.mark.parametrize("make", [quantize, quantize_nf4])
def test_a_function_of_numbers_is_not_mapped_over_codes_unnoticed(function, make):
    tree = {"w": make(jnp.full((64, 256), 0.5))}
    with pytest.raises(ValueError, match=r"codes: .* instead of uint8 .*dequantize the tree first"):
        function(tree)


def test_what_maps_no_numbers_over_codes_passes():
    tree = {"w": quantize(jnp.full((64, 256), 0.5))}
    assert optax.tree.zeros_like(tree)["w"].dequantize().max() == 0
    finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)
    assert all(jax.tree.leaves(finite))
    shapes = jax.tree.map(jnp.shape, tree)
    assert shapes["w"].codes == (64, 256)
    tangents = jax.vjp(lambda tree: tree["w"].dequantize().sum(), tree)[1](1.0)[0]["w"]
    assert tangents.codes.dtype == jax.dtypes.float0
