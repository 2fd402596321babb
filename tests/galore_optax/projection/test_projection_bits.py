"""Bases in 4 or 8 bits: orthonormal to a step of the code, and half a byte or one each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_optax import (
    GaLoreDimensionNumbers,
    QuantizedArray,
    TuckerDimensionNumbers,
    cast_state,
    galore,
)
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.sharding import state_shardings

MATRIX, STACK = GaLoreDimensionNumbers(), GaLoreDimensionNumbers(-2, -1)
KERNEL = TuckerDimensionNumbers((0, 1, 2, 3))
LEAVES = {
    "left": ((40, 60), dict(weight_dimension_numbers=MATRIX)),
    "right": ((60, 40), dict(weight_dimension_numbers=MATRIX)),
    "both": ((40, 60), dict(weight_dimension_numbers=MATRIX, side="both")),
    "stack": ((3, 40, 60), dict(weight_dimension_numbers=STACK)),
    "tensor": ((3, 3, 20, 24), dict(weight_dimension_numbers=KERNEL)),
    # Groups of 256 that end short, and a rank of more than a group.
    "long": ((300, 310), dict(weight_dimension_numbers=MATRIX, subspace="random")),
    "wide": ((300, 310), dict(weight_dimension_numbers=MATRIX, subspace="random", rank=260)),
}
CASES = [(name, 4) for name in LEAVES] + [("left", 8), ("stack", 8)]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def first_step(name, bits, subspace="svd"):
    return _first_step(name, bits, subspace)


@functools.cache
def _first_step(name, bits, subspace):
    """Updates and state after the first step, whose gradient has a basis found."""
    shape, options = LEAVES[name]
    options = dict(rank=6, subspace=subspace, inner=optax.sgd(1.0)) | options
    tx = galore(scale=1.0, projection_bits=bits, **options)
    params = normal(0, *shape)
    return jax.jit(lambda p, g: tx.update(g, tx.init(p), p))(params, normal(1, *shape))


def all_bases(state):
    """For each side the quantized basis and its numbers `(matrices, n, r)`."""
    bases = state.bases if isinstance(state.bases, tuple) else (state.bases,)
    for basis in bases:
        assert isinstance(basis, QuantizedArray)
        yield basis, np.asarray(basis.dequantize(), np.float64).reshape(-1, *basis.shape[-2:])


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_each_number_is_within_half_a_step_of_the_basis_that_was_found(name, bits):
    _, state = first_step(name, bits)
    _, exact = first_step(name, None)
    wholes = exact.bases if isinstance(exact.bases, tuple) else (exact.bases,)
    for (basis, got), whole in zip(all_bases(state), wholes, strict=True):
        assert basis.shape == whole.shape
        assert basis.dtype == whole.dtype
        whole = np.asarray(whole, np.float64).reshape(got.shape)
        axis = basis.axis
        for start in range(0, got.shape[axis], 256):
            at = slice(start, start + 256)
            group, back = (x[..., at] if axis == -1 else x[:, at] for x in (whole, got))
            step = np.ptp(group, axis=axis, keepdims=True) / (2**bits - 1)
            assert (np.abs(back - group) <= step / 2 + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "subspace", "bits"),
    [(name, "svd", bits) for name, bits in CASES if name != "wide"]
    + [("stack", subspace, 4) for subspace in ("randomized", "power", "random")],
)
def test_bases_are_orthonormal_to_the_codes_bound(name, subspace, bits):
    _, state = first_step(name, bits, subspace)
    for _, p in all_bases(state):
        n, rank = p.shape[1:]
        # Of each column an error of at most half a step in every number.
        off = np.sqrt(n) * np.ptp(p, axis=1) / (2**bits - 1) / 2
        bound = off[:, :, None] + off[:, None, :] + off[:, :, None] * off[:, None, :]
        apart = np.abs(p.transpose(0, 2, 1) @ p - np.eye(rank))
        assert (apart <= bound + 1e-5).all()
        # Errors of either sign: far from the worst that could be. Measured 0.06 and 0.004.
        assert apart.max() < (0.12 if bits == 4 else 0.01)


@pytest.mark.parametrize(("name", "bits"), [case for case in CASES if case[0] != "wide"])
def test_updates_are_projections_by_the_numbers_that_are_stored(name, bits):
    updates, state = first_step(name, bits)
    grad = np.asarray(normal(1, *LEAVES[name][0]), np.float64)
    bases = [p for _, p in all_bases(state)]
    projectors = [p @ p.transpose(0, 2, 1) for p in bases]
    if name == "tensor":
        axes = [axis for axis, n in enumerate(grad.shape) if n > 6]
    else:
        axes = {"right": [-1], "both": [-2, -1]}.get(name, [-2])
    expected = grad
    for axis, projector in zip(axes, projectors, strict=True):
        moved = np.moveaxis(expected, axis, -1)
        if name == "stack":
            moved = np.einsum("lij,lkj->lki", projector, moved)
        else:
            moved = moved @ projector[0]
        expected = np.moveaxis(moved, -1, axis)
    np.testing.assert_allclose(updates, -expected, atol=1e-5)


def test_bytes_are_a_half_or_one_for_each_number_and_eight_for_each_group():
    tx = {b: galore(128, optax.sgd(0.1), projection_bits=b) for b in (4, 8)}
    params = {"w": jax.ShapeDtypeStruct((512, 1376), jnp.bfloat16)}
    for bits, one in tx.items():
        basis = jax.eval_shape(one.init, params).bases["w"]
        assert basis.shape == (512, 128)
        assert basis.nbytes == 512 * 128 * bits // 8 + 128 * 2 * 8
        assert {x.dtype.name for x in jax.tree.leaves(basis)} == {"uint8", "float32"}


def published(x, bits, group=256):
    """Q-GaLore's code, whose zero point is clamped: it corrupts groups of one sign."""
    x, last = x.reshape(-1, group), 2**bits - 1
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale = np.maximum(high - low, 1e-5) / last
    zero = np.clip(-np.round(low / scale), 0, last)
    return scale * (np.clip(np.round(x / scale) + zero, 0, last) - zero)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_keeps_its_numbers(sign):
    column = sign * np.linspace(0.05, 0.075, 256, dtype=np.float32)  # of norm 1, about

    def find(gradient, basis, key):
        return jnp.asarray(column)[:, None]

    tx = galore(1, optax.sgd(0.1), subspace=find, projection_bits=4)
    params = normal(0, 256, 300)
    _, state = jax.jit(tx.update)(normal(1, 256, 300), jax.jit(tx.init)(params))
    got = np.asarray(state.bases.dequantize())[:, 0]
    step = 0.025 / 15
    assert np.abs(got - column).max() <= step / 2 * (1 + 1e-4)
    assert np.abs(published(column, 4).ravel() - column).max() > 10 * step


def test_a_random_start_is_exact_and_a_gradient_without_a_subspace_leaves_it():
    tx = galore(6, optax.sgd(1.0), projection_bits=4)
    params = normal(0, 40, 60)
    state = jax.jit(tx.init)(params)
    start = state.bases.dequantize()
    np.testing.assert_array_equal(start.T @ start, np.eye(6))
    _, same = jax.jit(tx.update)(jnp.zeros_like(params), state, params)
    jax.tree.map(np.testing.assert_array_equal, same.bases, state.bases)


def test_states_keep_their_types_and_moments_turn_between_stored_bases():
    shape, grads = (40, 60), [normal(i, 40, 60) for i in range(4)]
    tx = galore(
        6, optax.sgd(0.1, momentum=0.9), scale=1.0, update_proj_gap=3, subspace="svd",
        projection_bits=4,
    )  # fmt: skip
    state, update = jax.jit(tx.init)(jnp.zeros(shape)), jax.jit(tx.update)
    for grad in grads[:3]:
        _, state = update(grad, state)
    _, after = update(grads[3], state)  # with a refresh
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    old, new = (np.asarray(s.bases.dequantize(), np.float64) for s in (state, after))
    assert not np.allclose(old, new, atol=0.1)
    # The inverse, since the old basis is not quite orthonormal.
    turned = 0.9 * new.T @ np.linalg.pinv(old.T) @ np.asarray(state.inner[0].trace, np.float64)
    expected = turned + new.T @ np.asarray(grads[3], np.float64)
    np.testing.assert_allclose(after.inner[0].trace, expected, atol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", None), ("float32", 8), ("float32", 4)])
def test_moments_do_not_grow_where_every_step_refreshes(dtype, bits, constant):
    """Stored bases are orthonormal to 1e-3 or 0.1; an error of each refresh must not add up.

    Bases in 4 bits made the second moments 20 times as large, and the steps vanish.
    """
    inner = cast_state(optax.adam(1.0))
    tx = galore(8, inner, update_proj_gap=1, subspace="svd", scale=1.0, projection_bits=bits)
    leading = normal(0, 32, 8)

    def gradient(key):
        one, other = jax.random.split(key)
        return leading @ jax.random.normal(one, (8, 48)) + 0.1 * jax.random.normal(other, (32, 48))

    def step(state, key):
        _, state = tx.update(gradient(key).astype(dtype), state)
        return state, jnp.mean(state.inner[0].nu) / (1 - 0.999**state.count)

    key, state = jax.random.key(1), tx.init(jnp.zeros((32, 48), dtype))
    keys = jax.random.split(key, 300)
    if constant:
        keys = jnp.broadcast_to(keys[0], keys.shape)
    _, means = jax.lax.scan(step, state, keys)
    np.testing.assert_allclose(means, means[0], rtol=0.25)


@pytest.mark.parametrize(
    ("axis_type", "names"), [(AxisType.Auto, ["w"]), (AxisType.Explicit, ["layers"])]
)
def test_sharded_params_give_the_unsharded_result(axis_type, names):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(axis_type,) * 2)
    # Half of 36 divides by no 4: what is stored of that basis stays whole.
    leaves = {
        "w": (normal(0, 36, 64), MATRIX, P("fsdp", "data")),
        "layers": (normal(1, 2, 32, 48), STACK, P("data", "fsdp")),
    }
    params, numbers, specs = ({name: leaves[name][i] for name in names} for i in range(3))
    tx = galore(
        4, optax.sgd(0.1), subspace="power", update_proj_gap=1, projection_bits=4,
        weight_dimension_numbers=numbers,
    )  # fmt: skip
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    grads = [jax.tree.map(lambda x: normal(i, *x.shape), params) for i in (2, 3)]  # noqa: B023
    wanted = state_shardings(tx, params, shardings)

    def run(place, init, update):
        state = init(place(params))
        for grad in grads:
            updates, state = update(place(grad), state)
        return updates, state

    expected, whole = run(lambda x: x, jax.jit(tx.init), jax.jit(tx.update))
    at = {"out_shardings": (shardings, wanted)} if axis_type is AxisType.Auto else {}
    got, state = run(
        lambda x: jax.device_put(x, shardings),
        jax.jit(tx.init, out_shardings=wanted),
        jax.jit(tx.update, **at),
    )
    for a, b in zip(jax.tree.leaves(state.bases), jax.tree.leaves(whole.bases), strict=True):
        # Sums in another order: a number may be at another side of a middle, hence have another
        # code (of two in a byte).
        assert np.mean(np.asarray(a) != np.asarray(b)) < 0.05 or a.dtype != np.uint8
    for name in params:
        assert np.mean(np.abs(got[name] - expected[name]) > 1e-3) < 0.05
    stayed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)
    assert all(jax.tree.leaves(stayed))


@pytest.mark.parametrize("bits", [0, 2, 16, "4"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"projection_bits=.* is unknown; choose one of"):
        galore(4, optax.sgd(0.1), projection_bits=bits)


def test_none_stores_them_as_they_are():
    _, state = first_step("left", None)
    assert not is_quantized(state.bases)
    assert dequantized(state.bases) is state.bases
