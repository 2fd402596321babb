"""4-bit and 8-bit codes: a block of numbers as small integers, a scale, and perhaps an offset.

A code is a frozen dataclass with `bits`, `encode` and `decode`, which work on whole blocks along
one axis. Arithmetic finds the numbers: gathers from a table are slow on vector units.
`galore_optax.quantization.state` chooses the code and block size of each moment, and `array` stores
what a code makes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8, UInt32

from galore_optax.keys import hashed

Blocks = Float[Array, "*blocks"]
PerBlock = Float[Array, "*scales"]  # blocks' shape, with length 1 along their axis


class Code(Protocol):
    """Encodes blocks of numbers and decodes them again."""

    @property
    def bits(self) -> int:
        """Bits per code, 4 or 8."""

    def encode(
        self, blocks: Blocks, axis: int, random: UInt32[Array, "*blocks"] | None
    ) -> tuple[UInt8[Array, "*blocks"], PerBlock, PerBlock | None]:
        """Returns codes, scales and offsets (or None) of float32 or float64 blocks along an axis.

        Random numbers round stochastically, without bias; None rounds to the nearest.
        """

    def decode(
        self, codes: UInt8[Array, "*blocks"], scales: PerBlock, offsets: PerBlock | None
    ) -> Blocks:
        """Returns the numbers, in the scales' dtype."""


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """The dynamic code of 8-bit optimizers (Dettmers et al., arXiv:2110.02861, section 1.2).

    There are seven decades of magnitudes, i = 0 to 6, each with n_i = 2^i evenly spaced values
    (2^(i+1) if unsigned). The values of decade i have the numbers q = n_i to 2 n_i - 1 and are

        10^(i - 6) (0.1 + 0.9 (q - n_i + 0.5) / n_i)

    Two more codes stand for zero and for the element of largest magnitude, which is exact: it is
    the scale, with its sign in a signed code. An unsigned code makes negative numbers zero. Codes
    equal those of bitsandbytes. Numbers other than zero are never coded as zero: a second moment of
    zero would make the next update explode.
    """

    signed: bool
    bits: int = 8

    @property
    def _lines(self) -> list[tuple[float, float]]:
        """For each decade the number of its values, n_i, and the step between them."""
        counts = [(i, (1 if self.signed else 2) * 2**i) for i in range(self.bits - 1)]
        return [(n, 0.9 * 10.0 ** (i + 2 - self.bits) / n) for i, n in counts]

    @property
    def _zero(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else -1

    def encode(self, blocks, axis, random):
        refuse_random(random)
        scales = _scales(blocks, axis, self.signed)
        # 4 / scale, since the reciprocal of a large normal number is subnormal.
        x = (blocks * (4 / jnp.where(scales == 0, 1, scales))).astype(jnp.float32)
        size = jnp.abs(x) if self.signed else x
        # In decade i value q is step_i (q + 1/2 - 8/9 n_i). Each decade thus makes q + 1/2 a line
        # in the magnitude. A decade's line is steeper than the next one's and crosses it where the
        # decade ends, so the least of the lines is the one of the magnitude's own decade.
        lines = (size * (0.25 / step) + 8 / 9 * n for n, step in self._lines)
        place = functools.reduce(_smaller, lines)
        # In the first fifth of a decade's first step, the last value of the decade before, q - 1,
        # is nearer. There q is a power of two, and for these alone q & (q - 1) is zero.
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
    """Returns the integer part of float32 numbers from 1/2 to 512; of an integer n, n or n - 1.

    Above 2^23 a float's last bit stands for 1, so its lowest bits are the number. A conversion to
    integers takes a CPU longer, because it must treat NaN and overflow.
    """
    return _bits(x + (2.0**23 - 0.5)) & 0x1FF


def _smaller(a: Any, b: Any) -> Array:
    """The minimum without a rule for NaN: one instruction on a CPU, `jnp.minimum` is several."""
    return jnp.where(a < b, a, b)


@dataclasses.dataclass(frozen=True)
class Table:
    """A code of 2**bits given values, ascending from -1 or 0 to 1; it rounds to the nearest.

    If no value is negative, numbers other than zero are never coded as zero.
    """

    values: tuple[float, ...]
    bits: int = 4

    def encode(self, blocks, axis, random):
        refuse_random(random)
        signed = self.values[0] < 0
        # A quarter, since the reciprocal of a large normal number, by which XLA may multiply, is
        # subnormal.
        quarters = _scales(blocks, axis, signed) / 4
        scales = 4 * (quarters := _normal(quarters))
        x = blocks / jnp.where(quarters == 0, 1, quarters)
        values = np.array(self.values)
        middles = list((2 * (values[:-1] + values[1:])).astype(x.dtype))
        codes = bisected(lambda middle: x >= middle, middles)
        if not signed:
            codes = jnp.where((codes == 0) & (blocks > 0), 1, codes)
        return codes.astype(jnp.uint8), scales, None

    def decode(self, codes, scales, offsets):
        numbers = codes.astype(jnp.int32)
        bits = [numbers & 2**bit != 0 for bit in reversed(range(self.bits))]
        return _chosen(list(np.array(self.values, scales.dtype)), bits) * scales


# QLoRA's appendix E: quantiles of the normal distribution, zero among them.
_NORMAL_QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NF4(Table):
    """The 4-bit NormalFloat of QLoRA's frozen weights (arXiv:2305.14314, section 3).

    Blocks are divided by their largest magnitude, as by bitsandbytes.
    """

    values: tuple[float, ...] = _NORMAL_QUANTILES

    def encode(self, blocks, axis, random):
        refuse_random(random)
        scales = jnp.max(_nan_as_inf(jnp.abs(blocks)), axis, keepdims=True)
        x = blocks * (1 / jnp.maximum(scales, jnp.finfo(scales.dtype).tiny))
        values = np.array(self.values, x.dtype)
        codes = bisected(lambda middle: x > middle, list((values[:-1] + values[1:]) / 2))
        return codes.astype(jnp.uint8), scales, None


@dataclasses.dataclass(frozen=True)
class Affine:
    """Evenly spaced values from a block's smallest number to its largest, both of which are exact.

    The offset is the smallest number. Published code stores the code of zero instead and clamps it,
    an error where all numbers of a block have one sign. It can round stochastically.
    """

    bits: int

    def encode(self, blocks, axis, random):
        low, high = _extremes(blocks, axis)
        last = 2**self.bits - 1
        scales = _normal((high - low) / last)
        x = (blocks - low) / jnp.where(scales == 0, 1, scales)
        up: Any = 0.5  # the fraction from which a number is rounded up
        if random is not None:
            up = ((random >> 16).astype(jnp.int32).astype(x.dtype) + 0.5) / 2**16
        # Not floor(x + ...): from 128 on, float32 would round the sum up.
        whole = jnp.floor(x)
        codes = jnp.clip(whole + (x - whole >= up).astype(x.dtype), 0, last)
        return codes.astype(jnp.int32).astype(jnp.uint8), scales, low

    def decode(self, codes, scales, offsets):
        return codes.astype(jnp.int32).astype(scales.dtype) * scales + offsets


def bisected(passes: Callable[[Any], Array], numbers: Sequence[Any]) -> Int[Array, "*s"]:
    """Counts for each element how many of 2**n - 1 ascending scalars it passes, by bisection.

    `passes(limits)` compares each element with its own entry of an array of these scalars.
    """
    bits, half = [], (len(numbers) + 1) // 2
    while half:
        bits.append(passes(_chosen(numbers[half - 1 :: 2 * half], bits)))
        half //= 2
    return functools.reduce(lambda n, bit: 2 * n + bit.astype(jnp.int32), bits, jnp.int32(0))


def _chosen(values: Sequence[Any], bits: Sequence[Array]) -> Any:
    """Selects from 2**n values the one whose index has these n bits, the highest first."""
    for bit in reversed(bits):
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(bit, high, low) for low, high in pairs]
    return values[0]


def _scales(blocks: Blocks, axis: int, signed: bool) -> PerBlock:
    """Returns the element of largest magnitude, with its sign, by which a block is divided."""
    low, high = _extremes(blocks, axis)
    return _normal(jnp.where(high >= -low, high, low) if signed else jnp.maximum(high, 0))


def _extremes(blocks: Blocks, axis: int) -> tuple[PerBlock, PerBlock]:
    """Returns the smallest and the largest element; one of them is not finite if one is NaN."""
    low = jnp.min(blocks, axis, keepdims=True)
    return low, jnp.max(_nan_as_inf(blocks), axis, keepdims=True)  # made for one use, not stored


def _nan_as_inf(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """A block with NaN must not be decoded to finite numbers, and the largest of a block may be.

    XLA's CPU compiler and Triton drop NaN in `jnp.max` and `jnp.min` (jaxlib 0.10, 4,096 elements).
    """
    return jnp.where(x == x, x, jnp.inf)


def _normal(scales: PerBlock) -> PerBlock:
    """Replaces subnormal numbers by zero: a CPU may divide by them as if they were zero."""
    return jnp.where(jnp.abs(scales) < jnp.finfo(scales.dtype).tiny, 0, scales)


def random_bits(key: PRNGKeyArray, elements: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """Returns 32 random bits for each element of an array, from the elements' numbers in it.

    They depend on nothing else: not on how the array is cut into chunks, tiles or shards.
    """
    return hashed(jax.random.bits(key, (2,), jnp.uint32), elements)


def rounded_to_bfloat16(
    x: Float[Array, "*shape"], random: UInt32[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Rounds float32 stochastically to bfloat16, which is its upper half."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = ((bits + (random >> 16)) >> 16).astype(jnp.uint16)
    near = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), near, x.astype(jnp.bfloat16))


def elements(shape: tuple[int, ...], strides: Sequence[int] = ()) -> UInt32[Array, "*shape"]:
    """Returns the number of each element of an array, modulo 2**32, in row-major order.

    Or by `strides`, one for each axis.
    """
    strides = strides or row_major(shape)
    number = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        each = np.uint32(stride % 2**32)
        number += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * each
    return number


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the strides of an array's axes, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def refuse_random(random: Any) -> None:
    """Raises ValueError if there are random numbers."""
    if random is not None:
        raise ValueError("key: only affine codes round stochastically; leave it out")
