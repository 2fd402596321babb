"""Which leaves are matrices, and any leaf seen as a stack of matrices.

GaLore (arXiv:2403.03507, section 4) projects weight *matrices*. A leaf may hold one matrix, a stack
of them (the layers of a scanned model, the experts of a mixture), or a matrix whose input or output
side is spread over several axes (attention's heads). A leaf that is a true tensor (a convolution's
kernel) is projected along each of its axes (Tensor-GaLore, arXiv:2501.02379).
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax import checks


class GaLoreDimensionNumbers(NamedTuple):
    """Says which axes of a leaf are the input and the output of a matrix.

    Axes that are listed in neither are batch axes: each index along them is a matrix with its own
    subspace, as in `optax.contrib.muon`. None instead of dimension numbers leaves a param out.

    Attributes:
        reduction_axis: Axis or axes of the input; several are merged in the order given.
        output_axis: Axis or axes of the output, likewise.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import GaLoreDimensionNumbers, galore
        >>> stacked_layers = GaLoreDimensionNumbers(1, 2)  # (layer, in, out)
        >>> heads = GaLoreDimensionNumbers(0, (1, 2))  # (width, head, head_width)
        >>> numbers = {"mlp": stacked_layers, "query": heads, "norm": None}
        >>> tx = galore(8, optax.adam(1e-3), weight_dimension_numbers=numbers)
        >>> shapes = {"mlp": (2, 64, 256), "query": (64, 4, 32), "norm": (64,)}
        >>> bases = tx.init({name: jnp.ones(shape) for name, shape in shapes.items()}).bases
        >>> bases["mlp"].shape, bases["query"].shape
        ((2, 64, 8), (64, 8))
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


class TuckerDimensionNumbers(NamedTuple):
    """Says which axes of a leaf are projected, each by a basis of its own (a Tucker projection).

    For tensors that are not matrices, such as a convolution's kernel: the gradient G becomes the
    core G ×₁ P₁ᵀ ×₂ P₂ᵀ …, each basis found from the gradient's unfolding along its axis. An axis
    no longer than the rank stays as it is, and a basis has no more directions than the other axes
    have elements together. Axes that are not listed are batch axes.

    References:
        George et al., `Tensor-GaLore <https://arxiv.org/abs/2501.02379>`_, 2025, section 3.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import TuckerDimensionNumbers, galore
        >>> kernel = TuckerDimensionNumbers(axes=(0, 1, 2, 3))  # (height, width, in, out)
        >>> tx = galore(8, optax.adam(1e-3), weight_dimension_numbers={"kernel": kernel})
        >>> state = tx.init({"kernel": jnp.ones((3, 3, 32, 64))})
        >>> [basis.shape for basis in state.bases["kernel"]]
        [(32, 8), (64, 8)]
    """

    axes: Sequence[int]


_Numbers = GaLoreDimensionNumbers | TuckerDimensionNumbers
WeightDimensionNumbers = _Numbers | optax.Params | Callable[[optax.Params], optax.Params] | None


@dataclasses.dataclass(frozen=True)
class LeafView:
    """One leaf as a stack of matrices `(*batch, in, out)` or of tensors, and the way back.

    Attributes:
        shape: The leaf's own shape.
        batch_axes: Axes along which the matrices are stacked.
        modes: For each axis of a matrix or tensor, the leaf's axes that are merged into it.
        tensor: Whether each of them is projected by a basis of its own (Tucker).
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    modes: tuple[tuple[int, ...], ...]
    tensor: bool = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the stack; `()` where the leaf is one matrix."""
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of each matrix or tensor, `(in, out)` of a matrix."""
        return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.modes)

    @property
    def in_order(self) -> bool:
        """Whether the leaf itself is a matrix, or a stack of them, with its axes in that order."""
        one = all(len(axes) == 1 for axes in self.modes)
        return one and not self.tensor and self._order == tuple(range(len(self.shape)))

    def to_stack(self, leaf: Float[Array, "..."]) -> Float[Array, "*stack"]:
        """The leaf with its axes ordered and merged to `(*batch, *sizes)`."""
        return leaf.transpose(self._order).reshape(*self.batch_shape, *self.sizes)

    def from_stack(self, stack: Float[Array, "*stack"]) -> Float[Array, "..."]:
        """The inverse of `to_stack`."""
        split = stack.reshape([self.shape[axis] for axis in self._order])
        return split.transpose(sorted(range(split.ndim), key=self._order.__getitem__))

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + sum(self.modes, ())


def matrix_views(
    params: optax.Params, numbers: WeightDimensionNumbers
) -> list[tuple[str, LeafView | None]]:
    """Returns path and view of every leaf, in the order of `jax.tree.leaves`; None: unprojected."""
    leaves = [(jax.tree_util.keystr(key), x) for key, x in jax.tree.leaves_with_path(params)]
    for path, leaf in leaves:
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"params: {checks.said(leaf)} at {path} is not an array; give "
                f"jnp.asarray({checks.said(leaf)})"
            )
    if not leaves:  # as where optax.tree_utils.tree_map_params looks for params in a state
        return []
    numbers = matrices if numbers is None else numbers
    if _is_dimension_numbers(numbers):
        merged = [axis for _, axes in _named(numbers) for axis in _listed(axes)]
        needed = max(len(merged), *(axis + 1 if axis >= 0 else -axis for axis in merged))
        flat = [numbers if len(x.shape) >= needed and _projectable(x) else None for _, x in leaves]
    else:
        tree = numbers
        if callable(numbers):
            tree = checks.called(numbers, "weight_dimension_numbers", params)
        given, prefix = jax.tree.flatten(tree, is_leaf=_is_dimension_numbers)
        try:
            parts = prefix.flatten_up_to(params)
        except ValueError as error:
            raise ValueError(
                "weight_dimension_numbers: its tree is not a prefix of the params' tree; give one "
                f"with GaLoreDimensionNumbers or None for each leaf ({error})"
            ) from error
        # Leaf by leaf, since a None among the params, such as a bias left out, is not a leaf.
        pairs = zip(given, parts, strict=True)
        flat = [dims for dims, part in pairs for _ in jax.tree.leaves(part)]
    pairs = zip(leaves, flat, strict=True)
    return [(path, None if dims is None else _view(x, dims, path)) for (path, x), dims in pairs]


def matrices(params: optax.Params) -> optax.Params:
    """The dimension numbers of every leaf with two axes that is not a stack of vectors.

    A leaf `(n, m)`, n < m, is one (biases `(layers, out)`) if another leaf is a stack of as many
    arrays that have an axis of length m (kernels `(layers, in, out)`). So is any leaf with two axes
    in a subtree with such a leaf, of which all leaves have the same first axis. Attention's kernels
    `(width, heads, head_width)` do not make a stack of a kernel `(width, mlp_width)`.
    """
    leaves, tree = jax.tree.flatten_with_path(params)
    shapes = [tuple(x.shape) for _, x in leaves]
    sides = {(s[0], n) for s in shapes if len(s) > 2 for n in s[1:]}
    vectors = [len(s) == 2 and s[0] < s[1] and s in sides for s in shapes]
    subtrees: dict[Any, list[int]] = {}
    for i, (path, _) in enumerate(leaves):
        for end in range(len(path)):
            subtrees.setdefault(path[:end], []).append(i)
    for inside in subtrees.values():
        if len({shapes[i][:1] for i in inside}) == 1 and any(vectors[i] for i in inside):
            for i in inside:
                vectors[i] = True
    matrix = GaLoreDimensionNumbers()
    return tree.unflatten(
        matrix if len(x.shape) == 2 and _projectable(x) and not vector else None
        for (_, x), vector in zip(leaves, vectors, strict=True)
    )


def _view(leaf: Any, numbers: Any, path: str) -> LeafView:
    if not _is_dimension_numbers(numbers):
        raise ValueError(
            f"weight_dimension_numbers: {checks.said(numbers)} at {path} is neither "
            "GaLoreDimensionNumbers, "
            "nor TuckerDimensionNumbers, nor None"
        )
    ndim = len(leaf.shape)
    modes = [_axes(axes, name, path, ndim) for name, axes in _named(numbers)]
    if isinstance(numbers, TuckerDimensionNumbers):
        modes = [(axis,) for axis in modes[0]]
    named = sum(modes, ())
    if len({*named}) < len(named):
        raise ValueError(
            f"weight_dimension_numbers: {numbers} at {path} names an axis twice; each axis is in "
            "one place, or (not named) a batch axis"
        )
    real = _projectable(leaf) and not jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    if not real or leaf.dtype.itemsize < 2:
        raise ValueError(
            f"weight_dimension_numbers: the leaf at {path} has shape {leaf.shape} and dtype "
            f"{leaf.dtype}; only real floating-point matrices with elements, of 16 bits or more, "
            "can be projected: give None in its place to leave it to the inner transformation as "
            "it is"
        )
    batch = tuple(axis for axis in range(ndim) if axis not in named)
    tensor = isinstance(numbers, TuckerDimensionNumbers)
    return LeafView(tuple(leaf.shape), batch, tuple(modes), tensor)


def _is_dimension_numbers(x: Any) -> bool:
    # By attribute, so that optax.contrib's tuple of the same name is accepted, too.
    matrix = hasattr(x, "reduction_axis") and hasattr(x, "output_axis")
    matrix = matrix and not isinstance(x, type)
    return x is None or matrix or isinstance(x, TuckerDimensionNumbers)


def _named(numbers: Any) -> list[tuple[str, Any]]:
    """The fields of dimension numbers, each with the axes that it names."""
    tensor = isinstance(numbers, TuckerDimensionNumbers)
    names = ("axes",) if tensor else ("reduction_axis", "output_axis")
    return [(name, getattr(numbers, name)) for name in names]


def _listed(axes: Any) -> tuple[int, ...]:
    """One axis or several as a tuple."""
    given = tuple(axes) if isinstance(axes, list | tuple) else (axes,)
    if not given or not all(map(checks.indexes, given)):
        raise ValueError(
            f"weight_dimension_numbers: {checks.said(axes)} is neither the number of an axis nor "
            "a tuple of "
            "such numbers"
        )
    return tuple(map(operator.index, given))


def _axes(axes: int | Sequence[int], name: str, path: str, ndim: int) -> tuple[int, ...]:
    given = _listed(axes)
    if any(not -ndim <= axis < ndim for axis in given):
        raise ValueError(
            f"weight_dimension_numbers: {name}={axes} at {path} does not name axes of a leaf with "
            f"{ndim} axes; give numbers from {-ndim} to {ndim - 1}, or None to leave it unprojected"
        )
    return tuple(axis % ndim for axis in given)


def _projectable(leaf: Any) -> bool:
    # Complex ones pass here, and are refused by name later.
    return jnp.issubdtype(leaf.dtype, jnp.inexact) and math.prod(leaf.shape) > 0
