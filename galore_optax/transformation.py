"""Gradients of microbatches, summed as they are or in GaLore's subspace.

A projection is linear: Σ PᵀGᵢ = Pᵀ ΣGᵢ. Of each matrix the sum takes rank / min(in, out) of the
memory of a gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


class SubspaceTransformation(optax.GradientTransformationExtraArgs):
    """A transformation in a subspace, whose update can be made in parts.

    `updates, state = tx.update(gradient, state, params)` is the same as

        state = tx.refresh(gradient, state, params)
        projected = tx.project(gradient, state)
        updates, state = tx.update_projected(projected, state, params)

    A step counts where it is finished, in the third part. A refresh that is due is made by the
    first gradient that can make it, and is not due any more then: the first two parts may be called
    for one microbatch after the other.

    Attributes:
        refresh: From a gradient, the state and params (None will do where no moments are reset) to
            the state with new bases where they are due. Extra arguments: `layer` and `layers`, as
            the update's.
        project: From a gradient and the state to the projected gradient, of which sums can be
            taken: R at a projected leaf, of a stack of matrices a tuple of them, and other leaves
            as they are.
        update_projected: From the projected gradient, the state, the params and the update's extra
            arguments to updates and new state.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import galore
        >>> params = {"w": jnp.ones((64, 256)), "b": jnp.zeros(256)}
        >>> tx = galore(8, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
        >>> state, total = tx.init(params), None
        >>> for x in jax.random.normal(jax.random.key(0), (4, 16, 64)):  # four microbatches
        ...     grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2) / 4)(params)
        ...     state = tx.refresh(grads, state)
        ...     projected = tx.project(grads, state)
        ...     total = projected if total is None else jax.tree.map(jnp.add, total, projected)
        >>> total["w"].shape, total["b"].shape
        ((8, 256), (256,))
        >>> updates, state = tx.update_projected(total, state, params)
        >>> params = optax.apply_updates(params, updates)
    """

    refresh: Callable[..., Any]
    project: Callable[..., Any]
    update_projected: Callable[..., Any]

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        refresh: Callable[..., Any],
        project: Callable[..., Any],
        update_projected: Callable[..., Any],
    ) -> "SubspaceTransformation":
        """From a transformation's two functions and the three parts of its update."""
        self = super().__new__(cls, init, update)
        self.refresh, self.project, self.update_projected = refresh, project, update_projected
        return self


def over_microbatches(function: Callable[..., tuple[Any, Any]], *batches: Any) -> tuple[Any, Any]:
    """Runs a function on one microbatch after the other.

    Args:
        function: From what one microbatch has of `batches` to two trees.
        *batches: Trees of arrays with a first axis of microbatches.

    Returns:
        The sum of its first results, taken in float32 and given in their own dtype, and its second
        ones with a first axis of microbatches.
    """
    first = jax.tree.map(lambda x: x[0], batches)
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        summed, kept = function(*first)
        return summed, jax.tree.map(lambda x: x[None], kept)

    def add(total: Any, batch: Any) -> tuple[Any, Any]:
        own, kept = function(*batch)
        return _plus(total, own), kept

    shapes, _ = jax.eval_shape(function, *first)
    total, kept = jax.lax.scan(add, _zeros(shapes), batches)
    return _in_dtypes_of(shapes, total), kept


def over_microbatches_in_subspace(
    tx: SubspaceTransformation,
    state: optax.OptState,
    params: optax.Params,
    function: Callable[..., tuple[optax.Updates, Any]],
    *batches: Any,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState, Any]:
    """As `over_microbatches`, where the first results are gradients, which are summed projected.

    Args:
        tx: The transformation.
        state: Its state. Refreshes that are due are made from the first microbatch's gradient.
        params: The params.
        function: From what one microbatch has of `batches` to its gradient and another tree.
        *batches: Trees of arrays with a first axis of microbatches.
        **extra_args: Of the transformation's refresh.

    Returns:
        The sum, for `tx.update_projected`, the state, and the second results with a first axis of
        microbatches.
    """

    def add(carry: Any, batch: Any) -> tuple[Any, Any]:
        total, state = carry
        gradient, kept = function(*batch)
        state = tx.refresh(gradient, state, params, **extra_args)
        return (_plus(total, tx.project(gradient, state)), state), kept

    def projected(state: optax.OptState, *batch: Any) -> optax.Updates:
        return tx.project(function(*batch)[0], state)

    shapes = jax.eval_shape(projected, state, *jax.tree.map(lambda x: x[0], batches))
    (total, state), kept = jax.lax.scan(add, (_zeros(shapes), state), batches)
    return _in_dtypes_of(shapes, total), state, kept


def _zeros(shapes: PyTree) -> PyTree:
    """Of at least float32."""
    return jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )


def _plus(total: PyTree, own: PyTree) -> PyTree:
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, own)


def _in_dtypes_of(shapes: PyTree, total: PyTree) -> PyTree:
    return jax.tree.map(lambda t, s: t.astype(s.dtype), total, shapes)
