"""Frequencies of the rotary positions (arXiv:2104.09864), and their scalings for long contexts.

Letters: *A no axis or one of microbatches, B batch, L length, K a head's width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

RopeKind = Literal["linear", "dynamic", "llama3"]

# The fields that each kind needs besides its factor; the others must be None.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": ("original_length",),
    "llama3": ("original_length", "low_freq_factor", "high_freq_factor"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model takes longer sequences than it was first trained on, as transformers computes it.

    `linear` divides all frequencies by `factor` (arXiv:2306.15595). `dynamic` lowers them the more
    a sequence exceeds `original_length` (dynamic NTK). `llama3` divides frequencies whose waves are
    longer than original_length / low_freq_factor, keeps those whose waves are shorter than
    original_length / high_freq_factor, and interpolates between.
    """

    kind: RopeKind
    factor: float  # at least 1
    original_length: int | None = None  # the length that the model was first trained on, in tokens
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None  # above low_freq_factor

    def __post_init__(self):
        if self.kind not in (known := get_args(RopeKind)):
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(known)}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor={self.factor}: must be finite and at least 1")
        for name in _NEEDED["llama3"]:
            value, needed = getattr(self, name), name in _NEEDED[self.kind]
            if (value is not None) != needed:
                must = "a positive number" if needed else "None"
                raise ValueError(f"{name}={value}: must be {must} with kind={self.kind!r}")
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be positive and finite")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"high_freq_factor={high}: must be above low_freq_factor={low}")


def frequencies(
    theta: float, width: int, scaling: RopeScaling | None, positions: Int[Array, "*A B L"]
) -> Float[Array, "*rows half"]:
    """Returns the angle per position of each pair of a head's components, in float32.

    The shape is (K/2,); with the kind `dynamic`, for which the angle depends on the length of each
    row, (*A, B, 1, 1, K/2).
    """
    exponents = -jnp.arange(0, width, 2, dtype=jnp.float32) / width
    if scaling is None:
        return theta**exponents
    factor, original = scaling.factor, scaling.original_length or 1
    if scaling.kind == "dynamic":
        length = jnp.maximum(jnp.max(positions, axis=-1) + 1, original)[..., None, None, None]
        stretch = factor * length.astype(jnp.float32) / original - (factor - 1)
        return (theta * stretch ** (width / (width - 2))) ** exponents
    plain = theta**exponents
    if scaling.kind == "linear":
        return plain / factor
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 1.0
    waves = original * plain / (2 * math.pi)  # in the original length
    kept = jnp.clip((waves - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / factor)
