"""LLaMA's configuration and the table of its weights; nothing here creates an array."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import DTypeLike

from models.llama.rope import RopeScaling

Params = dict[str, Any]
"""A nested dict of arrays, as `nnx.to_pure_dict` returns it."""

AttentionImplementation = Literal["xla", "cudnn"]


class TokenIds(NamedTuple):
    """The ids of special tokens that a checkpoint's config.json names; None: it names none."""

    bos: int | tuple[int, ...] | None = None
    eos: int | tuple[int, ...] | None = None
    pad: int | tuple[int, ...] | None = None


_NO_IDS = TokenIds()


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and numerics of a LLaMA, and what depends on the devices that it runs on."""

    width: int  # of the residual stream
    mlp_width: int  # inside the MLP
    layers: int
    heads: int  # query heads
    kv_heads: int  # key and value heads; fewer than heads is grouped-query attention
    vocab_size: int = 32_000  # token ids run from 0 to vocab_size - 1
    max_length: int = 1024  # the longest sequence that the model takes, in tokens
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # of the rotary frequencies; None: as the base says
    head_dim: int | None = None  # the width of a head; None: width / heads
    attention_bias: bool = False  # added to queries, keys, values and to attention's output
    mlp_bias: bool = False  # added after each of the MLP's three matrices
    tied: bool = False  # the head is the embedding: one array
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    dtype: DTypeLike = jnp.float32  # of matrix products; norms and softmax are always float32
    param_dtype: DTypeLike = jnp.float32  # of the stored weights
    rematerialize: bool = False  # compute activations within a layer again in the backward pass
    scan: bool = True  # the layers in a loop, compiled once; False: written out one by one
    attention: AttentionImplementation = "xla"  # over whole sequences
    batch_shards: int = 1  # devices that a batch is split over
    # Of the tokenizer; the model itself has no use for them.
    token_ids: TokenIds = _NO_IDS
    # How queries, keys and values (batch, length, heads, head) are split over devices; cuDNN's
    # attention refuses them if they are split in different ways. None: as XLA chooses.
    heads_at: NamedSharding | None = None

    def __post_init__(self):
        sizes = "vocab_size width mlp_width layers heads kv_heads max_length batch_shards"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.head_dim is None and self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} with heads={self.heads}: a head's width, width / heads, must "
                "be an even integer; change either, or give head_dim"
            )
        dynamic = self.rope_scaling is not None and self.rope_scaling.kind == "dynamic"
        if self.head_width < (least := 4 if dynamic else 2) or self.head_width % 2:
            raise ValueError(
                f"head_dim={self.head_width}: must be even and at least {least}"
                + (" with dynamic rope_scaling" if dynamic else "")
            )
        if self.heads % self.kv_heads:
            ordinary = f"kv_heads={self.heads} is ordinary attention"
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}; {ordinary}")
        if self.attention not in (known := get_args(AttentionImplementation)):
            raise ValueError(f"attention={self.attention!r}: must be one of {', '.join(known)}")
        # One spelling of a dtype, so that configurations compare equal and can be hashed.
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"{name}={dtype}: must be a float type, such as bfloat16")
            object.__setattr__(self, name, dtype)

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    def check_length(self, length: int) -> None:
        """Raises ValueError if a sequence of `length` tokens is too long."""
        if length > self.max_length:
            most = f"at most max_length={self.max_length}"
            raise ValueError(f"a sequence of {length} tokens: this model takes {most}; shorten it")


SIZES: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(width=128, mlp_width=344, layers=4, heads=4, kv_heads=4, max_length=512),
    "llama-60m": LlamaConfig(width=512, mlp_width=1376, layers=8, heads=8, kv_heads=8),
    "llama-130m": LlamaConfig(width=768, mlp_width=2048, layers=12, heads=12, kv_heads=12),
    "llama-350m": LlamaConfig(width=1024, mlp_width=2736, layers=24, heads=16, kv_heads=16),
    "llama-1b": LlamaConfig(width=2048, mlp_width=5461, layers=24, heads=32, kv_heads=32),
    "llama-7b": LlamaConfig(
        width=4096, mlp_width=11_008, layers=32, heads=32, kv_heads=32, max_length=2048
    ),
}
"""`tiny` for a CPU, and the sizes that GaLore pre-trains (arXiv:2403.03507, tables 2 and 3)."""


class Weight(NamedTuple):
    """Shape and logical axis names of one weight, stacked over the layers."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fill: float | None = None  # all its numbers at first; None: random ones


def weight_table(config: LlamaConfig) -> dict[str, Any]:
    """Returns a nested dict of `Weight` in the structure of the params."""
    n, d, f, v = config.layers, config.width, config.mlp_width, config.vocab_size
    q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    layers: dict[str, Any] = {
        "attention_norm": Weight((n, d), ("layer", None), 1),
        "attention": {
            "query": Weight((n, d, q), ("layer", "embed", "heads")),
            "key": Weight((n, d, kv), ("layer", "embed", "heads")),
            "value": Weight((n, d, kv), ("layer", "embed", "heads")),
            "out": Weight((n, q, d), ("layer", "heads", "embed")),
        },
        "mlp_norm": Weight((n, d), ("layer", None), 1),
        "mlp": {
            "gate": Weight((n, d, f), ("layer", "embed", "mlp")),
            "up": Weight((n, d, f), ("layer", "embed", "mlp")),
            "down": Weight((n, f, d), ("layer", "mlp", "embed")),
        },
    }
    for group, present in (("attention", config.attention_bias), ("mlp", config.mlp_bias)):
        if present:  # one for each matrix; split as its outputs are, but never along the width
            layers[f"{group}_bias"] = {
                name: Weight((n, x.shape[2]), ("layer", _unless_embed(x.axes[2])), 0)
                for name, x in layers[group].items()
            }
    table = {
        "embedding": Weight((v, d), ("vocab", "embed")),
        "layers": layers,
        "norm": Weight((d,), (None,), 1),
    }
    # One row per id, as in the embedding: quantized, a scale then belongs to one id. Frequent
    # and rare ids differ by orders of magnitude.
    return table if config.tied else {**table, "head": Weight((v, d), ("vocab", "embed"))}


def _unless_embed(axis: str | None) -> str | None:
    return None if axis == "embed" else axis


def count_params(config: LlamaConfig) -> int:
    """Returns the number of weights, embedding and head included; a tied one counts once."""
    return sum(math.prod(weight.shape) for weight in _weights(config))


def flops_per_token(config: LlamaConfig, length: int) -> float:
    """Returns the operations to train on one token, forward and backward, nothing recomputed.

    Six for each weight of a matrix product, and twelve for each component of the queries and each
    of `length` keys (PaLM, arXiv:2204.02311, appendix B, which counts attention as not causal).
    """
    matrices = sum(math.prod(weight.shape) for weight in _weights(config) if weight.fill is None)
    products = matrices if config.tied else matrices - config.vocab_size * config.width
    queries = config.heads * config.head_width
    return 6.0 * products + 12.0 * config.layers * queries * length


def _weights(config: LlamaConfig) -> list[Weight]:
    return jax.tree.leaves(weight_table(config), is_leaf=lambda x: isinstance(x, Weight))
