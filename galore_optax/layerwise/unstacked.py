"""`unstacked`: shows each layer of a stacked leaf to a transformation as a leaf of its own.

What a transformation does per leaf (a threshold on size, Adafactor's clipping, LAMB's trust ratio)
is otherwise done to the whole stack; a layer-wise update (`Layerwise`) does it to each layer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_optax import checks
from galore_optax.params import for_init, with_updates, with_variables, without_variables
from galore_optax.projection.dimension_numbers import LeafView
from galore_optax.projection.factored import as_arrays
from galore_optax.projection.leaf import Projection
from galore_optax.quantization.array import dequantized
from galore_optax.transformation import subspace_parts, transformation

ParamAxes = Callable[[Any], Any]  # described at `unstacked`


def unstacked(
    tx: optax.GradientTransformation, param_axes: ParamAxes
) -> optax.GradientTransformationExtraArgs:
    """Wraps `tx` so that it gets each layer of a stacked leaf as a leaf of its own.

    `galore` needs it only for leaves that it does not project: the matrices of a projected stack
    are separate leaves to its inner transformation anyway, unless that is elementwise. If `tx` has
    a subspace, so has the result. Its state is that of `tx` for params with a tuple of arrays
    instead of each stack.

    `param_axes` makes from the params a tree like them: for each leaf the number of its last axes
    that form one param; the axes before are those of a stack. None passes a leaf unchanged, as does
    a number that is not less than the leaf's.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import quantize_state, unstacked
        >>> params = {"norm": jnp.ones((8, 512)), "head": jnp.ones((512, 100))}
        >>> tx = unstacked(quantize_state(optax.adam(1e-3)), lambda _: {"norm": 1, "head": None})
        >>> mu = tx.init(params)[0].mu
        >>> len(mu["norm"]), mu["norm"][0].dtype, mu["head"].codes.dtype  # 512 are below 4,096
        (8, dtype('float32'), dtype('uint8'))
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"tx={checks.said(tx)} must be an optax.GradientTransformation")
    if not callable(param_axes):
        raise ValueError(
            f"param_axes={checks.said(param_axes)} must be a function from params to a tree like "
            "them"
        )
    kind = _Unstacked if subspace_parts(tx) is None else _UnstackedInParts
    return transformation(kind(optax.with_extra_args_support(tx), param_axes))


@dataclasses.dataclass(frozen=True)
class _Unstacked:
    tx: optax.GradientTransformationExtraArgs
    param_axes: ParamAxes

    def _stacks(self, params: optax.Params) -> tuple[list[Projection | None], Any]:
        leaves, tree = jax.tree.flatten_with_path(params)
        try:
            made = checks.called(self.param_axes, "param_axes", params)
            axes = tree.flatten_up_to(made)
        except ValueError as error:
            message = f"param_axes: it must return a tree like the params ({error})"
            raise ValueError(message) from error
        return [_stack(*pair, n) for pair, n in zip(leaves, axes, strict=True)], tree

    def _apart(self, params: optax.Params | None) -> Any:
        if params is None:
            return None
        params = dequantized(for_init(params))
        plans, tree = self._stacks(params)
        pairs = zip(plans, jax.tree.leaves(params), strict=True)
        return tree.unflatten([x if plan is None else plan.into((), x) for plan, x in pairs])

    def _together(self, params: optax.Params, like: optax.Params) -> optax.Params:
        like = dequantized(like)
        plans, tree = self._stacks(without_variables(like))
        triples = zip(plans, tree.flatten_up_to(params), jax.tree.leaves(like), strict=True)
        whole = [x if p is None else p.out_of((), tuple(as_arrays(x)), y) for p, x, y in triples]
        return with_variables(tree.unflatten(whole), like)

    def init(self, params: optax.Params) -> optax.OptState:
        return self.tx.init(self._apart(params))

    def update(
        self, updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        apart = self._apart(updates), state, self._apart(with_updates(params, updates))
        steps, state = self.tx.update(*apart, **extra_args)
        return self._together(steps, updates), state


class _UnstackedInParts(_Unstacked):
    """The transformation, with `galore_optax.transformation.SubspaceParts`."""

    @property
    def _parts(self) -> Any:
        return subspace_parts(self.tx)

    @property
    def needs_gradient(self) -> bool:
        return self._parts.needs_gradient

    @property
    def sum_over(self) -> tuple[str, ...]:
        return self._parts.sum_over

    def is_due(self, state: Any) -> Any:
        return self._parts.is_due(state)

    def refresh(
        self, gradient: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        own = self._apart(with_updates(params, gradient))
        return self._parts.refresh(self._apart(gradient), state, own, **extra_args)

    def project(self, gradient: optax.Updates, state: Any) -> optax.Updates:
        return self._parts.project(self._apart(gradient), state)

    def update_projected(
        self,
        projected: optax.Updates,
        state: Any,
        params: optax.Params,
        *,
        gradient: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        whole = self._apart(gradient) if self.needs_gradient else None
        steps, state = self._parts.update_projected(
            projected, state, self._apart(params), gradient=whole, **extra_args
        )
        return self._together(steps, params), state


def _stack(path: Any, leaf: Any, axes: int | None) -> Projection | None:
    """Returns a stack of unprojected leaves; None for a leaf that is not a stack."""
    if axes is None:
        return None
    name = jax.tree_util.keystr(path)
    if not checks.indexes(axes) or axes < 0:
        raise ValueError(
            f"param_axes: {checks.said(axes)} at {name} must be an integer of at least 0, or "
            "None to pass the "
            "leaf unchanged"
        )
    order = tuple(range(len(leaf.shape)))
    stacked = len(order) - axes
    if stacked <= 0:
        return None
    view = LeafView(tuple(leaf.shape), order[:stacked], tuple((axis,) for axis in order[stacked:]))
    return Projection(view, (), (), name)
