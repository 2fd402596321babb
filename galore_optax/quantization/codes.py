"""Codes of 4 and 8 bits: a block of numbers as small integers, a scale, and perhaps an offset.

Each code is a frozen dataclass with `bits`, `encode` and `decode`, which work on whole blocks along
one axis. Numbers are found by arithmetic, without looking anything up: an accelerator's vector
units and a CPU's have no gather worth the name.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt

Encoded = tuple[
    UInt[Array, "..."], Float[Array, "..."], Float[Array, "..."] | None
]  # codes, scales, offsets


class Code(Protocol):
    """How blocks of numbers become codes and numbers again."""

    @property
    def bits(self) -> int:
        """Of one code."""
        ...

    def encode(self, blocks: Float[Array, "..."], axis: int, key: PRNGKeyArray | None) -> Encoded:
        """Codes like `blocks`, and scales and offsets with 1 along `axis`, that of a block.

        Args:
            blocks: Float32 or float64.
            axis: Along which a block runs.
            key: Rounds up or down at random, such that the mean is exact; None to the nearest.
        """
        ...

    def decode(
        self,
        codes: UInt[Array, "..."],
        scales: Float[Array, "..."],
        offsets: Float[Array, "..."] | None,
    ) -> Float[Array, "..."]:
        """Numbers, in the scales' dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """The dynamic code of 8-bit optimizers (Dettmers et al., arXiv:2110.02861, section 1.2).

    The same share of codes for every tenth of the last in number, evenly spaced within a factor of
    ten in value: decade i holds n_i = 2^i magnitudes (2^(i+1) without a sign), the q-th of all,
    n_i <= q < 2 n_i, of value

        10^(i - 6) (0.1 + 0.9 (q - n_i + 0.5) / n_i)        for i from 0 to 6

    after which come zero and the largest magnitude of the block, which is exact: with a sign the
    scale takes that of the block's largest element. Codes are bitsandbytes' own. What is not zero
    is never coded as zero: a second moment of zero would make the next update explode.

    Attributes:
        signed: Whether there are negative numbers; without a sign they become zero.
        bits: 8.
    """

    signed: bool
    bits: int = 8

    @property
    def _lines(self) -> list[tuple[float, float]]:
        """Of each decade n_i and the distance of its values."""
        least = 1 if self.signed else 2
        decades = range(self.bits - 1)
        return [(n := least * 2**i, 0.9 * 10.0 ** (i + 2 - self.bits) / n) for i in decades]

    @property
    def _zero(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else -1

    def encode(self, blocks, axis, key):
        """See `Code.encode`; it does not round at random."""
        _refuse(key)
        scales = _scales(blocks, axis, self.signed)
        # Four times the reciprocal of a normal number is one, too (or infinite, of the least).
        x = (blocks * (4 / jnp.where(scales == 0, 1, scales))).astype(jnp.float32)
        size = jnp.abs(x) if self.signed else x
        # Value q of decade n is step (q + 1/2 - 8/9 n). Lines of smaller numbers are steeper, and
        # meet the next where a decade ends: the least of all is that of the number's own decade.
        lines = (size * (0.25 / step) + 8 / 9 * n for n, step in self._lines)
        place = functools.reduce(_smaller, lines)
        # Up to a fifth of a step beyond the end, the last value of the decade before is nearer:
        # where one less, q - 1, has no bit in common with q, a power of two.
        q, before = _whole_part(place), _whole_part(_smaller(place - 0.2, 2.0**self.bits))
        q = jnp.where(q & before, q, before)
        first, last = self._lines[0][0], 2 * self._lines[-1][0]
        q = jnp.where(place >= last - 0.25, last, _larger(q, first))
        if self.signed:
            q = jnp.where(x < 0, -_smaller(q, self._zero), q)
            q = jnp.where(blocks == 0, 0, q)
        else:
            q = jnp.where(blocks > 0, q, 1)
        return (q + self._zero).astype(jnp.uint8), scales, None

    def decode(self, codes, scales, offsets):
        """See `Code.decode`."""
        del offsets
        q = codes.astype(jnp.int32).astype(jnp.float32) - self._zero
        # Of q + 1/2 = m 2^i, with m from 1 to 2, a float has i in its bits, the number of a decade,
        # and m: how far within it q is.
        bits = _bits(2 * (jnp.abs(q) if self.signed else q) + 1)
        decade = (bits >> 23) - (128 if self.signed else 129)
        one = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
        # No a x + b, which XLA rounds once or twice as it likes: a code has one value everywhere.
        end = _ten_to(decade, scales.dtype) * (0.9 * 10.0 ** (2 - self.bits))
        value = _smaller(end * (one.astype(scales.dtype) - 8 / 9), 1)
        if self.signed:
            value = jnp.copysign(value, q.astype(value.dtype))
        return jnp.where(decade < 0, 0, value) * scales


def _bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """The bits of float32 numbers."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _ten_to(exponent: Int[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Ten to a power from 0 to 7, by the bits of the exponent."""
    factors = (jnp.where(exponent & 2**i, 10.0**2**i, 1).astype(dtype) for i in range(3))
    return functools.reduce(jnp.multiply, factors)


def _whole_part(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Of float32 numbers from 1/2 to 512; what they are at x.0 is open, x or x - 1.

    The conversion of floats to integers has to mind NaN and numbers beyond an integer's, which
    takes a CPU longer than this: beyond 2^23, where a float's last bit is 1, it has the number.
    """
    return _bits(x + (2.0**23 - 0.5)) & 0x1FF


def _smaller(a: Any, b: Any) -> Array:
    """The minimum of what is no NaN, one instruction on a CPU (`jnp.minimum` is several)."""
    return jnp.where(a < b, a, b)


def _larger(a: Any, b: Any) -> Array:
    """The maximum, likewise."""
    return jnp.where(a > b, a, b)


@dataclasses.dataclass(frozen=True)
class Table:
    """A code of a few given values, between which the middle decides.

    Attributes:
        values: In ascending order, from -1 or 0 to 1, 2**bits of them.
        bits: Of one code.
    """

    values: tuple[float, ...]
    bits: int = 4

    @property
    def _signed(self) -> bool:
        return self.values[0] < 0

    def encode(self, blocks, axis, key):
        """See `Code.encode`; it does not round at random."""
        _refuse(key)
        scales = _scales(blocks, axis, self._signed)
        x = blocks / jnp.where(scales == 0, 1, scales)
        values = np.array(self.values)
        middles = list(((values[:-1] + values[1:]) / 2).astype(x.dtype))
        codes = bisected(lambda middle: x >= middle, middles)
        if not self._signed:  # what is not zero is never coded as zero
            codes = jnp.where((codes == 0) & (blocks > 0), 1, codes)
        return codes.astype(jnp.uint8), scales, None

    def decode(self, codes, scales, offsets):
        """See `Code.decode`."""
        del offsets
        numbers = codes.astype(jnp.int32)
        bits = [numbers & 2**bit != 0 for bit in reversed(range(self.bits))]
        return _chosen(list(np.array(self.values, scales.dtype)), bits) * scales


@dataclasses.dataclass(frozen=True)
class Affine:
    """Evenly spaced numbers from a block's least to its largest, both of which are exact.

    The offset is the least number itself, not a code for zero, which would have to be clamped where
    a block's numbers have one sign (a fault of published code). A block of one number is exact.

    Attributes:
        bits: Of one code.
    """

    bits: int

    def encode(self, blocks, axis, key):
        """See `Code.encode`."""
        low, high = (f(blocks, axis, keepdims=True) for f in (jnp.min, jnp.max))
        last = 2**self.bits - 1
        scales = _normal((high - low) / last)
        x = (blocks - low) / jnp.where(scales == 0, 1, scales)
        # Not floor(x + ...): of 128 and more, float32 would round the sum up.
        whole = jnp.floor(x)
        codes = jnp.clip(whole + (x - whole >= _up(key, x)), 0, last)
        return codes.astype(jnp.int32).astype(jnp.uint8), scales, low

    def decode(self, codes, scales, offsets):
        """See `Code.decode`."""
        return codes.astype(jnp.int32).astype(scales.dtype) * scales + offsets


def bisected(passes: Callable[[Any], Array], numbers: Sequence[Any]) -> Int[Array, "..."]:
    """How many of 2**n - 1 ascending numbers are passed, bit by bit from the highest.

    Args:
        passes: From an array of some of the numbers, one for each element, to whether it is passed.
        numbers: Scalars of one dtype.
    """
    bits, half = [], (len(numbers) + 1) // 2
    while half:
        bits.append(passes(_chosen(numbers[half - 1 :: 2 * half], bits)))
        half //= 2
    count = jnp.int32(0)
    for bit in bits:
        count = 2 * count + bit.astype(jnp.int32)
    return count


def _chosen(values: Sequence[Any], bits: Sequence[Array]) -> Any:
    """Of 2**n values the one whose number has these n bits, the highest first."""
    for bit in reversed(bits):
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(bit, high, low) for low, high in pairs]
    return values[0]


def _scales(blocks: Float[Array, "..."], axis: int, signed: bool) -> Float[Array, "..."]:
    """What a block is divided by: its element of largest magnitude, with its sign."""
    low, high = (f(blocks, axis, keepdims=True) for f in (jnp.min, jnp.max))
    return _normal(jnp.where(high >= -low, high, low) if signed else jnp.maximum(high, 0))


def _normal(scales: Float[Array, "..."]) -> Float[Array, "..."]:
    """Zero below the smallest normal number, which a CPU may take for zero as a divisor."""
    return jnp.where(jnp.abs(scales) < jnp.finfo(scales.dtype).tiny, 0, scales)


def _up(key: PRNGKeyArray | None, like: Float[Array, "..."]) -> Any:
    """From which fraction on a number is rounded up: a half, or anything below one."""
    if key is None:
        return 0.5
    return (random_bits(key, like.shape).astype(like.dtype) + 0.5) / 2**16


def random_bits(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt[Array, "..."]:
    """16 random bits for each element; two of a row share the generator's 32."""
    rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
    pairs = jax.random.bits(key, (rows, -(-columns // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(rows, 2 * pairs.shape[1])
    return bits[:, :columns].reshape(shape)


def _refuse(key: PRNGKeyArray | None) -> None:
    if key is not None:
        raise ValueError("key: only the affine codes round at random; leave it out")
