"""Bases are orthonormal and keep the energy, whatever the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_optax.projection.subspace import SUBSPACES, orthonormalize, randomized, refreshed


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


@pytest.mark.parametrize("method", SUBSPACES)
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


@pytest.mark.parametrize("method", SUBSPACES)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_gradient_without_a_subspace_leaves_the_basis(method, value):
    gradient = jnp.zeros((16, 20)).at[3].set(value)
    basis, found = find(method, gradient, 4)
    assert not found
    np.testing.assert_array_equal(basis, np.eye(16, 4))


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
    n=st.integers(1, 24),
    m=st.integers(1, 24),
    rank=st.integers(1, 24),
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
