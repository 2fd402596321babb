"""One layer of a LLaMA: RMSNorm, attention, SwiGLU; and the embedding that comes before.

Letters: B batch, L length, D width, F MLP width, N query heads, G KV heads, K a head's width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from galore_optax.adapters.base import product
from galore_optax.quantization.array import dequantized
from models.llama.attention import Rotary, Sequences, causal_attention, rotate
from models.llama.config import LlamaConfig, Params

# From queries (B, L, N, K), keys and values (B, L, G, K) to their mixture (B, L, N, K).
Attend = Callable[[Array, Array, Array], Array]

# Attention's products and its rotated arguments, and the outputs of the linear layers: an adapter's
# output is the sum of several products of its size, which need not be kept.
_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.save_only_these_names("product", "rotated"),
)


def keep_products(primitive: Any, *args: Any, **params: Any) -> Any:
    """A policy of `jax.checkpoint`: keeps products, and what cuDNN's attention makes of them."""
    return "dot_product_attention_fwd" in primitive.name or _PRODUCTS(primitive, *args, **params)


def embed(config: LlamaConfig, embedding: Any, ids: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
    """Returns the residual stream before the first layer; the embedding may be quantized."""
    return rows_of(dequantized(embedding), ids).astype(config.dtype)


def rows_of(table: Float[Array, "V D"], ids: Int[Array, "*B L"]) -> Float[Array, "*B L D"]:
    """Returns rows of a table, whose gradient is summed in float32 or wider.

    In bfloat16 the sum of a frequent token's gradients, added one by one, would be 10% off for 8192
    of random signs, and would stop at 256 equal ones.
    """
    wide = jnp.promote_types(table.dtype, jnp.float32)
    return table.astype(wide)[ids].astype(table.dtype)


def training_layer(
    config: LlamaConfig, sequences: Sequences, params: Params, hidden: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
    """Applies one layer to whole sequences; the config decides what the backward pass keeps."""

    def layer(params: Params, hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        def attend(query: Array, key: Array, value: Array) -> Array:
            return causal_attention(config, query, key, value, sequences.mask)

        return apply_layer(config, params, hidden, sequences.rotary, attend)

    # Norms and softmax take less time to compute again than to write and read.
    policy = None if config.rematerialize else keep_products
    # XLA never merges a loop's body with its recomputation. Without a loop a barrier prevents it;
    # weights are never made again, and behind a barrier a layer's would be copied out of the stack.
    barriers = False, not config.scan
    return jax.checkpoint(layer, prevent_cse=barriers, policy=policy)(params, hidden)


def apply_layer(
    config: LlamaConfig, params: Params, hidden: Array, rotary: Rotary, attend: Attend
) -> Float[Array, "B L D"]:
    """Adds attention and then the MLP, each of the normalised stream, to the residual stream.

    `params` are one layer's; `attend` is given the rotated queries and keys, and the values.
    """

    def heads(x: Float[Array, "B L NK"]) -> Float[Array, "B L N K"]:
        return x.reshape(*x.shape[:2], -1, config.head_width)

    def apply(group: str, name: str, x: Float[Array, "B L in"]) -> Float[Array, "B L out"]:
        y = linear(x, params[group][name])
        biases = params.get(f"{group}_bias")
        return y if biases is None else y + biases[name].astype(y.dtype)

    x = rms_norm(hidden, params["attention_norm"], config.norm_eps)
    query = checkpoint_name(rotate(heads(apply("attention", "query", x)), rotary), "rotated")
    key = checkpoint_name(rotate(heads(apply("attention", "key", x)), rotary), "rotated")
    mixed = attend(query, key, heads(apply("attention", "value", x)))
    hidden = hidden + apply("attention", "out", mixed.reshape(*mixed.shape[:2], -1))

    x = rms_norm(hidden, params["mlp_norm"], config.norm_eps)
    activation = gated(apply("mlp", "gate", x), apply("mlp", "up", x))
    return hidden + apply("mlp", "down", activation)


def linear(x: Float[Array, "B L in"], weight: Any) -> Float[Array, "B L out"]:
    """Multiplies by a matrix (in, out), quantized matrix or adapter."""
    # With rows along one axis the weight's gradient is xᵀg. For a (B, L, out) gradient XLA's CPU
    # backend makes a transposed copy first, which takes longer than the product.
    rows = checkpoint_name(product(x.reshape(-1, x.shape[-1]), weight), "product")
    return rows.reshape(*x.shape[:-1], -1)


@partial(jax.checkpoint, prevent_cse=False)  # on a GPU one kernel makes all that its backward needs
def gated(gate: Float[Array, "B L F"], up: Float[Array, "B L F"]) -> Float[Array, "B L F"]:
    """Returns SwiGLU (arXiv:2002.05202); the backward pass keeps only its arguments."""
    return jax.nn.silu(gate) * up


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Returns x / rms(x) · weight over the last axis, computed in float32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight.astype(x.dtype)
