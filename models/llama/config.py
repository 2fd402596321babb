"""LLaMA's sizes and its table of weights, and what can be told from them without any array.

The sizes are those that GaLore (arXiv 2403.03507, appendix) pre-trains; `models.llama.model` computes
with them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from galore_optax.quantization.array import is_quantized

Params = dict[str, Any]
"""A nested dict of arrays, as `nnx.to_pure_dict` gives it."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and numerics of a LLaMA.

    Attributes:
        vocab_size: Token ids run from 0 to `vocab_size - 1`.
        width: Width of the residual stream.
        mlp_width: Width inside the MLP.
        layers: Number of layers.
        heads: Number of query heads; each is `width / heads` wide.
        kv_heads: Number of key and value heads; fewer than `heads` is grouped-query attention.
        max_length: The longest sequence the model takes, in tokens.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Added to the mean square in RMSNorm.
        dtype: Computation in matrix products; norms and softmax are always float32.
        param_dtype: Storage of the weights.
        rematerialize: Keep only the activations between layers for the backward pass, and compute
            those within a layer again.
    """

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int = 32_000
    max_length: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    rematerialize: bool = False

    def __post_init__(self):
        for name in (
            "vocab_size",
            "width",
            "mlp_width",
            "layers",
            "heads",
            "kv_heads",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} with heads={self.heads}: a head's width, width / heads, must "
                "be an even whole number; change either"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} must divide heads={self.heads}; "
                f"kv_heads={self.heads} is ordinary attention"
            )
        # One spelling of a dtype, so that configurations compare equal and can be hashed.
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"{name}={dtype}: a float type is needed, such as bfloat16")
            object.__setattr__(self, name, dtype)

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.width // self.heads


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
"""The sizes of GaLore's table 2 and 3 at a vocabulary of 32,000, and `tiny` for a CPU."""


class Weight(NamedTuple):
    """Shape and logical axis names of one weight, layers stacked in front."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def weight_table(config: LlamaConfig) -> dict[str, Any]:
    """The one table of weights: a nested dict of `Weight`, in the structure of the params."""
    n, d, f, v = config.layers, config.width, config.mlp_width, config.vocab_size
    heads = config.heads * config.head_width
    kv_heads = config.kv_heads * config.head_width
    return {
        "embedding": Weight((v, d), ("vocab", "embed")),
        "layers": {
            "attention_norm": Weight((n, d), ("layer", None)),
            "attention": {
                "query": Weight((n, d, heads), ("layer", "embed", "heads")),
                "key": Weight((n, d, kv_heads), ("layer", "embed", "heads")),
                "value": Weight((n, d, kv_heads), ("layer", "embed", "heads")),
                "out": Weight((n, heads, d), ("layer", "heads", "embed")),
            },
            "mlp_norm": Weight((n, d), ("layer", None)),
            "mlp": {
                "gate": Weight((n, d, f), ("layer", "embed", "mlp")),
                "up": Weight((n, d, f), ("layer", "embed", "mlp")),
                "down": Weight((n, f, d), ("layer", "mlp", "embed")),
            },
        },
        "norm": Weight((d,), (None,)),
        # As the embedding: in few bits, what has one scale belongs to one id of the vocabulary, and
        # frequent and rare ones differ by orders of magnitude.
        "head": Weight((v, d), ("vocab", "embed")),
    }


def logical_axes(params: Params) -> Params:
    """A tree like `params` of tuples of logical axis names, for sharding rules.

    The names are "layer", "vocab", "embed", "heads" and "mlp"; None is an axis that is never split.
    """
    table = weight_table(SIZES["tiny"])  # names do not depend on the size

    def choose(path, _):
        entry: Any = table
        for key in path:
            entry = entry[key.key]
        return entry.axes

    return jax.tree.map_with_path(choose, params, is_leaf=is_quantized)


def count_params(config: LlamaConfig) -> int:
    """Number of weights, embedding and head included."""
    leaves = jax.tree.leaves(weight_table(config), is_leaf=lambda x: isinstance(x, Weight))
    return sum(int(np.prod(weight.shape)) for weight in leaves)


def flops_per_token(config: LlamaConfig, length: int) -> float:
    """Floating-point operations to train on one token: forward and backward, nothing recomputed.

    Six for each weight of a matrix product (the embedding is looked up, not multiplied), and twelve
    for each component of the queries and each of `length` keys (PaLM, arXiv 2204.02311, appendix B,
    which counts attention as if it were not causal).
    """
    looked_up = config.vocab_size * config.width
    norms = (2 * config.layers + 1) * config.width
    products = count_params(config) - looked_up - norms
    return 6.0 * products + 12.0 * config.layers * config.width * length
