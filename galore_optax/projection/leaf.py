"""The projection of one leaf: into the subspace, and back out of it.

GaLore (arXiv:2403.03507, definition 3.4): R = PᵀG, and the update P N; on the right side R = GP and
N Pᵀ; on both sides PᵀGQ and P N Qᵀ; of a tensor, G ×₁ P₁ᵀ ×₂ P₂ᵀ … and back.
"""

import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax import checks
from galore_optax.keys import for_matrix, hashed, number_of, words
from galore_optax.projection.dimension_numbers import LeafView, WeightDimensionNumbers, matrix_views
from galore_optax.quantization.array import QuantizedArray, dequantized, quantize
from galore_optax.quantization.codes import Affine, elements
from galore_optax.sharding import axis_specs, specs, with_automatic_axes

SIDES = ("smaller", "larger", "left", "right", "both")

Rank = int | float | Callable[[str, tuple[int, ...]], int | float]
"""A number of dimensions, a fraction of the smaller side, or a function of path and shape."""

Bases = tuple[Float[Array, "*batch n r"] | QuantizedArray, ...]
"""The bases of one leaf, one for each projected side."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """How the matrices (or tensors) of one leaf are projected, fixed by its shape.

    Attributes:
        view: The leaf as a stack of matrices.
        modes: The axes of a matrix that are projected, (0,) for the input, (1,) for the output.
        ranks: Dimensions of the subspace of each of them.
        whole: The axes of a matrix that would be projected, but are no longer than the rank: R has
            them as they are.
        path: The leaf's path in the params; not compared, so that leaves of equal shape share what
            is compiled for them.
    """

    view: LeafView
    modes: tuple[int, ...]
    ranks: tuple[int, ...]
    path: str = dataclasses.field(compare=False)
    whole: tuple[int, ...] = ()
    together: bool = False

    @property
    def matrices(self) -> int:
        """How many matrices the leaf holds."""
        return math.prod(self.view.batch_shape)

    @property
    def batch_ndim(self) -> int:
        """How many axes an array that the inner is given has before those of a matrix."""
        return len(self.view.batch_shape) if self.together else 0

    @property
    def small_shape(self) -> tuple[int, ...]:
        """Shape of one projected matrix."""
        ranks = dict(zip(self.modes, self.ranks, strict=True))
        return tuple(ranks.get(mode, size) for mode, size in enumerate(self.view.sizes))

    def into(self, bases: Bases, leaf: Float[Array, "*shape"]) -> Any:
        """R = PᵀG `(r, out)` or GP `(in, r)`; of a stack `(*batch, r, out)`, or a tuple of arrays.

        Inner transformations that are not elementwise keep statistics per leaf (Adafactor's
        clipping, LAMB's trust ratio), which must be those of one matrix.
        """

        def project(bases: Bases, leaf: Array) -> Any:
            operands = self._operands(bases, leaf.dtype)
            small = jnp.einsum(leaf, list(range(leaf.ndim)), *operands, self._small_axes())
            small = small.reshape(*self.view.batch_shape, *self.small_shape)
            return tuple(small.reshape(-1, *self.small_shape)) if self._separate else small

        return with_automatic_axes(project, lambda mesh: self._specs(mesh, leaf)[1], bases, leaf)

    def out_of(self, bases: Bases, small: Any, like: Array) -> Float[Array, "*shape"]:
        """P N or N Pᵀ from what `into` gives, in the shape of the leaf, sharded as `like` is."""

        def back(bases: Bases, small: Any) -> Array:
            small = jnp.stack(small) if self._separate else small
            axes, sizes = self._small_axes(), self.view.shape + self.ranks
            small = small.reshape([sizes[axis] for axis in axes])
            operands = self._operands(bases, small.dtype)
            return jnp.einsum(small, axes, *operands, list(range(len(self.view.shape))))

        return with_automatic_axes(back, lambda _: specs(like), bases, small)

    def stacked(self, small: Any) -> Float[Array, "*batch r m"]:
        """What `into` gives as one array, also of matrices that are separate."""
        if not self._separate:
            return small
        return jnp.stack(small).reshape(*self.view.batch_shape, *self.small_shape)

    @property
    def _separate(self) -> bool:
        return bool(self.view.batch_axes) and not self.together

    # A projection is one einsum, whose axes are the leaf's own and then the ranks. Merging a leaf's
    # axes into the two of a matrix instead would gather the leaf if they are sharded.

    def _rank_axis(self, mode: int) -> int:
        return len(self.view.shape) + self.modes.index(mode)

    def _small_axes(self) -> list[int]:
        axes = list(self.view.batch_axes)
        for mode, merged in enumerate(self.view.modes):
            axes += [self._rank_axis(mode)] if mode in self.modes else merged
        return axes

    def _operands(self, bases: Bases, dtype: Any) -> list[Any]:
        operands = []
        for mode, basis in zip(self.modes, bases, strict=True):
            axes = [*self.view.batch_axes, *self.view.modes[mode]]
            shape = [self.view.shape[axis] for axis in axes]
            split = dequantized(basis).astype(dtype).reshape(*shape, basis.shape[-1])
            operands += [split, [*axes, self._rank_axis(mode)]]
        return operands

    def random_bases(
        self, leaf: Float[Array, "..."], key: PRNGKeyArray, bits: int | None = None
    ) -> Bases:
        """Random orthonormal bases, in the leaf's dtype or in `bits`, sharded like the leaf.

        Their columns are coordinate vectors, drawn without repetition: orthonormal in any dtype and
        code, and made without a factorization. The matrices of a stack start with the same basis,
        as they do in `galore_optax.layerwise`, where each of them is a leaf with that path.
        """

        def draw(leaf: Array, key: PRNGKeyArray) -> tuple[Array, ...]:
            bases = []
            for mode, rank in zip(self.modes, self.ranks, strict=True):
                n = self.view.sizes[mode]
                own = for_matrix(key, number_of(self.path), 0, mode)
                drawn = jnp.argsort(hashed(words(own), elements((n,))))[:rank]
                one = (jnp.arange(n)[:, None] == drawn[None]).astype(leaf.dtype)
                bases.append(jnp.broadcast_to(one, (*self.view.batch_shape, n, rank)))
            return tuple(bases)

        self._warn_of_splits(leaf)
        bases = with_automatic_axes(draw, lambda mesh: self._specs(mesh, leaf)[0], leaf, key)
        if bits is None:
            return bases
        # In groups of 256 elements of one matrix (Q-GaLore, arXiv:2407.08296, section 3.1).
        axes = [-2 if basis.shape[-1] < 256 else -1 for basis in bases]
        pairs = zip(bases, axes, strict=True)
        return tuple(quantize(x, Affine(bits), block=256, axis=axis) for x, axis in pairs)

    def _warn_of_splits(self, leaf: Float[Array, "..."]) -> None:
        split_by = axis_specs(leaf)
        for first, *others in self.view.modes:
            if split := [axis for axis in others if split_by[axis]]:
                warnings.warn(
                    f"the leaf at {self.path} is split along axis {split[0]}, but its dimension "
                    f"numbers list axis {first} first: a refresh gathers it along axis {split[0]}; "
                    f"split axis {first} instead, or list the split axis first",
                    stacklevel=2,
                )

    def _specs(
        self, mesh: Mesh | AbstractMesh, leaf: Array
    ) -> tuple[tuple[PartitionSpec, ...], Any]:
        """Shardings of the bases and of the projected matrices, from those of the leaf's axes.

        A rank is replicated. A projected stack is a tuple of arrays: the mesh axes that split the
        stack split the unprojected side of each array instead, if they divide it.
        """
        split_by = axis_specs(leaf)
        batch = [split_by[axis] for axis in self.view.batch_axes]
        sides = [sum((split_by[axis] for axis in axes), ()) for axes in self.view.modes]
        bases = tuple(PartitionSpec(*batch, sides[mode], None) for mode in self.modes)
        spare = () if self.together else sum(batch, ())
        for mode, size in enumerate(self.small_shape):
            if mode in self.modes:
                sides[mode] = ()
            elif size % math.prod(mesh.shape[name] for name in sides[mode] + spare) == 0:
                sides[mode], spare = sides[mode] + spare, ()
        if self._separate:
            return bases, (PartitionSpec(*sides),) * self.matrices
        return bases, PartitionSpec(*batch, *sides)


Plans = Sequence[Projection | None]
"""How each leaf of the params is projected, in the order of `jax.tree.leaves`."""


def unfold(matrix: Float[Array, "*sizes"], mode: int) -> Float[Array, "n m"]:
    """A matrix or tensor with one axis first and all others merged behind it.

    The longest of the others goes first: a merged axis keeps the sharding of its first part only,
    and a long axis is the most likely to be sharded. No subspace depends on their order.
    """
    others = [axis for axis in range(matrix.ndim) if axis != mode]
    others.sort(key=lambda axis: -matrix.shape[axis])
    return matrix.transpose(mode, *others).reshape(matrix.shape[mode], -1)


def projected(
    matrix: Float[Array, "*sizes"], modes: Sequence[int], bases: Sequence[Float[Array, "n r"]]
) -> Float[Array, "*small"]:
    """R of one matrix or tensor, at least in float32."""
    for mode, basis in zip(modes, bases, strict=True):
        wide = jnp.promote_types(jnp.promote_types(matrix.dtype, basis.dtype), jnp.float32)
        turned = jnp.tensordot(basis.astype(wide), matrix.astype(wide), (0, mode))
        matrix = jnp.moveaxis(turned, 0, mode)
    return matrix


def checked_rank(value: Any, name: str = "rank") -> int | float:
    """Returns a rank or a fraction; raises a ValueError if it is neither."""
    if isinstance(value, float) and 0 < value <= 1:
        return value
    if checks.indexes(value) and operator.index(value) >= 1:
        return operator.index(value)
    raise ValueError(
        f"{name}={checks.said(value)} must be an integer of at least 1, or a float above 0 and "
        "at most 1: a "
        "fraction of the smaller side"
    )


def projections(
    params: optax.Params,
    numbers: WeightDimensionNumbers,
    rank: Rank,
    side: str,
    whole: bool = False,
    bases: Sequence[Any] | None = None,
) -> list[Projection | None]:
    """The projection of every leaf, in the order of `jax.tree.leaves`; None where there is none.

    `whole` leaves out the bases of sides that are no longer than the rank. `bases` are those of a
    state, for each leaf as it stores them: leaves that it does not project are not.
    """

    def projection(path: str, view: LeafView) -> Projection:
        name = f"rank({path!r}, {view.shape})"
        given = checks.called(rank, name, path, view.shape) if callable(rank) else rank
        asked = checked_rank(given, name)

        def within(size: int) -> int:
            return min(asked if isinstance(asked, int) else max(1, round(asked * size)), size)

        if view.tensor:
            # An unfolding has no more directions than columns.
            whole_size = math.prod(view.sizes)
            most = {m: min(within(n), whole_size // n) for m, n in enumerate(view.sizes)}
            ranks = {m: r for m, r in most.items() if r < view.sizes[m]}
            return Projection(view, tuple(ranks), tuple(ranks.values()), path)
        rows, columns = view.sizes
        # A tie goes to the input, as published for "smaller" and as in optax.contrib for "larger".
        left = {"smaller": rows <= columns, "larger": rows >= columns}.get(side, side == "left")
        sides = (0, 1) if side == "both" else (0,) if left else (1,)
        used = within(min(rows, columns))
        modes = tuple(mode for mode in sides if used < view.sizes[mode] or not whole)
        left_out = tuple(mode for mode in sides if mode not in modes)
        return Projection(view, modes, (used,) * len(modes), path, left_out)

    views = matrix_views(params, numbers)
    plans = [None if view is None else projection(path, view) for path, view in views]
    if bases is None:
        return plans
    return [_of_state(path, *pair) for (path, _), *pair in zip(views, plans, bases, strict=True)]


def _of_state(path: str, plan: Projection | None, stored: Any) -> Projection | None:
    """The projection of a leaf whose bases a state has; refuses bases that do not fit it."""
    if isinstance(stored, optax.MaskedNode):
        return None
    found = [jnp.shape(basis) for basis in (stored if isinstance(stored, tuple) else (stored,))]
    asked: Any = "no projection"
    if plan is not None:
        sides = zip(plan.modes, plan.ranks, strict=True)
        asked = [(*plan.view.batch_shape, plan.view.sizes[mode], rank) for mode, rank in sides]
    if found != asked:
        raise ValueError(
            f"state: its bases of the leaf at {path} have the shapes {found} instead of {asked}, "
            "which rank, side and weight_dimension_numbers make of the params; give the state "
            "that init made with these arguments and params"
        )
    return plan


def warn_of_left_out(leaves: Sequence[Any], plans: Plans, numbers: WeightDimensionNumbers) -> None:
    """Warns of leaves that the dimension numbers may leave out by mistake."""
    if leaves and not any(plans):
        warnings.warn(
            "galore projects nothing: none of the params is a matrix; say with "
            "weight_dimension_numbers which axes of which leaves are matrices",
            stacklevel=3,
        )
    several = [leaf.shape for leaf in leaves if len(leaf.shape) > 2]
    if several and numbers is None:
        warnings.warn(
            f"galore leaves {len(several)} params with three or more axes unprojected, the first "
            f"of shape {several[0]}; say with weight_dimension_numbers which axes are matrices, or "
            "None to leave a leaf out knowingly",
            stacklevel=3,
        )
        pairs = zip(leaves, plans, strict=True)
        left_out = [x for x, plan in pairs if plan is None and len(x.shape) == 2 and x.size]
        vectors = [x.shape for x in left_out if jnp.issubdtype(x.dtype, jnp.inexact)]
        if vectors:
            warnings.warn(
                f"galore takes {len(vectors)} params with two axes for stacks of vectors, such as "
                f"the layers' biases, and does not project them: the first of shape {vectors[0]}, "
                "since other params are stacks of as many; say with weight_dimension_numbers which "
                "leaves are matrices",
                stacklevel=3,
            )
