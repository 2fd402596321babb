"""BERT and RoBERTa in Flax NNX: hidden states, the pooler and the classifier.

Weights are (in, out) matrices, stacked over the layers and run by `jax.lax.scan`, as a LLaMA's.

Letters: B batch, L length, D width, N heads, K a head's width, C classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from galore_optax.adapters.lora import dropout
from galore_optax.quantization.array import dequantized
from models.encoder.config import EncoderConfig, weight_table
from models.llama.config import Params
from models.llama.layer import keep_products, linear, rows_of
from models.llama.model import draw_params


class Encoder(nnx.Module):
    """A BERT or RoBERTa: `rngs.params` draws matrices from normal(0, 0.02), as Hugging Face.

    Norms are the identity, biases 0. Each method drops at random with a `key`, and nothing without.
    """

    embedding: nnx.Param
    positions: nnx.Param
    token_types: nnx.Param
    embedding_norm: Params
    layers: Params
    pooler: nnx.Param
    pooler_bias: nnx.Param
    classifier: nnx.Param
    classifier_bias: nnx.Param

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        drawn = draw_params(weight_table(config), config.layers, config.param_dtype, rngs.params())
        for name, weights in drawn.items():
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, weights)))

    def __call__(
        self,
        token_ids: Int[Array, "B L"],
        *,
        mask: Bool[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B L D"]:
        """Returns the hidden states after the last layer.

        Args:
            token_ids: RoBERTa gives padding, `config.pad_id`, no position of its own.
            mask: the tokens that others may attend to: all but padding. Default: all.
            token_types: such as 0 for a pair's first text and 1 for its second. Default: 0.
            key: what to drop. Default: nothing is dropped.

        Raises:
            ValueError: L is above `config.max_length`.
        """
        config, (_, length) = self.config, token_ids.shape
        if length > config.max_length:
            most = f"at most max_length={config.max_length}"
            raise ValueError(f"a sequence of {length} tokens: this model takes {most}; shorten it")
        first, layer_keys = None, None
        if key is not None:
            first, key = jax.random.split(key)
            layer_keys = jax.random.split(key, config.layers)
        hidden = rows_of(dequantized(self.embedding.get_value()), token_ids)
        hidden += rows_of(self.positions[...], _positions(config, token_ids))
        types = self.token_types[...]
        hidden += types[0] if token_types is None else rows_of(types, token_types)
        norm = nnx.to_pure_dict(nnx.state(self.embedding_norm))
        hidden = layer_norm(hidden, norm, config.norm_eps).astype(config.dtype)
        hidden = dropout(hidden, config.dropout, first)

        def layer(params: Params, hidden: Array, key: Array | None) -> Array:
            return apply_layer(config, params, hidden, mask, key)

        # As for `models.llama.layer.training_layer`.
        policy = None if config.rematerialize else keep_products
        layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)

        def step(hidden: Array, xs: Any) -> tuple[Array, None]:
            return layer(xs[0], hidden, xs[1]), None

        stack = nnx.to_pure_dict(nnx.state(self.layers))
        return jax.lax.scan(step, hidden, (stack, layer_keys))[0]

    def pooled(
        self, hidden: Float[Array, "B L D"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B D"]:
        """Returns tanh of a matrix times the first token's hidden state, in float32.

        With a key the input has dropout in a RoBERTa, as in its classification head; BERT's pooler
        has none.
        """
        first = hidden[:, 0].astype(jnp.float32)
        if self.config.pad_id is not None:
            first = dropout(first, self.config.classifier_dropout, key)
        return jnp.tanh(first @ self.pooler[...] + self.pooler_bias[...])

    def logits(
        self, hidden: Float[Array, "B L D"], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B C"]:
        """Returns the classifier's outputs for hidden states, in float32."""
        before, after = (None, None) if key is None else jax.random.split(key)
        pooled = dropout(self.pooled(hidden, key=before), self.config.classifier_dropout, after)
        return pooled @ self.classifier[...] + self.classifier_bias[...]


def apply_layer(
    config: EncoderConfig,
    params: Params,
    hidden: Float[Array, "B L D"],
    mask: Bool[Array, "B L"] | None,
    key: Key[Array, ""] | None,
) -> Float[Array, "B L D"]:
    """Adds attention and then the MLP to the hidden states, and normalises each sum.

    `params` are one layer's.
    """
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)

    def apply(group: str, name: str, x: Float[Array, "B L in"]) -> Float[Array, "B L out"]:
        y = linear(x, params[group][name])
        return y + params[f"{group}_bias"][name].astype(y.dtype)

    def added(x: Array, y: Array, group: str, key: Array | None) -> Array:
        x = x + dropout(y, config.dropout, key)
        return layer_norm(x, params[f"{group}_norm"], config.norm_eps)

    def heads(name: str) -> Float[Array, "B L N K"]:
        x = apply("attention", name, hidden)
        return x.reshape(*x.shape[:2], config.heads, -1)

    attend = jax.checkpoint(_attention, static_argnums=0)
    mixed = attend(config, heads("query"), heads("key"), heads("value"), mask, keys[0])
    hidden = added(hidden, apply("attention", "out", mixed), "attention", keys[1])
    activation = jax.nn.gelu(apply("mlp", "up", hidden), approximate=False)
    return added(hidden, apply("mlp", "down", activation), "mlp", keys[2])


def _attention(
    config: EncoderConfig,
    query: Float[Array, "B L N K"],
    key: Float[Array, "B L N K"],
    value: Float[Array, "B L N K"],
    mask: Bool[Array, "B L"] | None,
    dropout_key: Key[Array, ""] | None,
) -> Float[Array, "B L NK"]:
    """Returns attention to all tokens of the mask; `jax.nn.dot_product_attention` drops nothing."""
    scores = jnp.einsum("bqnk,bsnk->bnqs", query, key, preferred_element_type=jnp.float32)
    scores /= config.head_width**0.5
    if mask is not None:
        # Finite, so that a row without tokens, with which a batch is filled up, gives no NaN.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    weights = dropout(weights, config.attention_dropout, dropout_key)
    return jnp.einsum("bnqs,bsnk->bqnk", weights, value).reshape(*query.shape[:2], -1)


def _positions(config: EncoderConfig, token_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    if config.pad_id is None:
        return jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
    present = (token_ids != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(present, axis=1) * present + config.pad_id


def layer_norm(x: Float[Array, "*B D"], params: Params, eps: float) -> Float[Array, "*B D"]:
    """Returns LayerNorm (arXiv:1607.06450) over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * scale * params["scale"] + params["bias"]).astype(x.dtype)
