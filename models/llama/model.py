"""LLaMA in Flax NNX: RMSNorm, rotary positions, SwiGLU and grouped-query attention.

Weights are (in, out) matrices, stacked over the layers and run by `jax.lax.scan`, so that compile
time does not grow with depth and an optimizer sees one leaf per kind of matrix. Sizes and the table
of weights are in `models.llama.config`.

Letters: B batch, L length, S cached length, D width, F MLP width, N query heads, G key and value
heads, K a head's width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from galore_optax import GaLoreDimensionNumbers
from galore_optax.adapters.base import product
from galore_optax.quantization.array import dequantized, is_quantized
from models.llama.config import LlamaConfig, Params, Weight, weight_table

# Attention's products, and of the linear layers what comes out: with an adapter that is a sum of
# products, each as large.
_KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.save_only_these_names("product"),
)


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, for `Llama.decode`."""

    key: Float[Array, "layers B S G K"]
    value: Float[Array, "layers B S G K"]
    length: Int[Array, ""]
    """How many of the S positions are filled."""


def init_params(
    config: LlamaConfig,
    key: PRNGKeyArray,
    hold: Callable[[Params, PRNGKeyArray], Params] = lambda part, _: part,
) -> Params:
    """Random weights, a layer at a time, so that what they take to make is that of one layer.

    Args:
        config: Sizes and numerics.
        key: Of all of them.
        hold: From a part of the params, one layer's under "layers" or all others, and a key to how
            that part is to be held, such as in few bits.
    """

    def drawn(weight: Weight, shape: tuple[int, ...], key: PRNGKeyArray) -> Array:
        if "embed" not in weight.axes:
            return jnp.ones(shape, config.param_dtype)
        parts = math.gcd(shape[0], 32) if math.prod(shape) > 2**24 else 1
        rows = (shape[0] // parts, *shape[1:])
        draw = jax.lax.map(
            lambda key: 0.02 * jax.random.normal(key, rows, config.param_dtype),
            jax.random.split(key, parts),
        )
        return draw.reshape(shape)

    def part(table: dict[str, Any], stacked: int, key: PRNGKeyArray) -> Params:
        weights, tree = jax.tree.flatten(table, is_leaf=lambda x: isinstance(x, Weight))
        own, *keys = jax.random.split(key, 1 + len(weights))
        pairs = zip(weights, keys, strict=True)
        return hold(tree.unflatten([drawn(w, w.shape[stacked:], k) for w, k in pairs]), own)

    table = weight_table(config)
    layers = {"layers": table.pop("layers")}
    key, *keys = jax.random.split(key, 1 + config.layers)
    stack = jax.lax.map(lambda key: part(layers, 1, key)["layers"], jnp.stack(keys))
    return {**part(table, 0, key), "layers": stack}


class Llama(nnx.Module):
    """A LLaMA language model.

    Args:
        config: Sizes and numerics.
        rngs: `rngs.params` draws the matrices from normal(0, 0.02), as Hugging Face's LLaMA does;
            the norms' weights start at one.
    """

    embedding: nnx.Param
    layers: nnx.Dict
    norm: nnx.Param
    head: nnx.Param

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config

        def parameters(weights: Any) -> Any:
            if isinstance(weights, dict):
                return nnx.Dict({name: parameters(inner) for name, inner in weights.items()})
            return nnx.Param(weights)

        for name, weights in init_params(config, rngs.params()).items():
            setattr(self, name, parameters(weights))

    def __call__(
        self,
        token_ids: Int[Array, "B L"],
        *,
        positions: Int[Array, "B L"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L V"]:
        """Float32 logits of the token after each position; arguments as for `hidden`."""
        return self.logits(self.hidden(token_ids, positions=positions, segment_ids=segment_ids))

    def hidden(
        self,
        token_ids: Int[Array, "B L"],
        *,
        positions: Int[Array, "B L"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """What the head multiplies: the last layer's output, normalised.

        Args:
            token_ids: Token ids below `config.vocab_size`, (B, L).
            positions: Position of each token for the rotary embedding, (B, L); counted from the
                row's start if not given.
            segment_ids: Document of each token, (B, L): a token sees earlier tokens of its own
                document only. One document a row if not given.

        Raises:
            ValueError: If L is above `config.max_length`.
        """
        config = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
        sequences = sequences_of(config, positions, segment_ids)
        hidden = embed(config, self.embedding.get_value(), token_ids)
        hidden, _ = jax.lax.scan(
            lambda hidden, layer: (training_layer(config, sequences, layer, hidden), None),
            hidden,
            nnx.to_pure_dict(nnx.state(self.layers)),
        )
        return rms_norm(hidden, self.norm[...], config.norm_eps)

    def logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """The head: float32 logits of hidden states."""
        head = dequantized(self.head.get_value()).astype(self.config.dtype)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(rows, head.T, preferred_element_type=jnp.float32)
        return logits.reshape(*hidden.shape[:-1], -1)

    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache for `decode`.

        Args:
            batch_size: B, rows decoded at once.
            length: S, tokens that the cache can hold.

        Raises:
            ValueError: If `length` is above `config.max_length`.
        """
        config = self.config
        _check_length(length, config)
        shape = (config.layers, batch_size, length, config.kv_heads, config.head_width)
        empty = jnp.zeros(shape, config.dtype)
        return KVCache(empty, empty, jnp.zeros((), jnp.int32))

    def decode(
        self, token_ids: Int[Array, "B L"], cache: KVCache
    ) -> tuple[Float[Array, "B L V"], KVCache]:
        """Logits of the next L tokens of each row, and the cache with them in it.

        L is the whole prompt at first (prefill), then usually 1. Attention is XLA's here: cuDNN's
        flash attention is made for long queries. The caller keeps `cache.length + L` within the
        cache.
        """
        config = self.config
        new = jnp.arange(token_ids.shape[1]) + cache.length
        rotary = rotary_angles(config, jnp.broadcast_to(new, token_ids.shape))
        mask = (jnp.arange(cache.key.shape[2]) <= new[:, None])[None, None]  # (1, 1, L, S)

        def step(carry, layer):
            hidden, keys, values = carry
            index, layer_params = layer

            def attend(query, key, value):
                # The stacks stay in the carry, where XLA updates them in place.
                nonlocal keys, values
                start = (index, 0, cache.length, 0, 0)
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


Rotary = tuple[Float[Array, "B L 1 K/2"], Float[Array, "B L 1 K/2"]]
Attend = Callable[
    [Float[Array, "B L N K"], Float[Array, "B L G K"], Float[Array, "B L G K"]],
    Float[Array, "B L N K"],
]


def embed(
    config: LlamaConfig, embedding: Any, token_ids: Int[Array, "*B L"]
) -> Float[Array, "*B L D"]:
    """The residual stream before the first layer; the embedding may be quantized."""
    return dequantized(embedding)[token_ids].astype(config.dtype)


def apply_layer(
    config: LlamaConfig,
    params: Params,
    hidden: Float[Array, "B L D"],
    rotary: Rotary,
    attend: Attend,
) -> Float[Array, "B L D"]:
    """One layer: attention and MLP, each on the normalised stream and added to it.

    Args:
        config: Sizes and numerics.
        params: One layer's slice of the params under "layers"; its matrices may be quantized, or
            have adapters.
        hidden: The residual stream, (B, L, D).
        rotary: `rotary_angles` of the tokens' positions.
        attend: Attention proper, of rotated queries (B, L, N, K), keys and values (B, L, G, K).
    """
    batch, length, _ = hidden.shape

    def heads(x: Float[Array, "B L NK"]) -> Float[Array, "B L N K"]:
        return x.reshape(batch, length, -1, config.head_width)

    attention, mlp = params["attention"], params["mlp"]
    x = rms_norm(hidden, params["attention_norm"], config.norm_eps)
    query = rotate(heads(linear(x, attention["query"])), rotary)
    key = rotate(heads(linear(x, attention["key"])), rotary)
    mixed = attend(query, key, heads(linear(x, attention["value"])))
    hidden = hidden + linear(mixed.reshape(hidden.shape), attention["out"])

    x = rms_norm(hidden, params["mlp_norm"], config.norm_eps)
    activation = gated(linear(x, mlp["gate"]), linear(x, mlp["up"]))
    return hidden + linear(activation, mlp["down"])


class Sequences(NamedTuple):
    """What every layer needs to know of a batch of whole sequences.

    Attributes:
        rotary: `rotary_angles` of the tokens' positions.
        mask: Which keys (last) a query may see, other than later ones; None where it may see all.
    """

    rotary: Rotary
    mask: Bool[Array, "B 1 L L"] | None


def sequences_of(
    config: LlamaConfig,
    positions: Int[Array, "*A B L"],
    segment_ids: Int[Array, "*A B L"] | None = None,
) -> Sequences:
    """`Sequences` of positions and, where rows hold several documents, the document of each token.

    Raises:
        ValueError: If L is above `config.max_length`.
    """
    _check_length(positions.shape[-1], config)
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[..., :, None] == segment_ids[..., None, :])[..., None, :, :]
    return Sequences(rotary_angles(config, positions), mask)


# Bytes of float32 attention weights that are there at once, where no fused kernel avoids them.
_ATTENTION_BYTES = 2**25


def _attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    mask: Bool[Array, "B 1 L L"] | None,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B L H K"]:
    """Causal attention over whole sequences, by XLA a few rows of a large batch at a time."""

    def attend(rows: tuple[Array, ...]) -> Array:
        query, key, value, *mask = rows
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask[0] if mask else None,
            is_causal=True,
            implementation=implementation,
        )

    rows = (query, key, value) if mask is None else (query, key, value, mask)
    batch, length, heads, _ = query.shape
    parts = 1
    while (
        implementation == "xla"
        and 4 * batch * heads * length**2 // parts > _ATTENTION_BYTES
        and batch % (2 * parts * jax.device_count()) == 0
    ):
        parts *= 2
    if parts == 1:
        return attend(rows)
    # Part i has the rows i, i + parts, ...: some of each device's.
    cut = [jnp.moveaxis(x.reshape(batch // parts, parts, *x.shape[1:]), 1, 0) for x in rows]
    attended = jax.lax.map(jax.checkpoint(attend), tuple(cut))
    return jnp.moveaxis(attended, 0, 1).reshape(query.shape)


def training_layer(
    config: LlamaConfig, sequences: Sequences, params: Params, hidden: Float[Array, "B L D"]
) -> Float[Array, "B L D"]:
    """One layer over whole sequences; what its backward pass keeps is what the configuration says.

    Args:
        config: Sizes and numerics.
        sequences: Of the batch.
        params: One layer's slice of the params under "layers".
        hidden: The residual stream, (B, L, D).
    """
    implementation = attention_implementation(config, hidden.shape[1])

    def layer(params, hidden):
        def attend(query, key, value):
            return _attention(query, key, value, sequences.mask, implementation)

        return apply_layer(config, params, hidden, sequences.rotary, attend)

    # A loop's body is never merged with its recomputation, so no barrier is needed.
    if config.rematerialize:
        layer = jax.checkpoint(layer, prevent_cse=False)
    elif implementation == "xla":
        # Norms, rotations and softmax take less time to compute again than to write and read.
        # Not with cuDNN: its attention is no plain product, and would run twice.
        layer = jax.checkpoint(layer, prevent_cse=False, policy=_KEEP_PRODUCTS)
    return layer(params, hidden)


def linear(x: Float[Array, "B L in"], weight: Any) -> Float[Array, "B L out"]:
    """Rows times a matrix (in, out), or times what stands in its place (`galore_optax.adapters.base`)."""
    # With rows in one axis the weight's gradient is xᵀg as it stands. Of a (B, L, out) gradient
    # XLA's CPU backend makes a transposed copy first, which takes longer than the product.
    rows = checkpoint_name(product(x.reshape(-1, x.shape[-1]), weight), "product")
    return rows.reshape(*x.shape[:-1], -1)


@jax.checkpoint
def gated(gate: Float[Array, "B L F"], up: Float[Array, "B L F"]) -> Float[Array, "B L F"]:
    """SwiGLU's product (arXiv 2002.05202); only its arguments are kept for the backward pass."""
    return jax.nn.silu(gate) * up


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """RMSNorm, x / rms(x) · weight over the last axis, computed in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight.astype(x.dtype)


def rotary_angles(config: LlamaConfig, positions: Int[Array, "B L"]) -> Rotary:
    """Float32 cosines and sines of the positions' angles (RoPE, arXiv 2104.09864, 3.2.2)."""
    half = jnp.arange(0, config.head_width, 2, dtype=jnp.float32)
    frequencies = config.rope_theta ** (-half / config.head_width)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L N K"], rotary: Rotary) -> Float[Array, "B L N K"]:
    """Rotate each head's vector by its position.

    Component i is paired with i + K/2, as in Hugging Face's checkpoints, not with its neighbour as
    in the paper: the two differ by a permutation of the query's and key's columns.
    """
    cos, sin = rotary
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention_implementation(
    config: LlamaConfig, length: int | None = None
) -> Literal["cudnn", "xla"]:
    """Which implementation of `jax.nn.dot_product_attention` a forward pass uses on this machine.

    cuDNN's flash attention takes 16-bit floats, heads up to 128 wide in multiples of 8, NVIDIA GPUs
    from compute capability 8.0 and, where documents are masked, even lengths.

    Args:
        config: The model's configuration.
        length: Tokens in a row; `config.max_length` if not given.
    """
    device = jax.devices()[0]
    fits = (
        "cuda" in device.client.platform_version
        and float(device.compute_capability) >= 8.0
        and config.dtype in (jnp.bfloat16, jnp.float16)
        and config.head_width % 8 == 0
        and config.head_width <= 128
        and (config.max_length if length is None else length) % 2 == 0
    )
    return "cudnn" if fits else "xla"


def dimension_numbers(params: Params) -> Params:
    """Which axes of which weights GaLore projects: attention's and the MLP's matrices by layer.

    Args:
        params: The model's params, or a part of them, as a nested dict.

    Returns:
        A tree like `params` of `GaLoreDimensionNumbers(-2, -1)`, which fit one layer as well as the
        stack, and None for the embedding, the norms and the head, which are trained at full rank as
        published.
    """

    def choose(path, _):
        names = _names(path)
        return GaLoreDimensionNumbers(-2, -1) if names & {"attention", "mlp"} else None

    return jax.tree.map_with_path(choose, params, is_leaf=is_quantized)


def param_axes(params: Params) -> Params:
    """How many axes each param of a layer has, where the layers of a leaf are stacked before them.

    Args:
        params: The model's params, or a part of them, as a nested dict.

    Returns:
        A tree like `params`: 2 at attention's and the MLP's matrices, 1 at the layers' norms, and
        None at what is no layer's. It fits one layer as well as the stack.
    """

    def choose(path, _):
        names = _names(path)
        return (2 if names & {"attention", "mlp"} else 1) if "layers" in names else None

    return jax.tree.map_with_path(choose, params, is_leaf=is_quantized)


def _names(path: Any) -> set[str | None]:
    """Keys of a path, in which unstacked leaves have an index and adapters their fields too."""
    return {getattr(entry, "key", None) for entry in path}


def smaller_sides(config: LlamaConfig) -> list[int]:
    """Of each kind of matrix that GaLore projects, the smaller side.

    A matrix is compressed by ranks below its smaller side, so at the largest of these none is.
    """
    shapes = jax.tree.map(
        lambda weight: jax.ShapeDtypeStruct(weight.shape, config.param_dtype),
        weight_table(config),
        is_leaf=lambda x: isinstance(x, Weight),
    )
    numbers = jax.tree.leaves(
        dimension_numbers(shapes),
        is_leaf=lambda x: x is None or isinstance(x, GaLoreDimensionNumbers),
    )
    return [
        min(x.shape[n.reduction_axis], x.shape[n.output_axis])
        for n, x in zip(numbers, jax.tree.leaves(shapes), strict=True)
        if n is not None
    ]


def _check_length(length: int, config: LlamaConfig) -> None:
    if length > config.max_length:
        raise ValueError(
            f"a sequence of {length} tokens: this model takes at most "
            f"max_length={config.max_length}; shorten it"
        )
