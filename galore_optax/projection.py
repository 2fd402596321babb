"""The projection of one leaf: into the subspace, and back out of it.

GaLore (arXiv:2403.03507, definition 3.4): R = PᵀG, and the update P N; on the right side R = GP and
N Pᵀ.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax.matrices import MatrixView, WeightDimensionNumbers, matrix_views
from galore_optax.sharding import matmul, sharded_like

SIDES = ("smaller", "larger", "left", "right")


@dataclasses.dataclass(frozen=True)
class Projection:
    """How the matrices of one leaf are projected, fixed by its shape.

    Attributes:
        view: The leaf as a stack of matrices `(*batch, in, out)`.
        left: Whether the input side is projected, else the output side.
        rank: Dimensions of the subspace.
        path: The leaf's path in the params; no part of equality, so that leaves of one shape share
            what is compiled for them.
    """

    view: MatrixView
    left: bool
    rank: int
    path: str = dataclasses.field(compare=False)

    def oriented(self, leaf: Float[Array, "..."]) -> Float[Array, "*batch n m"]:
        """The leaf's matrices with the projected side first."""
        matrices = self.view.to_matrices(leaf)
        return matrices if self.left else matrices.mT

    def into(self, basis: Float[Array, "*batch n r"], leaf: Float[Array, "..."]) -> Any:
        """R = PᵀG `(r, out)` or GP `(in, r)`; of stacked matrices a tuple, one array for each.

        An inner transformation keeps statistics by leaf (Adafactor's clipping, LAMB's trust ratio,
        a threshold on size): they are to be those of a matrix, never of a stack.
        """
        matrices = self.view.to_matrices(leaf)
        basis = basis.astype(leaf.dtype)
        small = matmul(basis.mT, matrices) if self.left else matmul(matrices, basis)
        if not self.view.batch_axes:
            return small
        flat = small.reshape(-1, *small.shape[-2:])
        return tuple(flat[i] for i in range(flat.shape[0]))

    def out_of(self, basis: Float[Array, "*batch n r"], small: Any) -> Float[Array, "..."]:
        """P N or N Pᵀ in the shape of the leaf, from what `into` gives."""
        if self.view.batch_axes:
            small = jnp.stack(small).reshape(*self.view.batch_shape, *small[0].shape)
        basis = basis.astype(small.dtype)
        matrices = matmul(basis, small) if self.left else matmul(small, basis.mT)
        return self.view.to_leaf(matrices)

    def keys(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """A key for each matrix of the flattened stack, told apart by path and index."""
        own = jax.random.fold_in(key, zlib.crc32(self.path.encode()))
        indices = jnp.arange(math.prod(self.view.batch_shape))
        return jax.vmap(lambda index: jax.random.fold_in(own, index))(indices)

    def random_bases(
        self, leaf: Float[Array, "..."], key: PRNGKeyArray
    ) -> Float[Array, "*batch n r"]:
        """Random orthonormal bases in the leaf's dtype, sharded as its projected side.

        Their columns are coordinates, drawn without repetition: orthonormal in any dtype, and made
        without a factorization.
        """
        oriented = self.oriented(leaf)
        n = oriented.shape[-2]
        drawn = jax.vmap(lambda k: jax.random.permutation(k, n)[: self.rank])(self.keys(key))
        drawn = drawn.reshape(*self.view.batch_shape, 1, self.rank)
        bases = (jnp.arange(n)[:, None] == drawn).astype(leaf.dtype)
        return sharded_like(bases, oriented)


def projections(
    params: optax.Params, numbers: WeightDimensionNumbers, rank: int, side: str
) -> list[Projection | None]:
    """The projection of every leaf, in the order of `jax.tree.leaves`; None where there is none.

    Raises:
        ValueError: If the dimension numbers do not fit the params.
    """
    found: list[Projection | None] = []
    for path, view in matrix_views(params, numbers):
        if view is None:
            found.append(None)
            continue
        # A tie goes to the input, as published for "smaller" and as in optax.contrib for "larger".
        left = {"smaller": view.rows <= view.columns, "larger": view.rows >= view.columns}.get(
            side, side == "left"
        )
        found.append(Projection(view, left, min(rank, view.rows, view.columns), path))
    return found
