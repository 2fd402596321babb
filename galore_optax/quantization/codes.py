"""4-bit and 8-bit codes: a block of numbers as small integers, a scale, and perhaps an offset.

A code is a frozen dataclass with `bits`, `encode` and `decode`, which work on whole blocks along
one axis. Numbers are found by arithmetic instead of by a table: gathers are slow on accelerators'
and CPUs' vector units.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8, UInt16

Blocks = Float[Array, "*blocks"]
PerBlock = Float[Array, "*scales"]  # blocks' shape, with length 1 along their axis


class Code(Protocol):
    """Encodes blocks of numbers and decodes them again."""

    @property
    def bits(self) -> int:
        """Bits per code, 4 or 8."""

    def encode(
        self, blocks: Blocks, axis: int, key: PRNGKeyArray | None
    ) -> tuple[UInt8[Array, "*blocks"], PerBlock, PerBlock | None]:
        """Returns codes, scales and offsets (or None) of float32 or float64 blocks along an axis.

        A key rounds stochastically, without bias; None rounds to the nearest.
        """

    def decode(
        self, codes: UInt8[Array, "*blocks"], scales: PerBlock, offsets: PerBlock | None
    ) -> Blocks:
        """Returns the numbers, in the scales' dtype."""


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """The dynamic code of 8-bit optimizers (Dettmers et al., arXiv:2110.02861, section 1.2).

    Magnitudes lie in seven decades, evenly spaced within each. Decade i has n_i = 2^i of them
    (2^(i+1) if unsigned); number q of all, n_i <= q < 2 n_i, has the value

        10^(i - 6) (0.1 + 0.9 (q - n_i + 0.5) / n_i)        for i from 0 to 6

    There are codes for zero and for the block's largest magnitude, too, which is exact: a signed
    code's scale has the sign of that element. An unsigned code makes negative numbers zero. Codes
    equal those of bitsandbytes. Numbers other than zero are never coded as zero: a second moment of
    zero would make the next update explode.
    """

    signed: bool
    bits: int = 8

    @property
    def _lines(self) -> list[tuple[float, float]]:
        """For each decade n_i and the distance between its values."""
        counts = [(i, (1 if self.signed else 2) * 2**i) for i in range(self.bits - 1)]
        return [(n, 0.9 * 10.0 ** (i + 2 - self.bits) / n) for i, n in counts]

    @property
    def _zero(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else -1

    def encode(self, blocks, axis, key):
        """See `Code.encode`."""
        refuse_key(key)
        scales = _scales(blocks, axis, self.signed)
        # 4 / scale, since the reciprocal of a large normal number is subnormal.
        x = (blocks * (4 / jnp.where(scales == 0, 1, scales))).astype(jnp.float32)
        size = jnp.abs(x) if self.signed else x
        # Value q of decade n is step (q + 1/2 - 8/9 n), a line in q. Smaller decades' lines are
        # steeper and cross the next where a decade ends: the own decade's line gives the least q.
        lines = (size * (0.25 / step) + 8 / 9 * n for n, step in self._lines)
        place = functools.reduce(_smaller, lines)
        # Up to a fifth of a step into a decade, the last value of the one before is nearer. There
        # q is a power of two, which has no bit in common with q - 1.
        q, before = _whole_part(place), _whole_part(_smaller(place - 0.2, 2.0**self.bits))
        q = jnp.where(q & before, q, before)
        first, last = self._lines[0][0], 2 * self._lines[-1][0]
        q = jnp.where(place >= last - 0.25, last, jnp.where(q > first, q, first))
        if self.signed:
            q = jnp.where(x < 0, -_smaller(q, self._zero), q)
            q = jnp.where(blocks == 0, 0, q)
        else:
            q = jnp.where(blocks > 0, q, 1)
        return (q + self._zero).astype(jnp.uint8), scales, None

    def decode(self, codes, scales, offsets):
        """See `Code.decode`."""
        q = codes.astype(jnp.int32).astype(jnp.float32) - self._zero
        # A float stores q + 1/2 = m 2^i, 1 <= m < 2, as i, the decade, and m, the place within it.
        bits = _bits(2 * (jnp.abs(q) if self.signed else q) + 1)
        decade = (bits >> 23) - (128 if self.signed else 129)
        one = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
        # Not as a x + b, which XLA may round once or twice: a code has one value everywhere.
        end = _ten_to(decade, scales.dtype) * (0.9 * 10.0 ** (2 - self.bits))
        value = _smaller(end * (one.astype(scales.dtype) - 8 / 9), 1)
        if self.signed:
            value = jnp.copysign(value, q.astype(value.dtype))
        return jnp.where(decade < 0, 0, value) * scales


def _bits(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _ten_to(exponent: Int[Array, "*s"], dtype: Any) -> Float[Array, "*s"]:
    """Returns ten to a power from 0 to 7, by the bits of the exponent."""
    factors = (jnp.where(exponent & 2**i, 10.0**2**i, 1).astype(dtype) for i in range(3))
    return functools.reduce(jnp.multiply, factors)


def _whole_part(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """Returns the integer part of float32 numbers from 1/2 to 512; of x.0 either x or x - 1.

    Above 2^23 a float's last bit stands for 1, so its lowest bits are the number. A conversion to
    integers takes a CPU longer, because it must treat NaN and overflow.
    """
    return _bits(x + (2.0**23 - 0.5)) & 0x1FF


def _smaller(a: Any, b: Any) -> Array:
    """The minimum without a rule for NaN: one instruction on a CPU, `jnp.minimum` is several."""
    return jnp.where(a < b, a, b)


@dataclasses.dataclass(frozen=True)
class Table:
    """A code of given values, to the nearest of which numbers are rounded.

    The 2**bits values ascend from -1 or 0 to 1. If none is negative, numbers other than zero are
    never coded as zero.
    """

    values: tuple[float, ...]
    bits: int = 4

    def encode(self, blocks, axis, key):
        """See `Code.encode`."""
        refuse_key(key)
        signed = self.values[0] < 0
        scales = _scales(blocks, axis, signed)
        x = blocks / jnp.where(scales == 0, 1, scales)
        values = np.array(self.values)
        middles = list(((values[:-1] + values[1:]) / 2).astype(x.dtype))
        codes = bisected(lambda middle: x >= middle, middles)
        if not signed:
            codes = jnp.where((codes == 0) & (blocks > 0), 1, codes)
        return codes.astype(jnp.uint8), scales, None

    def decode(self, codes, scales, offsets):
        """See `Code.decode`."""
        numbers = codes.astype(jnp.int32)
        bits = [numbers & 2**bit != 0 for bit in reversed(range(self.bits))]
        return _chosen(list(np.array(self.values, scales.dtype)), bits) * scales


@dataclasses.dataclass(frozen=True)
class Affine:
    """Evenly spaced values from a block's smallest number to its largest, both of which are exact.

    The offset is the smallest number, not the code of zero, which has to be clamped where all of a
    block's numbers have one sign (an error in published code). It can round stochastically.
    """

    bits: int

    def encode(self, blocks, axis, key):
        """See `Code.encode`."""
        low, high = (f(blocks, axis, keepdims=True) for f in (jnp.min, jnp.max))
        last = 2**self.bits - 1
        scales = _normal((high - low) / last)
        x = (blocks - low) / jnp.where(scales == 0, 1, scales)
        up: Any = 0.5  # the fraction from which a number is rounded up
        if key is not None:
            up = (random_bits(key, x.shape).astype(x.dtype) + 0.5) / 2**16
        # Not floor(x + ...): from 128 on, float32 would round the sum up.
        whole = jnp.floor(x)
        codes = jnp.clip(whole + (x - whole >= up), 0, last)
        return codes.astype(jnp.int32).astype(jnp.uint8), scales, low

    def decode(self, codes, scales, offsets):
        """See `Code.decode`."""
        return codes.astype(jnp.int32).astype(scales.dtype) * scales + offsets


def bisected(passes: Callable[[Any], Array], numbers: Sequence[Any]) -> Int[Array, "*s"]:
    """Counts for each element how many of 2**n - 1 ascending scalars it passes, by bisection.

    `passes` gets an array with one of the numbers per element.
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
    """Selects from 2**n values the one whose index has these n bits, the highest first."""
    for bit in reversed(bits):
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(bit, high, low) for low, high in pairs]
    return values[0]


def _scales(blocks: Blocks, axis: int, signed: bool) -> PerBlock:
    """Returns the element of largest magnitude, with its sign, by which a block is divided."""
    low, high = (f(blocks, axis, keepdims=True) for f in (jnp.min, jnp.max))
    return _normal(jnp.where(high >= -low, high, low) if signed else jnp.maximum(high, 0))


def _normal(scales: PerBlock) -> PerBlock:
    """Replaces subnormal numbers by zero, as which a CPU may treat them in a division."""
    return jnp.where(jnp.abs(scales) < jnp.finfo(scales.dtype).tiny, 0, scales)


def random_bits(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt16[Array, "*shape"]:
    """Returns 16 random bits per element; two elements of a row share 32 bits of the generator."""
    rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
    pairs = jax.random.bits(key, (rows, -(-columns // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(rows, 2 * pairs.shape[1])
    return bits[:, :columns].reshape(shape)


def refuse_key(key: PRNGKeyArray | None) -> None:
    """Raises ValueError if there is a key."""
    if key is not None:
        raise ValueError("key: only affine codes round stochastically; leave it out")
