"""The configuration of a BERT or RoBERTa and the table of its weights; no array is created here."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from models.llama.config import Weight


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and numerics of an encoder, and what its head gives."""

    width: int  # of the hidden states
    mlp_width: int  # inside the MLP
    layers: int
    heads: int
    vocab_size: int  # token ids run from 0 to vocab_size - 1
    positions: int  # rows of the position embedding
    token_types: int  # rows of the token type embedding
    # RoBERTa: the id of padding. Positions count from pad_id + 1, and padding has position pad_id.
    # None, as in BERT: positions count from 0.
    pad_id: int | None = None
    pooler: bool = False  # a matrix and tanh on the first token's hidden state
    classes: int = 0  # outputs of the classifier, which stands on the pooler; 0: there is none
    norm_eps: float = 1e-12  # added to the variance in LayerNorm
    dropout: float = 0.1  # share that is dropped of embeddings and of each part's output
    attention_dropout: float = 0.1  # of the attention weights
    classifier_dropout: float = 0.1  # before the classifier; RoBERTa's: before the pooler, too
    dtype: DTypeLike = jnp.float32  # of matrix products; norms and softmax are always float32
    param_dtype: DTypeLike = jnp.float32  # of the stored weights
    rematerialize: bool = False  # compute activations within a layer again in the backward pass

    def __post_init__(self):
        sizes = "width mlp_width layers heads vocab_size positions token_types"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.max_length < 1:
            raise ValueError(
                f"positions={self.positions}: must be above pad_id + 1 = {self.position_offset}"
            )
        if self.classes and not self.pooler:
            raise ValueError(f"classes={self.classes}: needs pooler=True, the classifier's input")
        for name in ("dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to below 1")
        # One spelling of a dtype, so that configurations compare equal and can be hashed.
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))

    @property
    def position_offset(self) -> int:
        """The position of a row's first token."""
        return 0 if self.pad_id is None else self.pad_id + 1

    @property
    def max_length(self) -> int:
        """The longest sequence that the model takes, in tokens."""
        return self.positions - self.position_offset

    @property
    def head_width(self) -> int:
        """K, the width of one head of the attention."""
        return self.width // self.heads


SIZES: dict[str, EncoderConfig] = {
    "roberta-base": EncoderConfig(
        width=768,
        mlp_width=3072,
        layers=12,
        heads=12,
        vocab_size=50_265,
        positions=514,
        token_types=1,
        pad_id=1,
        norm_eps=1e-5,
    ),
}
"""The encoder that the papers fine-tune."""


def weight_table(config: EncoderConfig) -> dict[str, Any]:
    """Returns a nested dict of `Weight` in the structure of the params."""
    n, d, f = config.layers, config.width, config.mlp_width
    into, out = ("layer", "embed", "heads"), ("layer", "heads", "embed")
    layers: dict[str, Any] = {
        "attention": {
            **dict.fromkeys(("query", "key", "value"), Weight((n, d, d), into)),
            "out": Weight((n, d, d), out),
        },
        "mlp": {
            "up": Weight((n, d, f), ("layer", "embed", "mlp")),
            "down": Weight((n, f, d), ("layer", "mlp", "embed")),
        },
    }
    for group in ("attention", "mlp"):
        layers[f"{group}_bias"] = {
            name: Weight((n, x.shape[2]), ("layer", None if x.axes[2] == "embed" else x.axes[2]), 0)
            for name, x in layers[group].items()
        }
        layers[f"{group}_norm"] = _norm((n, d), ("layer", None))
    table = {
        "embedding": Weight((config.vocab_size, d), ("vocab", "embed")),
        "positions": Weight((config.positions, d), (None, "embed")),
        "token_types": Weight((config.token_types, d), (None, "embed")),
        "embedding_norm": _norm((d,), (None,)),
        "layers": layers,
    }
    if config.pooler:
        table |= {
            "pooler": Weight((d, d), ("embed", None)),
            "pooler_bias": Weight((d,), (None,), 0),
        }
    if config.classes:
        table |= {
            "classifier": Weight((d, config.classes), ("embed", None)),
            "classifier_bias": Weight((config.classes,), (None,), 0),
        }
    return table


def flops_per_token(config: EncoderConfig, length: int) -> float:
    """Returns the operations to train on one token of `length`; see `models.llama.config`."""
    layers = jax.tree.leaves(weight_table(config)["layers"], is_leaf=lambda x: type(x) is Weight)
    products = sum(math.prod(weight.shape) for weight in layers if weight.fill is None)
    return 6.0 * products + 12.0 * config.layers * config.width * length


def _norm(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, Weight]:
    return {"scale": Weight(shape, axes, 1), "bias": Weight(shape, axes, 0)}
