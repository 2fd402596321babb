"""Sums over devices in 8 bits, within `jax.shard_map`: a quarter of the bytes of float32.

Each device sends each other one a share of its numbers, as a reduce-scatter does, sums what it has
received in float32, and sends the sum to all. Both times numbers are rounded at random, so that
they are right on average. Adding the rounding error to the next step's numbers instead (error
feedback) would need a state on each device, and a run could not go on with other devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Key

from galore_optax.sharding import sum_of_all

# Numbers with one scale.
_BLOCK = 256
# Smaller arrays are sent as they are.
_LEAST = 4096


def sum_in_8_bits(tree: Any, axes: Sequence[str], key: Key[Array, ""]) -> Any:
    """As `sum_of_all`, for one mesh axis; not finite where a summand is not."""
    (axis,) = axes
    key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    leaves, structure = jax.tree.flatten(tree)
    large = [i for i, x in enumerate(leaves) if x.size >= _LEAST]
    keys = jax.random.split(key, len(leaves))
    small = [x for i, x in enumerate(leaves) if i not in large]
    small = iter(sum_of_all(small, axes))
    sums = [_sum(x, axis, keys[i]) if i in large else next(small) for i, x in enumerate(leaves)]
    return structure.unflatten(sums)


def _sum(x: Array, axis: str, key: Key[Array, ""]) -> Array:
    count, first, second = jax.lax.axis_size(axis), *jax.random.split(key)
    padding = -x.size % (count * _BLOCK)
    blocks = jnp.pad(x.reshape(-1).astype(jnp.float32), (0, padding)).reshape(count, -1, _BLOCK)
    own = _decoded(*(jax.lax.all_to_all(y, axis, 0, 0) for y in _encoded(blocks, first)))
    shares = _encoded(jnp.sum(own, axis=0), second)
    whole = _decoded(*(jax.lax.all_gather(y, axis) for y in shares))
    return whole.reshape(-1)[: x.size].reshape(x.shape).astype(x.dtype)


def _encoded(
    blocks: Float[Array, "*n 256"], key: Key[Array, ""]
) -> tuple[Int8[Array, "*n 256"], Float[Array, "*n 1"]]:
    """Codes and the scale of each block, NaN for one that is not finite."""
    # XLA's maximum on a CPU passes NaN over in arrays of some length (jaxlib 0.10).
    finite = jnp.all(jnp.isfinite(blocks), axis=-1, keepdims=True)
    scale = jnp.where(finite, jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127, jnp.nan)
    shares = jnp.where(scale > 0, blocks / scale, 0)
    rounded = jnp.floor(shares + jax.random.uniform(key, blocks.shape))
    return jnp.clip(rounded, -127, 127).astype(jnp.int8), scale


def _decoded(codes: Int8[Array, "*n 256"], scale: Float[Array, "*n 1"]) -> Float[Array, "*n 256"]:
    return codes.astype(jnp.float32) * scale
