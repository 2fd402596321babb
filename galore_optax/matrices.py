"""Which leaves are matrices, and any leaf seen as a stack of matrices.

GaLore (arXiv:2403.03507, section 4) projects weight *matrices*. A leaf may hold one matrix, a stack
of them (the layers of a scanned model, the experts of a mixture), or a matrix whose input or output
side is spread over several axes (attention's heads).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class GaLoreDimensionNumbers(NamedTuple):
    """Says which axes of a leaf are the input and the output of a matrix.

    Axes that are listed in neither are batch axes: each index along them is a matrix of its own,
    with its own subspace, as in `optax.contrib.muon`. `None` in the place of dimension numbers
    leaves a parameter unprojected.

    Attributes:
        reduction_axis: Axis or axes of the input; several are merged in the order given.
        output_axis: Axis or axes of the output; several are merged in the order given.

    Examples:
        >>> from galore_optax import GaLoreDimensionNumbers
        >>> stacked_layers = GaLoreDimensionNumbers(1, 2)  # (layer, in, out)
        >>> heads = GaLoreDimensionNumbers(0, (1, 2))  # (width, head, head_width)
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


WeightDimensionNumbers = (
    GaLoreDimensionNumbers | optax.Params | Callable[[optax.Params], optax.Params] | None
)


def _is_dimension_numbers(x: Any) -> bool:
    # By attribute, so that optax.contrib's tuple of the same name is taken as well.
    return x is None or (hasattr(x, "reduction_axis") and hasattr(x, "output_axis"))


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One leaf as a stack of matrices `(*batch, in, out)`, and the way back.

    Attributes:
        shape: The leaf's own shape.
        batch_axes: Axes along which the matrices are stacked.
        reduction_axes: Axes merged into the matrices' input.
        output_axes: Axes merged into the matrices' output.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the stack; `()` where the leaf is one matrix."""
        return self._sizes(self.batch_axes)

    @property
    def rows(self) -> int:
        """Size of the matrices' input."""
        return math.prod(self._sizes(self.reduction_axes))

    @property
    def columns(self) -> int:
        """Size of the matrices' output."""
        return math.prod(self._sizes(self.output_axes))

    def to_matrices(self, leaf: Float[Array, "..."]) -> Float[Array, "*batch in out"]:
        """The leaf with its axes ordered and merged to `(*batch, in, out)`."""
        ordered = leaf.transpose(self.batch_axes + self.reduction_axes + self.output_axes)
        return ordered.reshape(*self.batch_shape, self.rows, self.columns)

    def to_leaf(self, matrices: Float[Array, "*batch in out"]) -> Float[Array, "..."]:
        """The inverse of `to_matrices`."""
        order = self.batch_axes + self.reduction_axes + self.output_axes
        inverse = tuple(order.index(axis) for axis in range(len(order)))
        return matrices.reshape(self._sizes(order)).transpose(inverse)


def _axes(axes: int | Sequence[int], name: str, path: str, ndim: int) -> tuple[int, ...]:
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    if not given or any(not -ndim <= axis < ndim for axis in given):
        raise ValueError(
            f"weight_dimension_numbers: {name}={axes} at {path} does not name axes of a leaf with "
            f"{ndim} axes; give numbers from {-ndim} to {ndim - 1}, or None to leave it unprojected"
        )
    return tuple(axis % ndim for axis in given)


def _projectable(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and math.prod(leaf.shape) > 0


def _axes_needed(numbers: Any) -> int:
    """The fewest axes of a leaf in which the dimension numbers can be found."""
    merged = [
        axis
        for axes in (numbers.reduction_axis, numbers.output_axis)
        for axis in ([axes] if isinstance(axes, int) else axes)
    ]
    return max(len(merged), *(axis + 1 if axis >= 0 else -axis for axis in merged))


def _view(leaf: Any, numbers: Any, path: str) -> MatrixView | None:
    if numbers is None:
        return None
    if not _is_dimension_numbers(numbers):
        raise ValueError(
            f"weight_dimension_numbers: {numbers!r} at {path} is neither GaLoreDimensionNumbers "
            "nor None"
        )
    ndim = len(leaf.shape)
    rows = _axes(numbers.reduction_axis, "reduction_axis", path, ndim)
    columns = _axes(numbers.output_axis, "output_axis", path, ndim)
    if len({*rows, *columns}) < len(rows) + len(columns):
        raise ValueError(
            f"weight_dimension_numbers: reduction_axis={rows} and output_axis={columns} at {path} "
            "name an axis twice; each axis is an input, an output, or (not named) a batch axis"
        )
    batch = tuple(axis for axis in range(ndim) if axis not in rows + columns)
    if not _projectable(leaf):
        raise ValueError(
            f"weight_dimension_numbers: the leaf at {path} has shape {leaf.shape} and dtype "
            f"{leaf.dtype}; only real floating-point matrices with elements can be projected, give "
            "None for it"
        )
    return MatrixView(tuple(leaf.shape), batch, rows, columns)


def matrix_views(
    params: optax.Params, numbers: WeightDimensionNumbers
) -> list[tuple[str, MatrixView | None]]:
    """Path and view of every leaf, in the order of `jax.tree.leaves`; no view where unprojected.

    Args:
        params: Tree of arrays or of `jax.ShapeDtypeStruct`.
        numbers: `GaLoreDimensionNumbers` for all leaves with axes enough, a tree of them (or a
            prefix of one) with `None` at leaves to leave out, a function of the params that gives
            such a tree, or `None`: every leaf with two axes is a matrix.

    Raises:
        ValueError: If the dimension numbers do not fit the params.
    """
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:  # as where optax.tree_utils.tree_map_params looks for params in a state
        return []
    if numbers is None:
        matrix = GaLoreDimensionNumbers()
        flat = [matrix if len(x.shape) == 2 and _projectable(x) else None for _, x in leaves]
    elif _is_dimension_numbers(numbers):
        needed = _axes_needed(numbers)
        flat = [numbers if len(x.shape) >= needed and _projectable(x) else None for _, x in leaves]
    else:
        tree = numbers(params) if callable(numbers) else numbers
        try:
            full = jax.tree.broadcast(tree, params, is_leaf=_is_dimension_numbers)
        except ValueError as error:
            raise ValueError(
                "weight_dimension_numbers: its tree is no prefix of the params' tree; give one "
                f"with GaLoreDimensionNumbers or None in the place of each leaf ({error})"
            ) from error
        flat = jax.tree.leaves(full, is_leaf=_is_dimension_numbers)
    return [
        (path := jax.tree_util.keystr(key), _view(leaf, dims, path))
        for (key, leaf), dims in zip(leaves, flat, strict=True)
    ]
