"""Gradients summed over microbatches, as they are or projected into GaLore's subspace.

A projection is linear, Σ PᵀGᵢ = Pᵀ ΣGᵢ, so the sum of projected gradients takes rank / min(in, out)
of a gradient's memory for each matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from galore_optax.transformation import SubspaceParts


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
    tx: SubspaceParts,
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
