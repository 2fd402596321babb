"""Finding a subspace: an orthonormal basis of the directions with most of a gradient's energy.

GaLore (arXiv:2403.03507, section 4.2) takes the leading left singular vectors. The default here is
a randomized range finder (Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4): it keeps
the same share of a real gradient's energy for a fraction of the time, and is made of matrix
products and small factorizations only, so that it works on a sharded gradient without gathering it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax.sharding import matmul, sharded_like

FindSubspace = Callable[[Float[Array, "n m"], int, PRNGKeyArray], Float[Array, "n r"]]

# Shifted Cholesky QR: the first shift keeps the Gram matrix of columns of any condition positive
# definite in float32, the later passes, less and less shifted, remove what it left.
_SHIFT, _SHIFT_DECAY, _PASSES = 1e-6, 1 / 30, 3
_NOISE = 1e-6  # relative; gives a basis of full rank to a gradient that lacks it


def orthonormalize(y: Float[Array, "n r"]) -> Float[Array, "n r"]:
    """An orthonormal basis of the columns of `y`, n >= r, by three passes of shifted Cholesky QR.

    Only the r x r Gram matrix is factorized. Columns may be of any condition, but none may be zero.
    One matrix at a time: LAPACK calls with a batch of matrices deadlock on the CPU with jaxlib 0.10
    where as many as there are threads run at once, since each waits, in a thread of the pool, for
    work that it queued in the same pool.
    """
    q = y / jnp.linalg.norm(y, axis=0, keepdims=True)
    rank = y.shape[-1]
    identity = jnp.eye(rank, dtype=y.dtype)
    for i in range(_PASSES):
        shift = _SHIFT * rank**0.5 * _SHIFT_DECAY**i
        lower = jnp.linalg.cholesky(matmul(q.T, q) + shift * identity)
        # The inverse of a small triangle and a product, since a triangular solve of the large
        # matrix would gather it where it is sharded.
        inverse = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
        q = matmul(q, inverse.T)
    return q


def svd(gradient: Float[Array, "n m"], rank: int, key: PRNGKeyArray) -> Float[Array, "n r"]:
    """The leading left singular vectors, exactly, as published (equations 12 and 13)."""
    del key
    left, _, _ = jnp.linalg.svd(gradient, full_matrices=False)
    return left[:, :rank]


def randomized(gradient: Float[Array, "n m"], rank: int, key: PRNGKeyArray) -> Float[Array, "n r"]:
    """A randomized range finder with one power step, orthonormalized between its products."""
    n, m = gradient.shape
    sketch_key, noise_key = jax.random.split(key)
    test = sharded_like(jax.random.normal(sketch_key, (m, rank), gradient.dtype), gradient.T)
    noise = sharded_like(jax.random.normal(noise_key, (n, rank), gradient.dtype), gradient)
    columns = orthonormalize(_with_noise(matmul(gradient, test), noise))
    rows = orthonormalize(_with_noise(matmul(gradient.T, columns), test))
    return orthonormalize(_with_noise(matmul(gradient, rows), noise))


def _with_noise(sketch: Float[Array, "n r"], noise: Float[Array, "n r"]) -> Float[Array, "n r"]:
    """Completes a sketch of deficient rank, by less than any direction that float32 resolves."""
    largest = jnp.sqrt(jnp.max(jnp.sum(sketch * sketch, axis=0)))
    return sketch + _NOISE * largest / sketch.shape[0] ** 0.5 * noise


SUBSPACES: dict[str, FindSubspace] = {"randomized": randomized, "svd": svd}


def refreshed(
    find: FindSubspace,
    gradient: Float[Array, "n m"],
    basis: Float[Array, "n r"],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "n r"], Array]:
    """A new basis for `gradient`, and whether one was found.

    A gradient that is zero or not finite has no subspace: the present basis stays, and the caller
    tries again at the next step. Computed in float32 (float64 for float64 gradients), after a
    division by the largest magnitude, so that no gradient leaves the dtype's range.
    """
    wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(wide))

    def search() -> tuple[Float[Array, "n r"], Array]:
        found = find(wide / largest, basis.shape[-1], key)
        usable = jnp.all(jnp.isfinite(found))
        return jnp.where(usable, found.astype(basis.dtype), basis), usable

    def keep() -> tuple[Float[Array, "n r"], Array]:
        return basis, jnp.array(False)

    return jax.lax.cond(jnp.isfinite(largest) & (largest > 0), search, keep)
