"""The projection of one leaf: into the subspace, and back out of it.

GaLore (arXiv:2403.03507, definition 3.4): R = PᵀG, and the update P N; on the right side R = GP and
N Pᵀ; on both sides PᵀGQ and P N Qᵀ; of a tensor, G ×₁ P₁ᵀ ×₂ P₂ᵀ … and back.
"""

import dataclasses
import math
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax.matrices import LeafView, WeightDimensionNumbers, matrix_views
from galore_optax.sharding import matmul, sharded_like

SIDES = ("smaller", "larger", "left", "right", "both")

Rank = int | float | Callable[[str, tuple[int, ...]], int | float]
"""A number of dimensions, a fraction of the smaller side, or a function of path and shape."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """How the matrices (or tensors) of one leaf are projected, fixed by its shape.

    Attributes:
        view: The leaf as a stack of matrices `(*batch, in, out)`.
        modes: The axes of a matrix that are projected, (0,) for the input, (1,) for the output.
        ranks: Dimensions of the subspace of each of them.
        path: The leaf's path in the params; no part of equality, so that leaves of one shape share
            what is compiled for them.
    """

    view: LeafView
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    path: str = dataclasses.field(compare=False)

    @property
    def matrices(self) -> int:
        """How many matrices the leaf holds."""
        return math.prod(self.view.batch_shape)

    @property
    def path_hash(self) -> int:
        """A number that tells the leaf's path apart from others, as randomness wants it."""
        return zlib.crc32(self.path.encode())

    @property
    def small_shape(self) -> tuple[int, ...]:
        """Shape of one projected matrix."""
        ranks = dict(zip(self.modes, self.ranks, strict=True))
        return tuple(ranks.get(mode, size) for mode, size in enumerate(self.view.sizes))

    def unfolded(self, leaf: Float[Array, "..."], mode: int) -> Float[Array, "*batch n m"]:
        """The leaf's matrices with one projected axis first and all others merged behind it."""
        stack = self.view.to_stack(leaf)
        return unfold(stack, mode, len(self.view.batch_axes))

    def into(self, bases: Sequence[Float[Array, "*batch n r"]], leaf: Float[Array, "..."]) -> Any:
        """R = PᵀG `(r, out)` or GP `(in, r)`; of stacked matrices a tuple, one array for each.

        An inner transformation keeps statistics by leaf (Adafactor's clipping, LAMB's trust ratio,
        a threshold on size): they are to be those of a matrix, never of a stack.
        """
        small = self.view.to_stack(leaf)
        for mode, basis in zip(self.modes, bases, strict=True):
            small = self._product(basis.astype(leaf.dtype), small, mode, into=True)
        if not self.view.batch_axes:
            return small
        flat = small.reshape(-1, *self.small_shape)
        return tuple(flat[i] for i in range(flat.shape[0]))

    def out_of(self, bases: Sequence[Float[Array, "*batch n r"]], small: Any) -> Any:
        """P N or N Pᵀ in the shape of the leaf, from what `into` gives."""
        if self.view.batch_axes:
            small = jnp.stack(small).reshape(*self.view.batch_shape, *small[0].shape)
        for mode, basis in zip(self.modes, bases, strict=True):
            small = self._product(basis.astype(small.dtype), small, mode, into=False)
        return self.view.to_leaf(small)

    def _product(self, basis: Array, stack: Array, mode: int, *, into: bool) -> Array:
        """The stack times the basis (`into`: its transpose) along one axis of its matrices."""
        batch = len(self.view.batch_axes)
        if mode == 1 and len(self.view.modes) == 2:  # the other way is the same, with transposes
            return matmul(stack, basis if into else basis.mT)
        moved = jnp.moveaxis(stack, batch + mode, batch)
        flat = moved.reshape(*moved.shape[: batch + 1], -1)
        product = matmul(basis.mT if into else basis, flat)
        product = product.reshape(*product.shape[:-1], *moved.shape[batch + 1 :])
        return jnp.moveaxis(product, batch, batch + mode)

    def keys(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """A key for each matrix of the flattened stack, told apart by path and index."""
        own = jax.random.fold_in(key, self.path_hash)
        return jax.vmap(lambda i: jax.random.fold_in(own, i))(jnp.arange(self.matrices))

    def random_bases(
        self, leaf: Float[Array, "..."], key: PRNGKeyArray
    ) -> tuple[Float[Array, "*batch n r"], ...]:
        """Random orthonormal bases in the leaf's dtype, sharded as their axes of the leaf.

        Their columns are coordinates, drawn without repetition: orthonormal in any dtype, and made
        without a factorization.
        """

        def basis(mode: int, rank: int) -> Array:
            unfolded = self.unfolded(leaf, mode)
            n = unfolded.shape[-2]
            keys = jax.vmap(lambda k: jax.random.fold_in(k, mode))(self.keys(key))
            drawn = jax.vmap(lambda k: jax.random.permutation(k, n)[:rank])(keys)
            drawn = drawn.reshape(*self.view.batch_shape, 1, rank)
            return sharded_like((jnp.arange(n)[:, None] == drawn).astype(leaf.dtype), unfolded)

        return tuple(basis(*pair) for pair in zip(self.modes, self.ranks, strict=True))


def unfold(stack: Float[Array, "..."], mode: int, batch: int = 0) -> Float[Array, "*batch n m"]:
    """One axis of each matrix or tensor first, all others merged behind it."""
    moved = jnp.moveaxis(stack, batch + mode, batch)
    return moved.reshape(*moved.shape[: batch + 1], -1)


def checked_rank(value: Any, name: str = "rank") -> int | float:
    """A rank or a fraction, checked.

    Raises:
        ValueError: If it is neither a whole number from 1 nor a fraction above 0 and up to 1.
    """
    if isinstance(value, float) and 0 < value <= 1:
        return value
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if whole and operator.index(value) >= 1:
        return operator.index(value)
    raise ValueError(
        f"{name}={value!r} is neither a whole number of at least 1 nor a fraction (a float above "
        "0, at most 1) of the smaller side"
    )


def projections(
    params: optax.Params, numbers: WeightDimensionNumbers, rank: Rank, side: str
) -> list[Projection | None]:
    """The projection of every leaf, in the order of `jax.tree.leaves`; None where there is none.

    Raises:
        ValueError: If the dimension numbers do not fit the params, or a function for the rank gives
            what is no rank.
    """

    def projection(path: str, view: LeafView) -> Projection:
        name = f"rank({path!r}, {view.shape})"
        asked = checked_rank(rank(path, view.shape), name) if callable(rank) else rank

        def within(size: int) -> int:
            return min(asked if isinstance(asked, int) else max(1, round(asked * size)), size)

        if len(view.modes) != 2:
            ranks = {m: within(n) for m, n in enumerate(view.sizes) if within(n) < n}
            return Projection(view, tuple(ranks), tuple(ranks.values()), path)
        rows, columns = view.sizes
        # A tie goes to the input, as published for "smaller" and as in optax.contrib for "larger".
        left = {"smaller": rows <= columns, "larger": rows >= columns}.get(side, side == "left")
        modes = (0, 1) if side == "both" else (0,) if left else (1,)
        return Projection(view, modes, (within(min(rows, columns)),) * len(modes), path)

    return [
        None if view is None else projection(path, view)
        for path, view in matrix_views(params, numbers)
    ]
