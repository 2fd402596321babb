"""Finding a subspace: an orthonormal basis of the directions with most of a gradient's energy.

GaLore (arXiv:2403.03507, section 4.2) takes the leading left singular vectors. The default here is
a randomized range finder (Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4): it keeps
the same share of a real gradient's energy for a fraction of the time, and is made of matrix
products and small factorizations only, so that it works on a sharded gradient without gathering it.
The energy that a basis P keeps of a gradient G is ‖PᵀG‖² / ‖G‖² (Frobenius norms).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from galore_optax.keys import hashed, words
from galore_optax.quantization.codes import elements
from galore_optax.sharding import varying_alike

Gradient, Basis = Float[Array, "n m"], Float[Array, "n r"]
FindSubspace = Callable[[Gradient, Basis, PRNGKeyArray], Basis]
"""From a gradient in float32 or wider, whose largest magnitude is 1, the present basis and a key to
a new orthonormal basis of the same shape, which is not finite if none was found."""

_exact = partial(jnp.matmul, precision="highest")
# Shifted Cholesky QR. The first shift keeps the Gram matrix positive definite in float32, whatever
# the columns' condition; later passes with smaller shifts make the columns orthonormal. If there
# are nearly as many columns as rows, the noise that completes them has a high condition itself.
_SHIFTS = (1e-6, 1e-6 / 30, 1e-6 / 30**2)
_SHIFTS_OF_MANY = (1e-6, 1e-6 / 30, 1e-6 / 30, 1e-6 / 30, 1e-6 / 30**2)
_NOISE = 1e-6  # relative; gives a basis of full rank to a gradient that lacks it
_SEARCH = 1e-3  # of a random vector to one of the present basis, which may meet no gradient


def orthonormalize(y: Basis, passes: int | None = None) -> Basis:
    """An orthonormal basis of the columns of `y`, n >= r, by passes of shifted Cholesky QR.

    Only the r x r Gram matrix is factorized. Columns may be of any condition, but none may be zero;
    with fewer `passes` than all, columns of a high condition are not quite orthonormal. Products
    are in full float32: in TF32, a GPU's default, columns with one direction in common (a gradient
    of rank 1, or one of whose directions is 1000 times the others) become NaN. Takes one matrix at
    a time: LAPACK calls on batches deadlock on a CPU (jaxlib 0.10) if as many run at once as there
    are threads, since each waits in a thread of the pool for work queued in that pool.
    """
    q = y / jnp.linalg.norm(y, axis=0, keepdims=True)
    n, rank = y.shape
    identity = jnp.eye(rank, dtype=y.dtype)
    for shift in (_SHIFTS if 2 * rank <= n else _SHIFTS_OF_MANY)[:passes]:
        gram, own = _exact(q.T, q), _in(y.dtype, shift)
        # The norm is the root of the rank unless columns have a direction in common. Rounding
        # errors of the factorization grow with it.
        gram += jnp.maximum(own * rank**0.5, own / 4 * jnp.linalg.norm(gram)) * identity
        # The small triangle is inverted: a triangular solve of the large matrix would gather it if
        # it is sharded.
        inverse = jax.lax.platform_dependent(gram, cpu=_factor_inverse, default=_lapack_inverse)
        q = _exact(q, inverse.T)
    return q


def _in(dtype: Any, of_float32: float) -> float:
    """Scales a constant for float32 by the ratio of the dtype's resolution to float32's."""
    return of_float32 * float(jnp.finfo(dtype).eps / jnp.finfo(jnp.float32).eps)


def _lapack_inverse(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """The inverse of the Cholesky factor."""
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(gram), identity, lower=True)


def _factor_inverse(gram: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """The inverse of the Cholesky factor, by blocks of at most 128 x 128 and products of blocks.

    Larger calls of a CPU's LAPACK (OpenBLAS) run on threads of its own, which keep the cores busy
    after they are done: XLA's work beside them took twice as long (benchmarks/RESULTS.md).
    """
    r = len(gram)
    if r <= 128:
        return _triangle_inverse(jnp.linalg.cholesky(gram))
    half = r // 2
    first = _factor_inverse(gram[:half, :half])
    below = gram[half:, :half] @ first.T  # of the factor
    last = _factor_inverse(gram[half:, half:] - below @ below.T)
    return _lower(first, -last @ below @ first, last)


def _triangle_inverse(lower: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """The inverse of a triangle: its diagonal blocks are inverted, then those of twice the size."""
    r = len(lower)
    size = 1 << (r - 1).bit_length()
    padded = lower
    if r < size:  # jax.experimental.checkify fails at `x.at[:].set(y)`
        padded = jnp.eye(size, dtype=lower.dtype).at[:r, :r].set(lower)
    inverses = 1 / jnp.diagonal(padded)[:, None, None]  # (blocks, width, width)
    while (width := inverses.shape[-1]) < size:
        first, last = inverses[::2], inverses[1::2]
        blocks = padded.reshape(len(first), 2, width, len(first), 2, width)[:, 1, :, :, 0]
        below = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)
        inverses = _lower(first, -last @ below @ first, last)
    return inverses[0, :r, :r]


def _lower(
    first: Float[Array, "*b n n"], below: Float[Array, "*b m n"], last: Float[Array, "*b m m"]
) -> Float[Array, "*b k k"]:
    """The lower triangle [[first, 0], [below, last]]."""
    above = jnp.zeros_like(below.mT)
    rows = jnp.concatenate([first, above], -1), jnp.concatenate([below, last], -1)
    return jnp.concatenate(rows, -2)


def svd(gradient: Gradient, basis: Basis, key: PRNGKeyArray) -> Basis:
    """The leading left singular vectors, exactly, as published (equations 12 and 13)."""
    left, _, _ = jnp.linalg.svd(gradient, full_matrices=False)
    return left[:, : basis.shape[-1]]


def randomized(
    gradient: Gradient, basis: Basis, key: PRNGKeyArray, power_steps: int = 1, oversampling: int = 0
) -> Basis:
    """A randomized range finder, orthonormalized between its products.

    `power_steps` are products with G Gᵀ after the sketch; one keeps the energy of the exact
    singular vectors to about a percent where the spectrum falls slowly. Of a sketch with
    `oversampling` columns beyond the rank the leading ones are kept.
    """
    n, m = gradient.shape
    rank = basis.shape[-1]
    columns = min(rank + oversampling, n, m)
    test = random_numbers(key, gradient.T, columns)
    noise = random_numbers(key, gradient, columns, draw=1)
    sketch = gradient @ test
    for _ in range(power_steps):
        # Only to keep the columns from all turning to the leading direction.
        found = orthonormalize(_with_noise(sketch, noise), passes=1)
        sketch = gradient @ (gradient.T @ found)
    found = orthonormalize(_with_noise(sketch, noise))
    return found if columns == rank else by_energy(found, gradient)[:, :rank]


def by_energy(basis: Basis, gradient: Gradient) -> Basis:
    """A basis of the same subspace whose first columns keep the most energy."""
    small = basis.T @ gradient
    _, turn = jnp.linalg.eigh(small @ small.T)
    return _exact(basis, turn[:, ::-1])  # in TF32 orthonormal to 1e-3 only


def power(gradient: Gradient, basis: Basis, key: PRNGKeyArray) -> Basis:
    """One step of subspace iteration from the present basis, orth(G Gᵀ P).

    Of the methods that use the gradient it does the least work. It follows a subspace that turns
    slowly; the first bases, found from random ones, keep less energy. A small random part of each
    vector finds the directions that the present basis does not meet.
    """
    noise = random_numbers(key, gradient, basis.shape[-1])
    rows = gradient.T @ (basis + _SEARCH / basis.shape[0] ** 0.5 * noise)
    return orthonormalize(_with_noise(gradient @ rows, noise))


def random(gradient: Gradient, basis: Basis, key: PRNGKeyArray) -> Basis:
    """A random subspace, independent of the gradient: the baseline for the other methods."""
    return orthonormalize(random_numbers(key, gradient, basis.shape[-1]))


def switched(
    gradient: Gradient, basis: Basis, key: PRNGKeyArray, leading: int | None = None
) -> Basis:
    """Alice's switching: some leading directions, the rest drawn from their complement.

    By default 5/16 of the rank are leading, the paper's 160 of 512 for a 1B model.

    The leading ones are those of one step of subspace iteration from the present basis. The rest
    of the paper's basis are vectors drawn from one basis of the complement, here a random subspace
    of it. Gong et al., arXiv:2502.07752, algorithm 2.
    """
    rank = basis.shape[-1]
    leading = max(1, rank * 5 // 16) if leading is None else leading
    if leading > rank:
        raise ValueError(f"leading={leading}: a subspace has rank={rank}, give at most that many")
    kept = by_energy(power(gradient, basis, key), gradient)[:, :leading]
    rest = random_numbers(key, gradient, basis.shape[-1] - kept.shape[-1], draw=1)
    return orthonormalize(jnp.concatenate([kept, rest], axis=1))


def sampled(gradient: Gradient, basis: Basis, key: PRNGKeyArray) -> Basis:
    """Left singular vectors, drawn without repetition in proportion to their singular values.

    SARA (Zhang et al., arXiv:2502.05790, algorithm 2). As for "svd", a sharded matrix is gathered.
    """
    left, values, _ = jnp.linalg.svd(gradient, full_matrices=False)
    # The largest of log p + Gumbel noise are such a sample.
    noisy = jnp.log(values) + jax.random.gumbel(key, values.shape, values.dtype)
    _, drawn = jax.lax.top_k(noisy, min(basis.shape[-1], len(values)))
    return left[:, jnp.sort(drawn)]


def gaussian(gradient: Gradient, basis: Basis, key: PRNGKeyArray) -> Basis:
    """Normal numbers of variance 1/r, not orthonormal: keeps norms on average (APOLLO, Flora).

    Zhu et al., arXiv:2412.05270, section 4.1; Hao et al., arXiv:2402.03293.
    """
    return jax.random.normal(key, basis.shape, basis.dtype) / basis.shape[-1] ** 0.5


def random_numbers(
    key: PRNGKeyArray, like: Float[Array, "n m"], columns: int, draw: int = 0
) -> Float[Array, "n c"]:
    """Random numbers of mean 0 and variance 1, one row for each of `like`; others for draw 1.

    They are uniform with four bits each, eight from one hash: as good for a sketch as normal
    numbers, which take twenty times as long. Fewer than eight columns get 24 bits each: four bits
    are too often alike there, and lose what differs in sign only.
    """
    rows, bits = like.shape[0], 24 if columns < 8 else 4
    shifts = np.arange(32 % bits, 32, bits, dtype=np.uint32)[None, None]
    hashes = elements((rows, -(-columns // shifts.size), 1))
    digits = (hashed(words(key), hashes, draw << 31) >> shifts) & np.uint32(2**bits - 1)
    deviation = ((4**bits - 1) / 12) ** 0.5
    numbers = (digits.astype(like.dtype) - (2**bits - 1) / 2) / deviation
    return numbers.reshape(rows, -1)[:, :columns]


def _with_noise(sketch: Basis, noise: Basis) -> Basis:
    """Completes a sketch of deficient rank with noise below the resolution of its dtype."""
    largest = jnp.sqrt(jnp.max(jnp.sum(sketch * sketch, axis=0)))
    return sketch + _in(sketch.dtype, _NOISE) * largest / sketch.shape[0] ** 0.5 * noise


# Those that use the gradient in products only, so that it may be a `Summed`.
BY_PRODUCTS = ("randomized", "power", "random", "gaussian")
# Those that find any basis of a subspace. If that is the whole space, there is nothing to find.
_ANY_BASIS = (randomized, power, random, gaussian, switched)
# The names that `galore(subspace=)` takes; a new method needs an entry here.
SUBSPACES = {
    "randomized": randomized,
    "svd": svd,
    "power": power,
    "random": random,
    "gaussian": gaussian,
    "switched": switched,
    "sampled": sampled,
}


def any_basis(subspace: str | FindSubspace) -> bool:
    """Whether a method does not choose among the bases of the subspace that it finds."""
    find = SUBSPACES[subspace] if isinstance(subspace, str) else subspace
    return getattr(find, "func", find) in _ANY_BASIS


class Summed:
    """Products of a gradient of which each device has a summand, within `jax.shard_map`.

    A product with the sum is the sum of the devices' products, so that these, which are small, are
    sent instead of the gradient.
    """

    def __init__(self, part: Gradient, axes: Sequence[str]):
        self._part, self._axes = part, axes
        self.shape, self.dtype, self.ndim = part.shape, part.dtype, part.ndim

    @property
    def T(self) -> "Summed":
        """The transpose."""
        return Summed(self._part.T, self._axes)

    def __matmul__(self, other: Float[Array, "m c"]) -> Float[Array, "n c"]:
        return jax.lax.psum(self._part @ other, self._axes)

    def __rmatmul__(self, other: Float[Array, "c n"]) -> Float[Array, "c m"]:
        return jax.lax.psum(other @ self._part, self._axes)


def refreshed(
    find: FindSubspace,
    gradient: Gradient,
    basis: Basis,
    key: PRNGKeyArray,
    sum_over: Sequence[str] = (),
) -> tuple[Basis, Bool[Array, ""]]:
    """A new basis for a gradient, and whether one was found.

    A gradient that is zero or not finite has no subspace: the present basis stays, and the caller
    tries again at the next step. Computed in float32 (float64 for float64 gradients), after a
    division by the largest magnitude, so that no gradient leaves the dtype's range. The gradient is
    the sum of those of the devices along the mesh axes `sum_over`.
    """
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    largest = jnp.max(jnp.abs(gradient)).astype(wide)
    if sum_over:
        largest = jax.lax.pmax(largest, sum_over)

    def search() -> tuple[Basis, Array]:
        # By a power of two first, where the inverse would leave the dtype's range.
        safe = jnp.where(largest > 1e30, 2.0**-60, jnp.where(largest < 1e-30, 2.0**60, 1.0))
        unit = gradient.astype(wide) * safe.astype(wide) / (largest * safe.astype(wide))
        whole: Any = Summed(unit, sum_over) if sum_over else unit
        # A basis that does not depend on the gradient varies over as many devices nevertheless.
        found, _ = varying_alike((find(whole, basis.astype(wide), key), largest))
        usable = jnp.all(jnp.isfinite(found))
        return jnp.where(usable, found.astype(basis.dtype), basis), usable

    usable = jnp.isfinite(largest) & (largest > 0)
    return jax.lax.cond(usable, search, lambda: (basis, usable))
