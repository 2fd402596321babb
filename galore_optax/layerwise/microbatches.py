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

from galore_optax.transformation import SubspaceTransformation


def over_microbatches(function: Callable[..., tuple[Any, Any]], *batches: Any) -> tuple[Any, Any]:
    """Runs a function on each microbatch, one after the other.

    Args:
        function: From a microbatch of each of `batches` to two trees.
        *batches: Trees of arrays with a first axis of microbatches.

    Returns:
        The sum of the first trees, taken in float32 and returned in their own dtypes, and the
        second trees, stacked along a first axis of microbatches.
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
    return _cast(total, shapes), kept


def over_microbatches_in_subspace(
    tx: SubspaceTransformation,
    state: optax.OptState,
    params: optax.Params,
    function: Callable[..., tuple[optax.Updates, Any]],
    *batches: Any,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState, Any]:
    """As `over_microbatches`, with gradients as the first trees, which are summed projected.

    Args:
        tx: The transformation.
        state: Its state. The first microbatch's gradient refreshes the bases that are due.
        params: The params.
        function: From a microbatch of each of `batches` to its gradient and another tree.
        *batches: Trees of arrays with a first axis of microbatches.
        **extra_args: For the transformation's refresh.

    Returns:
        The sum, for `tx.update_projected`, the state, and the other trees, stacked.
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
    return _cast(total, shapes), state, kept


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )


def _plus(total: PyTree, own: PyTree) -> PyTree:
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, own)


def _cast(total: PyTree, shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda t, s: t.astype(s.dtype), total, shapes)
