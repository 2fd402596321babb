"""LLaMA in Flax NNX: whole sequences for training, and a KV cache for decoding.

Weights are (in, out) matrices, stacked over the layers, so that an optimizer sees one leaf per kind
of matrix, and by default run by `jax.lax.scan`, so that compile time does not grow with depth.

Letters: B batch, L length, S cached length, D width, G KV heads, K a head's width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from galore_optax.quantization.array import dequantized
from models.llama.attention import rotary_angles, sequences_of
from models.llama.config import LlamaConfig, Params, Weight, weight_table
from models.llama.layer import apply_layer, embed, rms_norm, training_layer


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, for `Llama.decode`."""

    key: Float[Array, "layers B S G K"]
    value: Float[Array, "layers B S G K"]
    length: Int[Array, ""]  # the number of the S positions that are filled


class Llama(nnx.Module):
    """A LLaMA: `rngs.params` draws matrices from normal(0, 0.02), as Hugging Face; norms are 1.

    Biases are 0. If the config says `tied`, there is no `head`: it is the embedding.
    """

    embedding: nnx.Param
    layers: Params
    norm: nnx.Param
    head: nnx.Param

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        for name, weights in init_params(config, rngs.params()).items():
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, weights)))

    def __call__(self, token_ids: Int[Array, "B L"], **places: Any) -> Float[Array, "B L V"]:
        """Returns float32 logits of the token after each position; arguments as for `hidden`."""
        return self.logits(self.hidden(token_ids, **places))

    def hidden(
        self,
        token_ids: Int[Array, "B L"],
        *,
        positions: Int[Array, "B L"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Returns the input of the head: the last layer's output, normalised.

        `positions` are those of the rotary embedding, by default counted from the row's start. A
        token sees earlier tokens of its own segment (document) only; by default a row is one.
        ValueError if L is above `config.max_length`.
        """
        config = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
        sequences = sequences_of(config, positions, segment_ids)

        def step(hidden: Array, layer: Params) -> tuple[Array, None]:
            return training_layer(config, sequences, layer, hidden), None

        hidden = embed(config, self.embedding.get_value(), token_ids)
        stacks = nnx.to_pure_dict(nnx.state(self.layers))
        if config.scan:
            hidden, _ = jax.lax.scan(step, hidden, stacks)
        else:
            for layer in _one_by_one(stacks, config.layers):
                hidden, _ = step(hidden, layer)
        return rms_norm(hidden, self.norm[...], config.norm_eps)

    def logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Multiplies hidden states by the head, to float32 logits."""
        head = self.head_matrix().astype(self.config.dtype)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(rows, head.T, preferred_element_type=jnp.float32)
        return logits.reshape(*hidden.shape[:-1], -1)

    def head_matrix(self) -> Float[Array, "V D"]:
        """Returns the head's weights, dequantized; tied, they are the embedding's."""
        return dequantized((self.embedding if self.config.tied else self.head).get_value())

    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """Returns an empty cache for `decode` with room for B rows of S tokens."""
        config = self.config
        config.check_length(length)
        shape = (config.layers, batch_size, length, config.kv_heads, config.head_width)
        empty = jnp.zeros(shape, config.dtype)
        return KVCache(empty, empty, jnp.zeros((), jnp.int32))

    def decode(
        self, token_ids: Int[Array, "B L"], cache: KVCache
    ) -> tuple[Float[Array, "B L V"], KVCache]:
        """Returns the logits of the next L tokens of each row, and the cache with them added.

        L is the whole prompt at first (prefill), then usually 1; `cache.length + L` must not exceed
        S. Attention is always XLA's here: cuDNN's flash attention is made for long queries.
        """
        config = self.config
        new = jnp.arange(token_ids.shape[1], dtype=jnp.int32) + cache.length
        rotary = rotary_angles(config, jnp.broadcast_to(new, token_ids.shape))
        mask = (jnp.arange(cache.key.shape[2]) <= new[:, None])[None, None]  # (1, 1, L, S)

        def step(carry, layer):
            hidden, keys, values = carry
            index, layer_params = layer

            def attend(query, key, value):
                # The stacks stay in the carry, where XLA updates them in place.
                nonlocal keys, values
                # Of one type with 64-bit numbers enabled, too.
                start = tuple(map(jnp.int32, (index, 0, cache.length, 0, 0)))
                keys = jax.lax.dynamic_update_slice(keys, key[None], start)
                values = jax.lax.dynamic_update_slice(values, value[None], start)
                return jax.nn.dot_product_attention(
                    query, keys[index], values[index], mask=mask, implementation="xla"
                )

            hidden = apply_layer(config, layer_params, hidden, rotary, attend)
            return (hidden, keys, values), None

        hidden = embed(config, self.embedding.get_value(), token_ids)
        layers = (jnp.arange(config.layers), nnx.to_pure_dict(nnx.state(self.layers)))
        carry, _ = jax.lax.scan(step, (hidden, cache.key, cache.value), layers)
        hidden = rms_norm(carry[0], self.norm[...], config.norm_eps)
        return self.logits(hidden), KVCache(carry[1], carry[2], cache.length + token_ids.shape[1])


def _one_by_one(stacks: Params, layers: int) -> list[Params]:
    """Cuts stacks into layers. Gradients are stacked again, not padded to stacks and added."""

    @jax.custom_vjp
    def cut(x: Array) -> tuple[Array, ...]:
        return tuple(x[i] for i in range(layers))

    cut.defvjp(lambda x: (cut(x), None), lambda _, gradients: (jnp.stack(gradients),))
    leaves, tree = jax.tree.flatten(stacks)
    return [tree.unflatten(layer) for layer in zip(*map(cut, leaves), strict=True)]


def init_params(
    config: LlamaConfig,
    key: PRNGKeyArray,
    store: Callable[[Params, PRNGKeyArray], Params] = lambda part, _: part,
) -> Params:
    """Draws random weights of a LLaMA; see `draw_params`."""
    return draw_params(weight_table(config), config.layers, config.param_dtype, key, store)


def draw_params(
    table: dict[str, Any],
    layers: int,
    dtype: DTypeLike,
    key: PRNGKeyArray,
    store: Callable[[Params, PRNGKeyArray], Params] = lambda part, _: part,
) -> Params:
    """Draws the weights of a table, a layer at a time, so that temporaries have one layer's size.

    `store` gets one layer's params under "layers", or all other params, and a key, and returns them
    as they are to be stored, such as quantized.
    """

    def draw(weight: Weight, shape: tuple[int, ...], key: PRNGKeyArray) -> Float[Array, "..."]:
        if weight.fill is not None:
            return jnp.full(shape, weight.fill, dtype)
        parts = math.gcd(shape[0], 32) if math.prod(shape) > 2**24 else 1
        rows = (shape[0] // parts, *shape[1:])

        def normal(key: PRNGKeyArray) -> Array:
            # In float32: JAX makes a bfloat16 normal number from 7 random bits.
            wide = jnp.promote_types(dtype, jnp.float32)
            return (0.02 * jax.random.normal(key, rows, wide)).astype(dtype)

        return jax.lax.map(normal, jax.random.split(key, parts)).reshape(shape)

    def part(table: dict[str, Any], stacked: int, key: PRNGKeyArray) -> Params:
        weights, tree = jax.tree.flatten(table, is_leaf=lambda x: isinstance(x, Weight))
        own, *keys = jax.random.split(key, 1 + len(weights))
        pairs = zip(weights, keys, strict=True)
        return store(tree.unflatten([draw(w, w.shape[stacked:], k) for w, k in pairs]), own)

    own = {"layers": table["layers"]}
    others = {name: weights for name, weights in table.items() if name != "layers"}
    key, *keys = jax.random.split(key, 1 + layers)
    stack = jax.lax.map(lambda key: part(own, 1, key)["layers"], jnp.stack(keys))
    return {**part(others, 0, key), "layers": stack}
