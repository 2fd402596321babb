"""Sums over devices in 8 bits, within `jax.shard_map`: a quarter of the bytes of float32.

Each device sends each other one a share of its numbers, as a reduce-scatter does, sums what it has
received in float32, and sends the sum to all. What its rounding leaves out, both times, a device
keeps, and adds to what it sends in the next step (error feedback, arXiv:1901.09847): over the steps
everything is sent. Perplexity is at least as good as after rounding at random, which keeps nothing
(benchmarks/RESULTS.md).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int8

from galore_optax.sharding import sum_of_all

# Numbers with one scale.
_BLOCK = 256
# Smaller arrays are sent as they are.
_LEAST = 4096

Errors = tuple[Array, ...]
"""What each device keeps of each large array, `(devices, *shape)`, in the order of the leaves."""


def errors_of(tree: Any, devices: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of the errors of sums of trees like this one; they start at zero."""
    large = [x for x in jax.tree.leaves(tree) if x.size >= _LEAST]
    return tuple(jax.ShapeDtypeStruct((devices, *x.shape), jnp.float32) for x in large)


def sum_in_8_bits(tree: Any, errors: Errors, axes: Sequence[str]) -> tuple[Any, Errors]:
    """As `sum_of_all`, for one mesh axis; not finite where a summand is not.

    `errors` are this device's, `(1, *shape)`. Returns the sums, and the new ones.
    """
    (axis,) = axes
    leaves, structure = jax.tree.flatten(tree)
    left, new = iter(errors), []
    for i, x in enumerate(leaves):
        if x.size < _LEAST:
            leaves[i] = sum_of_all(x, axes)
            continue
        leaves[i], error = _sum(x, next(left)[0], axis)
        new.append(error[None])
    return structure.unflatten(leaves), tuple(new)


def of_same_bases(errors: Errors, summed: Any, before: Any, after: Any) -> Errors:
    """Errors that are zero for matrices with a new basis, whose projected gradients they are not.

    `summed` is what they are to be added to: a tree like the bases, with arrays `(*batch, r, m)` at
    projected leaves, or tuples of `(r, m)`. The states are `GaLoreState`s.
    """
    renewed, first = after.refreshes != before.refreshes, 0
    flags: list[Bool[Array, "*batch 1 1"] | bool] = []
    pairs = (jax.tree.leaves(x, is_leaf=_is_part) for x in (after.bases, summed))
    for basis, small in zip(*pairs, strict=True):
        for x in jax.tree.leaves(small):
            new = False
            if _is_projected(basis):
                batch = x.shape[:-2]
                own = slice(first, first + math.prod(batch))
                new, first = renewed[own].reshape(*batch, 1, 1), own.stop
            flags += [new] if x.size >= _LEAST else []
    return tuple(jnp.where(new, 0, x) for new, x in zip(flags, errors, strict=True))


def _is_part(tree: Any) -> bool:
    return not isinstance(tree, dict)


def _is_projected(basis: Any) -> bool:
    """Whether a leaf has bases; a stack of vectors has a tuple of masked ones."""
    parts = basis if type(basis) is tuple else (basis,)
    return not any(isinstance(part, optax.MaskedNode) for part in parts)


def shared_out(errors: Errors, like: Any) -> Errors:
    """Gives each of other devices the mean of what all kept: the sum is what is added to a step."""

    def share(x: Array, wanted: Any) -> Array:
        return jnp.broadcast_to(jnp.sum(x, axis=0) / wanted.shape[0], wanted.shape)

    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(lambda xs: jax.tree.map(share, xs, like), out_shardings=shardings)(errors)


def _sum(x: Array, error: Array, axis: str) -> tuple[Array, Array]:
    count = jax.lax.axis_size(axis)
    padding = -x.size % (count * _BLOCK)
    blocks = jnp.pad((x + error).reshape(-1), (0, padding)).reshape(count, -1, _BLOCK)
    codes = _encoded(blocks)
    error = blocks - _decoded(*codes)
    own = jnp.sum(_decoded(*(jax.lax.all_to_all(y, axis, 0, 0) for y in codes)), axis=0)
    share = _encoded(own)
    error = error.at[jax.lax.axis_index(axis)].add(own - _decoded(*share))
    whole = _decoded(*(jax.lax.all_gather(y, axis) for y in share))
    whole, error = (y.reshape(-1)[: x.size].reshape(x.shape) for y in (whole, error))
    return whole.astype(x.dtype), error


def _encoded(
    blocks: Float[Array, "*n 256"],
) -> tuple[Int8[Array, "*n 256"], Float[Array, "*n 1"]]:
    """Codes and the scale of each block, NaN for one that is not finite."""
    # XLA's maximum on a CPU passes NaN over in arrays of some length (jaxlib 0.10).
    finite = jnp.all(jnp.isfinite(blocks), axis=-1, keepdims=True)
    scale = jnp.where(finite, jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127, jnp.nan)
    shares = jnp.where(scale > 0, blocks / scale, 0)
    return jnp.clip(jnp.round(shares), -127, 127).astype(jnp.int8), scale


def _decoded(codes: Int8[Array, "*n 256"], scale: Float[Array, "*n 1"]) -> Float[Array, "*n 256"]:
    return codes.astype(jnp.float32) * scale
