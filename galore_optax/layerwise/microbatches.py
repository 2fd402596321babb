"""Gradients summed over microbatches, as they are or projected into GaLore's subspace.

A projection is linear, Σ PᵀGᵢ = Pᵀ ΣGᵢ, so the sum of projected gradients takes rank / min(in, out)
of a gradient's memory for each matrix. Here batches are cut already (`train.step.microbatches`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.transformation import SubspaceParts


def over_microbatches(function: Callable[..., tuple[Any, Any]], *batches: Any) -> tuple[Any, Any]:
    """Runs a function on each microbatch (the first axis of `batches`), one after the other.

    Returns the sum of the first trees that it returns, taken in float32 and in their own dtypes,
    and the second trees, stacked along a first axis of microbatches.
    """
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        total, kept = function(*jax.tree.map(lambda x: x[0], batches))
        return total, jax.tree.map(lambda x: x[None], kept)

    def stateless(_: Any, *batch: Any) -> tuple[Any, Any, Any]:
        own, kept = function(*batch)
        return own, (), kept

    total, _, kept = _summed(stateless, (), batches)
    return total, kept


def over_microbatches_in_subspace(
    tx: SubspaceParts, state: Any, params: Any, function: Callable, *batches: Any, **extra_args: Any
) -> tuple[optax.Updates, optax.OptState, Any]:
    """As `over_microbatches`; the first trees are gradients, which are projected and then summed.

    The first microbatch's gradient refreshes the bases that are due, with the `extra_args`. Returns
    the sum, for `tx.update_projected`, the new state, and the second trees, stacked.
    """

    def projected(state: optax.OptState, *batch: Any) -> tuple[Any, Any, Any]:
        gradient, kept = function(*batch)
        state = tx.refresh(gradient, state, params, **extra_args)
        return tx.project(gradient, state), state, kept

    return _summed(projected, state, batches)


def _summed(
    function: Callable[..., tuple[Any, Any, Any]], state: Any, batches: tuple[Any, ...]
) -> tuple[Any, Any, Any]:
    """Sums a function's first results in float32, with a state in the carry; stacks its third."""
    own, _, _ = jax.eval_shape(function, state, *jax.tree.map(lambda x: x[0], batches))

    def zeros(x: jax.ShapeDtypeStruct) -> Any:
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    def add(carry: Any, batch: Any) -> tuple[Any, Any]:
        total, state = carry
        own, state, kept = function(state, *batch)
        return (jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, own), state), kept

    (total, state), kept = jax.lax.scan(add, (jax.tree.map(zeros, own), state), batches)
    return jax.tree.map(lambda t, x: t.astype(x.dtype), total, own), state, kept
