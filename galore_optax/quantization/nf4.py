"""NF4, the 4-bit code of QLoRA's frozen weights (Dettmers et al., arXiv:2305.14314, section 3)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from galore_optax.quantization.array import QuantizedArray, quantize
from galore_optax.quantization.codes import Affine, Table, bisected, refuse_key

# Appendix E: quantiles of the normal distribution, zero among them.
_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NF4(Table):
    """The 4-bit NormalFloat. Blocks are divided by their largest magnitude, as by bitsandbytes."""

    values: tuple[float, ...] = _VALUES

    def encode(self, blocks, axis, key):
        """See `Code.encode`."""
        refuse_key(key)
        scales = jnp.max(jnp.abs(blocks), axis, keepdims=True)
        x = blocks * (1 / jnp.maximum(scales, jnp.finfo(scales.dtype).tiny))
        values = np.array(self.values, x.dtype)
        codes = bisected(lambda middle: x > middle, list((values[:-1] + values[1:]) / 2))
        return codes.astype(jnp.uint8), scales, None


def quantize_nf4(
    weight: Float[Array, "*layers in out"], *, block: int = 64, double: bool = True
) -> QuantizedArray:
    """Quantizes a matrix, or a stack of them, to NF4: 4.13 bits per element.

    Blocks of `block` elements share a scale. They run along the input, as in bitsandbytes, whose
    matrices are (out, in). `double` quantizes the scales to 8 bits, too ("double quantization"), in
    blocks of 256: affine codes here, 8-bit floats around the mean in bitsandbytes.

    Examples:
        >>> import jax
        >>> from galore_optax import quantize_nf4
        >>> w = jax.random.normal(jax.random.key(0), (1024, 512))
        >>> q = quantize_nf4(w)
        >>> round(8 * q.nbytes / w.size, 2)
        4.13
    """
    q = quantize(weight, NF4(), block=block, axis=-2)
    return dataclasses.replace(q, scales=quantize(q.scales, Affine(8))) if double else q
