"""Bases are orthonormal and keep the energy, whatever the gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inners import normal

from galore_optax import GaLoreDimensionNumbers, galore
from galore_optax.projection.subspace import (
    SUBSPACES,
    by_energy,
    gaussian,
    orthonormalize,
    random_numbers,
    randomized,
    refreshed,
    sampled,
    switched,
)
from galore_optax.quantization.array import dequantized

METHODS = ("randomized", "svd", "power", "random")


def spectrum(singular_values, columns, seed=0):
    """A matrix with the given singular values and random singular vectors."""
    n = len(singular_values)
    left, right = jax.random.split(jax.random.key(seed))
    u = jnp.linalg.qr(jax.random.normal(left, (n, n)))[0]
    v = jnp.linalg.qr(jax.random.normal(right, (columns, n)))[0]
    return (u * singular_values) @ v.T


def find(method, gradient, rank):
    present = jnp.eye(gradient.shape[0], rank)
    return jax.jit(lambda g: refreshed(SUBSPACES[method], g, present, jax.random.key(1)))(gradient)


def orthogonality_error(basis):
    basis = np.asarray(basis, np.float64)
    return np.abs(basis.T @ basis - np.eye(basis.shape[1])).max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_a_basis_is_orthonormal_and_keeps_the_energy(method, condition, magnitude):
    singular_values = jnp.logspace(0, -np.log10(condition), 96)
    gradient = spectrum(singular_values, 160)
    basis, found = find(method, gradient * magnitude, 24)
    assert found
    assert orthogonality_error(basis) < 2e-6
    kept = jnp.linalg.norm(basis.T @ gradient) ** 2
    best = jnp.sum(singular_values[:24] ** 2)
    # A range finder with one power step and no oversampling loses up to a percent where the
    # spectrum falls slowly; one step from arbitrary coordinates, more.
    assert kept / best > {"svd": 0.9999, "randomized": 0.98, "power": 0.9, "random": 0.0}[method]


@pytest.mark.parametrize("method", ["randomized", "svd", "power"])
def test_a_gradient_of_low_rank_gets_a_whole_basis_that_contains_it(method):
    singular_values = jnp.zeros(64).at[:10].set(jnp.arange(1, 11))
    gradient = spectrum(singular_values, 80)
    basis, found = find(method, gradient, 24)
    assert found
    assert orthogonality_error(basis) < 2e-6
    np.testing.assert_allclose(basis @ (basis.T @ gradient), gradient, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_gradient_without_a_subspace_leaves_the_basis(method, value):
    gradient = jnp.zeros((16, 20)).at[3].set(value)
    basis, found = find(method, gradient, 4)
    assert not found
    np.testing.assert_array_equal(basis, np.eye(16, 4))


def test_switching_keeps_the_leading_directions_and_draws_the_others_from_their_complement():
    gradient = spectrum(jnp.geomspace(100, 1e-3, 24), 40)
    exact = jnp.linalg.svd(gradient)[0][:, :8]
    bases = [
        jax.jit(partial(switched, leading=4))(gradient, exact, jax.random.key(i)) for i in range(2)
    ]
    for basis in bases:
        assert orthogonality_error(basis) < 2e-6
        np.testing.assert_allclose(jnp.abs(basis[:, :4].T @ exact[:, :4]), np.eye(4), atol=1e-3)
    overlap = np.linalg.norm(bases[0][:, 4:].T @ bases[1][:, 4:]) ** 2 / 4
    assert overlap < 0.6  # of two subspaces of 4 in 20 dimensions


def test_sampling_takes_singular_vectors_in_proportion_to_their_values():
    values = jnp.array([8.0, 4.0, 2.0, 1.0, 1.0])
    gradient = jnp.eye(5, 7) * values[:, None]
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(lambda key: sampled(gradient, jnp.zeros((5, 2)), key))(keys)
    assert orthogonality_error(drawn[0]) < 1e-6
    often = np.mean(np.abs(drawn).max(2) > 0.5, 0)
    p = np.asarray(values) / 16
    # The first by p, the second by p among those that are left.
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i) for i in range(5)]
    np.testing.assert_allclose(often, expected, atol=0.04)


def test_gaussian_numbers_keep_the_norm_on_average():
    gradient = normal(0, 16, 200)
    basis = gaussian(gradient, jnp.zeros((16, 64)), jax.random.key(0))
    small = basis.T @ gradient
    np.testing.assert_allclose(jnp.linalg.norm(small) / jnp.linalg.norm(gradient), 1, atol=0.1)


def test_power_steps_and_oversampling_keep_more_of_a_slow_spectrum():
    gradient = spectrum(jnp.linspace(1, 0.2, 96), 160)
    present = jnp.eye(96, 24)

    def kept(**options):
        basis = randomized(gradient, present, jax.random.key(1), **options)
        assert basis.shape == (96, 24)
        assert orthogonality_error(basis) < 2e-6
        return jnp.sum((basis.T @ gradient) ** 2)

    sketch, step, sampled = kept(power_steps=0), kept(), kept(oversampling=24)
    best = jnp.sum(jnp.linspace(1, 0.2, 96)[:24] ** 2)
    assert sketch < step < sampled < best * (1 + 1e-5)
    assert kept(power_steps=4, oversampling=24) > 0.99 * best


def test_power_iteration_from_a_good_basis_keeps_it_good():
    gradient = spectrum(jnp.logspace(0, -3, 96), 160)
    best = jnp.linalg.svd(gradient)[0][:, :24]
    near = orthonormalize(best + 0.05 * jax.random.normal(jax.random.key(2), best.shape))
    found, _ = refreshed(SUBSPACES["power"], gradient, near, jax.random.key(1))
    energies = [jnp.sum((basis.T @ gradient) ** 2) for basis in (near, found, best)]
    assert energies[0] < 0.95 * energies[2]
    assert energies[1] > 0.9995 * energies[2]


@settings(max_examples=12, deadline=None)
@given(
    n=st.sampled_from([1, 7, 24]),  # few shapes: each is compiled
    m=st.sampled_from([1, 16]),
    rank=st.sampled_from([1, 24]),
    zeros=st.floats(0, 1),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 100),
    method=st.sampled_from(["randomized", "power", "random"]),
)
def test_any_gradient_gives_a_finite_orthonormal_basis(n, m, rank, zeros, exponent, seed, method):
    rank = min(n, m, rank)
    value, mask = jax.random.split(jax.random.key(seed))
    gradient = jax.random.normal(value, (n, m)) * 10.0**exponent
    gradient = gradient * (jax.random.uniform(mask, (n, m)) > zeros)
    present = orthonormalize(jax.random.normal(value, (n, rank)))
    basis, _ = refreshed(SUBSPACES[method], gradient, present, mask)
    assert orthogonality_error(basis) < 5e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_low_precision_gradient_is_searched_in_float32(dtype):
    gradient = spectrum(jnp.logspace(0, -2, 32), 40).astype(dtype)
    basis, found = refreshed(SUBSPACES["randomized"], gradient, jnp.eye(32, 8), jax.random.key(0))
    assert found
    assert orthogonality_error(basis) < 2e-6


N, M, RANK = 12, 16, 4


def degenerate():
    """Gradients of a rank up to four, and such that are nearly so, by name."""
    rng = np.random.default_rng(0)
    signs, one = np.where(np.arange(N) % 2, -1, 1)[:, None], np.zeros((N, M))
    few, far, rows = (one.copy() for _ in range(3))
    few[5:8], rows[8:10] = 1, rng.normal(size=(2, M))
    far[7, 9], far[9, 3] = 1, 1e-20
    one[7, 9] = 1
    column = np.outer(rng.normal(size=N), np.eye(M)[11])
    return {
        "equal rows": few,
        "a few rows": rows,
        "two columns of opposite sign": column - np.roll(column, 1, axis=1),
        "rank 1": np.outer(rng.normal(size=N), rng.normal(size=M)),
        "all rows the same": np.tile(rng.normal(size=M), (N, 1)),
        "rows of opposite signs": signs * np.ones(M),
        "one tiny entry": 1e-37 * one,
        "one huge entry": 1e38 * one,
        "near the largest number": np.full((N, M), 3e38),
        "one entry far above the others": 1e4 * one + 1e-3 * rng.normal(size=(N, M)),
        "two entries far apart": far,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("storage", [jnp.float32, jnp.bfloat16, 8, 4])
def test_the_first_gradient_that_is_not_zero_gives_a_basis_however_degenerate(method, storage):
    bits = storage if isinstance(storage, int) else None
    cases = degenerate()
    gradients = jnp.asarray(np.stack([*cases.values()]), jnp.float32 if bits else storage)
    tx = galore(
        RANK, optax.sgd(1.0), subspace=method, side="both", projection_bits=bits,
        weight_dimension_numbers=GaLoreDimensionNumbers(1, 2),
    )  # fmt: skip
    state = jax.jit(lambda g: tx.update(g, tx.init(g), g)[1])(gradients)
    assert (np.asarray(state.refreshes) == 1).all()
    error = {8: 0.05, 4: 0.6}.get(bits, 2e-6 if storage == jnp.float32 else 0.02)
    for side, basis in enumerate(dequantized(state.bases)):
        for name, gradient, own in zip(cases, gradients, basis, strict=True):
            assert orthogonality_error(own.astype(jnp.float32)) < error, (name, side)
            whole = np.asarray(gradient, np.float64) / float(jnp.abs(gradient).max())
            whole = whole if side == 0 else whole.T
            best = np.sum(np.linalg.svd(whole, compute_uv=False)[:RANK] ** 2)
            kept = np.sum((np.asarray(own, np.float64).T @ whole) ** 2)
            assert method == "random" or kept > (1 - error / 2 - 1e-4) * best, (name, side)


@pytest.mark.parametrize("method", ["randomized", "power", "random"])
@pytest.mark.parametrize(("n", "rank"), [(2, 1), (3, 2), (8, 7)])
def test_no_draw_of_random_numbers_gives_a_basis_that_is_none(method, n, rank):
    """Of few rows, or nearly as many columns as rows, and gradients without a sketch by chance."""
    opposite = jnp.zeros((n, 24)).at[0, 0].set(1).at[0, 8].set(-1)
    for gradient in (jnp.ones((n, 24)), opposite):

        def one(key, gradient=gradient):
            return refreshed(SUBSPACES[method], gradient, jnp.eye(n, rank), key)

        # One after the other: LAPACK's calls on batches may deadlock.
        keys = jax.random.split(jax.random.key(3), 400)
        bases, found = jax.jit(lambda keys, one=one: jax.lax.map(one, keys))(keys)
        assert found.all()
        assert max(map(orthogonality_error, bases)) < 5e-6


@pytest.mark.parametrize("columns", [3, 16])
def test_random_numbers_have_mean_0_and_variance_1_and_no_pattern(columns):
    like, keys = jnp.zeros((8192, 1)), [jax.random.key(seed) for seed in (0, 1)]
    draws = [np.asarray(random_numbers(key, like, columns, i)) for key in keys for i in (0, 1)]
    for x in draws:  # of 24,576 numbers or more
        assert x.shape == (8192, columns)
        assert abs(x.mean()) < 0.03
        assert x.var() == pytest.approx(1, abs=0.03)
        np.testing.assert_allclose(x.T @ x / len(x), np.eye(columns), atol=0.06)
        for shift in (1, 2, 1024):
            assert abs(np.mean(x * np.roll(x, shift, axis=0))) < 0.03
    for i, x in enumerate(draws):
        assert all(abs(np.mean(x * y)) < 0.03 for y in draws[:i])
        # Another draw's numbers in another order are no new ones.
        assert all(np.mean(x[:2] == y[1::-1]) < 0.3 for y in draws[:i])


def test_power_iteration_finds_what_its_basis_does_not_meet():
    gradient = jnp.zeros((64, 128)).at[5:8].set(normal(0, 3, 128))
    for present in (jnp.eye(64, 8), jnp.eye(64)[:, 8:16]):  # meets all of its rows, or none
        basis, found = refreshed(SUBSPACES["power"], gradient, present, jax.random.key(1))
        assert found
        np.testing.assert_allclose(basis @ (basis.T @ gradient), gradient, atol=1e-4)


def test_a_gpu_orthonormalizes_in_full_float32():
    # In TF32, which it takes by default, columns with one direction in common became NaN.
    traced = jax.jit(orthonormalize).trace(jnp.ones((32, 8)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 6
    assert all("HIGHEST, HIGHEST" in line for line in products)


@pytest.mark.slow
def test_many_columns_along_one_direction_get_an_orthonormal_basis():
    # Rounding errors of a factorization, close to the limit: not jitted, with these numbers.
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((600, 600)))[0]
    gradient = jnp.outer(*jnp.asarray([directions[:, 0], directions[1]], jnp.float32))
    gradient /= jnp.abs(gradient).max()
    basis = SUBSPACES["power"](gradient, jnp.eye(600, 512), jax.random.key(1))
    np.testing.assert_allclose(basis.T @ basis, np.eye(512), atol=1e-5)


def test_a_gpu_turns_a_basis_in_full_float32():
    # In TF32 a basis found with oversampling was orthonormal to 1e-3 only.
    traced = jax.jit(by_energy).trace(jnp.ones((32, 8)), jnp.ones((32, 48)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (product,) = (line for line in text.splitlines() if "(tensor<32x8xf32>, tensor<8x8" in line)
    assert "HIGHEST, HIGHEST" in product
