"""`unstacked`: every layer of a stacked leaf as a leaf of its own, to any optax transformation.

The layers of a scanned model are stacked in one leaf. What a transformation does by leaf (a
threshold on size, Adafactor's clipping, LAMB's trust ratio) it would do to all of them together;
an update layer by layer (`galore_optax.layerwise.step`) does it to each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.nnx_variables import without_variables
from galore_optax.projection.dimension_numbers import LeafView
from galore_optax.projection.leaf import Projection
from galore_optax.quantization.array import dequantized
from galore_optax.transformation import subspace_parts, transformation

ParamAxes = Callable[[Any], Any]
"""From params to a tree like them: how many of a leaf's last axes are one param's, or None."""


def unstacked(
    tx: optax.GradientTransformation, param_axes: ParamAxes
) -> optax.GradientTransformationExtraArgs:
    """`tx`, which is given what is stacked in a leaf as leaves of their own.

    `galore` needs it only for what it does not project: the matrices of a stack are leaves of their
    own to its inner transformation anyway.

    Args:
        tx: The transformation. What `galore` gives can be updated in parts afterwards, too.
        param_axes: From the params to a tree like them: of a leaf, how many of its last axes are
            one param's, so that the axes before are those of a stack; None hands it on whole. A
            leaf with no more axes than that is no stack, and is handed on as it is.

    Returns:
        The transformation. Its state is that of `tx` for params that have a tuple of arrays in the
        place of a stack, in the order of its axes.

    Raises:
        ValueError: If `tx` is no transformation or `param_axes` no function; at `init`, if what it
            gives is no tree like the params, or a number of axes none.

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
        raise ValueError(f"tx={tx!r} is no optax.GradientTransformation; give one")
    if not callable(param_axes):
        raise ValueError(
            f"param_axes={param_axes!r} is no function; give one from params to a tree like them"
        )
    extra = optax.with_extra_args_support(tx)

    def stacks(params: optax.Params) -> tuple[list[Projection | None], Any]:
        leaves, tree = jax.tree.flatten_with_path(params)
        try:
            axes = tree.flatten_up_to(param_axes(params))
        except ValueError as error:
            raise ValueError(f"param_axes: it gives no tree like the params ({error})") from error
        return [_stack(*pair, n) for pair, n in zip(leaves, axes, strict=True)], tree

    def apart(params: optax.Params) -> optax.Params:
        params = dequantized(jax.tree.map(_concrete, without_variables(params)))
        plans, tree = stacks(params)
        pairs = zip(plans, jax.tree.leaves(params), strict=True)
        return tree.unflatten([x if plan is None else plan.into((), x) for plan, x in pairs])

    def together(params: optax.Params, like: optax.Params) -> optax.Params:
        like = dequantized(without_variables(like))
        plans, tree = stacks(like)
        triples = zip(plans, tree.flatten_up_to(params), jax.tree.leaves(like), strict=True)
        return tree.unflatten([x if p is None else p.out_of((), x, y) for p, x, y in triples])

    def given(params: optax.Params | None) -> optax.Params | None:
        return None if params is None else apart(params)

    class Unstacked:
        """The transformation."""

        def init(self, params: optax.Params) -> optax.OptState:
            return tx.init(apart(params))

        def update(
            self,
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None = None,
            **extra_args: Any,
        ) -> tuple[optax.Updates, optax.OptState]:
            steps, state = extra.update(apart(updates), state, given(params), **extra_args)
            return together(steps, updates), state

    parts = subspace_parts(tx)
    if parts is None:
        return transformation(Unstacked())

    class InParts(Unstacked):
        """The transformation, with `galore_optax.transformation.SubspaceParts`."""

        def refresh(
            self, gradient: optax.Updates, state: Any, params: Any = None, **extra_args: Any
        ) -> Any:
            return parts.refresh(apart(gradient), state, given(params), **extra_args)

        def project(self, gradient: optax.Updates, state: Any) -> optax.Updates:
            return parts.project(apart(gradient), state)

        def update_projected(
            self, projected: optax.Updates, state: Any, params: optax.Params, **extra_args: Any
        ) -> tuple[optax.Updates, Any]:
            steps, state = parts.update_projected(projected, state, apart(params), **extra_args)
            return together(steps, params), state

    return transformation(InParts())


def _concrete(x: Any) -> Any:
    """Zeros in the place of a shape and dtype alone, which `init` may be given."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _stack(path: Any, leaf: Any, axes: int | None) -> Projection | None:
    """A stack of what is not projected at all; None of what is no stack."""
    if axes is None:
        return None
    if isinstance(axes, bool) or not hasattr(axes, "__index__") or axes < 0:
        raise ValueError(
            f"param_axes: {axes!r} at {jax.tree_util.keystr(path)} is no number of axes; give 0 or "
            "more, or None to hand the leaf on whole"
        )
    stacked = max(len(leaf.shape) - axes, 0)
    if not stacked:
        return None
    order = tuple(range(len(leaf.shape)))
    view = LeafView(tuple(leaf.shape), order[:stacked], tuple((axis,) for axis in order[stacked:]))
    return Projection(view, (), (), jax.tree_util.keystr(path))
