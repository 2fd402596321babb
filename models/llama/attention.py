"""Attention over whole sequences: rotary positions, masks, and which implementation computes it.

Letters: *A no axis or one of microbatches, B batch, L length, N query heads, G key and value heads,
K a head's width.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from galore_optax import rows
from models.llama.config import AttentionImplementation, LlamaConfig
from models.llama.rope import frequencies

Rotary = tuple[Float[Array, "*A B L 1 K/2"], Float[Array, "*A B L 1 K/2"]]

# Bytes of float32 attention weights that exist at once, where no fused kernel avoids them.
_ATTENTION_BYTES = 2**25


class Sequences(NamedTuple):
    """What every layer needs to know about a batch of whole sequences."""

    rotary: Rotary
    # True where a query (second last axis) may attend to a key (last axis), if that is not later.
    # None: a query may attend to all keys that are not later.
    mask: Bool[Array, "*A B 1 L L"] | None


def sequences_of(
    config: LlamaConfig, positions: Int[Array, "*A B L"], segment_ids: Array | None = None
) -> Sequences:
    """Returns the angles and the mask; `segment_ids` number the documents within each row."""
    config.check_length(positions.shape[-1])
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[..., :, None] == segment_ids[..., None, :])[..., None, :, :]
    return Sequences(rotary_angles(config, positions), mask)


def rotary_angles(config: LlamaConfig, positions: Int[Array, "*A B L"]) -> Rotary:
    """Returns float32 cosines and sines of the positions' angles (arXiv:2104.09864, 3.2.2).

    With `dynamic` scaling the angles depend on the largest position in a row; keys of a cache keep
    those of the time when they were computed, as in transformers.
    """
    rates = frequencies(config.rope_theta, config.head_width, config.rope_scaling, positions)
    angles = positions[..., None, None].astype(jnp.float32) * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L N K"], rotary: Rotary) -> Float[Array, "B L N K"]:
    """Rotates each head's vector by its position.

    Component i is paired with i + K/2, as in Hugging Face's checkpoints, not with its neighbour as
    in the paper; that permutes the columns of the query's and the key's weights.
    """
    cos, sin = rotary
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_attention(
    config: LlamaConfig,
    query: Float[Array, "B L N K"],
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    mask: Bool[Array, "B 1 L L"] | None,
) -> Float[Array, "B L N K"]:
    """Returns causal attention over whole sequences; XLA takes a few rows of a batch at a time."""

    def attend(arrays: tuple[Array, Array, Array, Array | None]) -> Float[Array, "b L N K"]:
        query, key, value, mask = arrays
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, implementation=config.attention
        )

    if config.heads_at is not None:
        at = config.heads_at
        query, key, value = jax.lax.with_sharding_constraint((query, key, value), at)
        if mask is not None:
            whole = at.update(spec=PartitionSpec(at.spec[0]))
            mask = jax.lax.with_sharding_constraint(mask, whole)
    arrays = query, key, value, mask
    batch, length, heads, _ = query.shape
    weight_bytes = 4 * batch * heads * length**2 if config.attention == "xla" else 0
    parts = rows.parts(batch, math.ceil(weight_bytes / _ATTENTION_BYTES), config.batch_shards)
    if parts == 1:
        return attend(arrays)

    def cut(x: Array) -> Array:
        # Part i has the rows i, i + parts, ...: some rows of each device.
        return jnp.moveaxis(x.reshape(batch // parts, parts, *x.shape[1:]), 1, 0)

    attended = jax.lax.map(jax.checkpoint(attend), jax.tree.map(cut, arrays))
    return jnp.moveaxis(attended, 0, 1).reshape(query.shape)


def attention_implementation(
    config: LlamaConfig, device: Any, length: int
) -> AttentionImplementation:
    """Returns the fastest implementation of `jax.nn.dot_product_attention` that a device can run.

    cuDNN's flash attention takes 16-bit floats, heads up to 128 wide in multiples of 8, NVIDIA GPUs
    from compute capability 8.0 and, where documents are masked, an even length in tokens.
    """
    version = device.client.platform_version
    if device.client.runtime_type == "compile_only_runtime":
        # Such a device tells no capability; `train.memory.cards` refuses those below 8.0.
        gpu = "NVIDIA" in version
    else:
        gpu = "cuda" in version and float(device.compute_capability) >= 8.0
    floats = config.dtype in (jnp.bfloat16, jnp.float16)
    heads = config.head_width in range(8, 129, 8)
    return "cudnn" if gpu and floats and heads and length % 2 == 0 else "xla"
