"""`QuantizedArray`: an array stored as 4-bit or 8-bit codes, with one scale per block of them."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, UInt8, UInt32

from galore_optax import checks
from galore_optax.quantization.codes import NF4, Affine, Code, Dynamic, elements, random_bits
from galore_optax.serialization import pytree
from galore_optax.sharding import axis_specs, specs, with_automatic_axes

# Of `jnp.isfinite` of each array, and of a derivative with respect to integers.
_NOT_CODES = (np.dtype(bool), jax.dtypes.float0)


@pytree
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array stored as low-bit codes, with a scale and for some codes an offset per block.

    A pytree of `codes`, `scales` and `offsets` (None if the code has none). Codes have the array's
    shape, but two 4-bit codes share a byte: the axis along which blocks run has half the length,
    rounded up. Scales and offsets have the number of blocks there; scales may be quantized again.
    An index along a leading axis, or a `vmap` over it, gives a `QuantizedArray`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from galore_optax.quantization.array import quantize
        >>> x = jax.random.normal(jax.random.key(0), (64, 512))
        >>> q = quantize(x)
        >>> q.shape, q.scales.shape, q.nbytes, x.nbytes
        ((64, 512), (64, 2), 33280, 131072)
    """

    codes: UInt8[Array, "..."]
    scales: Any
    offsets: Float[Array, "..."] | None
    code: Code = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})  # elements; the last may have fewer
    axis: int = dataclasses.field(metadata={"static": True})  # of blocks, counted from the last
    dtype: Any = dataclasses.field(metadata={"static": True})  # of the dequantized array
    odd: bool = dataclasses.field(metadata={"static": True}, default=False)  # 4-bit codes on axis

    def __post_init__(self):
        codes = self.codes
        if not isinstance(codes, jax.Array | np.ndarray) or codes.dtype in _NOT_CODES:
            return  # a placeholder or a mark, as transformations of JAX put them in a tree
        if codes.dtype != np.uint8 or codes.ndim < -self.axis:
            raise ValueError(
                f"codes: {codes.dtype} of shape {codes.shape} instead of uint8 with "
                f"{max(codes.ndim, -self.axis)} axes; a function of numbers was mapped over the "
                "parts of a QuantizedArray, as optax.tree.norm does; dequantize the tree first: "
                "jax.tree.map(lambda x: x.dequantize() if isinstance(x, QuantizedArray) else x, "
                "tree, is_leaf=lambda x: isinstance(x, QuantizedArray))"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        shape = list(self.codes.shape)
        if self.code.bits == 4:
            shape[self.axis] = 2 * shape[self.axis] - self.odd
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """Returns the array of floats, in its own dtype or another, sharded as the codes are."""
        return _dequantized(self, jnp.dtype(dtype or self.dtype))


def quantize(
    x: Float[Array, "*shape"],
    code: Code = Dynamic(signed=True),  # noqa: B008 (frozen)
    *,
    block: int = 256,
    axis: int | None = None,
    key: PRNGKeyArray | None = None,
) -> QuantizedArray:
    """Quantizes a floating-point array, computed in float32, or float64 if it is.

    Blocks run along `axis`; None takes the last, or the longest if the last is shorter than half a
    block. A key rounds stochastically, without bias, if the code can; None rounds to the nearest.
    """
    if np.ndim(x) == 0 or np.size(x) == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x of shape {np.shape(x)} and dtype {x.dtype} cannot be quantized; give a "
            "floating-point array with elements and at least one axis"
        )
    if block < 1 or (code.bits == 4 and block % 2):
        raise ValueError(
            f"block={block} is not accepted with {code.bits} bits; give at least 1, and an even "
            "number for 4 bits, such as 256"
        )
    if axis is None:
        # Numbers along the last axis of a trained matrix are more alike than along the other
        # (benchmarks/block_axes.py), which is worth storing more scales.
        longest = max(range(x.ndim), key=lambda i: (x.shape[i], i))
        axis = -1 if 2 * x.shape[-1] >= block else longest
    random = None if key is None else random_bits(key, elements(x.shape))
    return _quantized(x, random, code, block, axis % x.ndim - x.ndim)


def quantize_nf4(
    weight: Float[Array, "*layers in out"], *, block: int = 64, double: bool = True
) -> QuantizedArray:
    """Quantizes a matrix, or a stack of them, to QLoRA's NF4, 4.13 bits per element.

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
    block = checks.whole(block, "block")
    checks.choice(double, "double", (True, False))
    if jnp.ndim(weight) < 2:
        raise ValueError(f"weight={checks.said(weight)} is no matrix and no stack of matrices")
    q = quantize(weight, NF4(), block=block, axis=-2)
    return dataclasses.replace(q, scales=quantize(q.scales, Affine(8))) if double else q


@jax.custom_jvp
def _without_derivative(x: Array) -> Array:
    """Returns `x`. Codes are integers: through them a derivative would be lost without a word."""
    return x


@_without_derivative.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "a derivative is asked for through the codes of a QuantizedArray, which have none: keep "
        "what is differentiated in floats (quantize_state and projection_bits left out), put "
        "jax.lax.stop_gradient around what is quantized, or differentiate with respect to "
        "quantized weights by galore_optax.value_and_grad"
    )


# Compiled as a whole, since a state is usually made outside of jit.
@partial(jax.jit, static_argnames=("code", "block", "axis"))
def _quantized(x: Array, random: Array | None, code: Code, block: int, axis: int) -> QuantizedArray:
    length = -(-x.shape[axis] * code.bits // 8)

    def encoded(x: Array, random: Array | None) -> Any:
        x = _without_derivative(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        bits = None if random is None else _blocks(random, axis, block)
        codes, *rest = code.encode(_blocks(wide, axis, block), axis, bits)
        codes = _packed(codes, axis) if code.bits == 4 else codes
        codes = _merged(codes, axis, length)
        return codes, *(None if part is None else jnp.squeeze(part, axis) for part in rest)

    def out_specs(mesh: Any) -> Any:
        def split(length: int) -> PartitionSpec:  # as x, along the axis only if it divides
            axes = axis_specs(x)
            if length % math.prod(mesh.shape[name] for name in axes[axis]):
                axes[axis] = ()
            return PartitionSpec(*axes)

        scales = split(-(-x.shape[axis] // block))
        return split(length), scales, scales if isinstance(code, Affine) else None

    codes, scales, offsets = with_automatic_axes(encoded, out_specs, x, random)
    odd = code.bits == 4 and x.shape[axis] % 2 == 1
    return QuantizedArray(codes, scales, offsets, code, block, axis, jnp.dtype(x.dtype), odd)


@partial(jax.jit, static_argnames="dtype")
def _dequantized(q: QuantizedArray, dtype: Any) -> Array:
    def decoded(codes: Array, scales: Array, offsets: Array | None) -> Array:
        blocks = _blocks(codes, q.axis, q.block * q.code.bits // 8)
        blocks = _unpacked(blocks, q.axis) if q.code.bits == 4 else blocks
        scales, offsets = jax.tree.map(lambda x: jnp.expand_dims(x, q.axis), (scales, offsets))
        values = q.code.decode(blocks, scales, offsets)
        return _merged(values, q.axis, q.shape[q.axis]).astype(dtype)

    scales = dequantized(q.scales)
    return with_automatic_axes(decoded, lambda _: specs(q.codes), q.codes, scales, q.offsets)


def stored_like(x: Float[Array, "*s"], like: Any, random: UInt32[Array, "*s"] | None = None) -> Any:
    """Quantizes an array as `like` is, or returns it unchanged if `like` is not quantized."""
    if not isinstance(like, QuantizedArray):
        return x
    stored = _quantized(x, random, like.code, like.block, like.axis)
    scales = stored_like(stored.scales, like.scales)
    return dataclasses.replace(stored, scales=scales, dtype=like.dtype)


def is_quantized(x: Any) -> bool:
    """Whether `x` is a `QuantizedArray`; for use as `is_leaf`."""
    return isinstance(x, QuantizedArray)


def dequantized(tree: Any) -> Any:
    """Dequantizes each leaf of a tree that has a method `dequantize`."""

    def can(x: Any) -> bool:
        return hasattr(x, "dequantize")

    return jax.tree.map(lambda x: x.dequantize() if can(x) else x, tree, is_leaf=can)


def added(
    x: QuantizedArray, update: Float[Array, "*s"], random: UInt32[Array, "*s"] | None
) -> QuantizedArray:
    """Returns `x + update`, summed in float32 and quantized as `x` is, rounded with random bits.

    Blocks whose sums are the old numbers stay bit for bit.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    floats = x.dequantize(wide)
    total = floats + update.astype(wide)
    new = stored_like(total, x, random)

    def kept(differs: Array, new: QuantizedArray, old: QuantizedArray) -> QuantizedArray:
        blocks = _blocks(differs, x.axis, x.block)
        touched = jnp.any(blocks, x.axis, keepdims=True)
        elements = _merged(jnp.broadcast_to(touched, blocks.shape), x.axis, x.shape[x.axis])
        if x.code.bits == 4:  # both codes of a byte are in one block
            elements = jax.lax.slice_in_dim(elements, 0, None, 2, axis=x.ndim + x.axis)
        block = jnp.squeeze(touched, x.axis)
        return jax.tree.map(
            lambda a, b: jnp.where(elements if a is new.codes else block, a, b), new, old
        )

    return with_automatic_axes(kept, lambda _: specs(x), total != floats, new, x)


def _blocks(x: Array, axis: int, block: int) -> Array:
    """Reshapes `(..., n, ...)` to `(..., blocks, block, ...)`, padded with the last element."""
    n, before = x.shape[axis], x.ndim + axis
    blocks, block = -(-n // block), min(block, n)
    if blocks * block != n:
        widths = [(0, 0)] * x.ndim
        widths[before] = (0, blocks * block - n)
        x = jnp.pad(x, widths, mode="edge")
    return x.reshape(*x.shape[:before], blocks, block, *x.shape[before + 1 :])


def _merged(blocks: Array, axis: int, length: int) -> Array:
    """The inverse of `_blocks`, with `length` elements along the axis."""
    at = blocks.ndim + axis
    merged = blocks.reshape(*blocks.shape[: at - 1], -1, *blocks.shape[at + 1 :])
    return jax.lax.slice_in_dim(merged, 0, length, axis=at - 1)


def _packed(codes: Array, axis: int) -> Array:
    """Packs two 4-bit codes per byte, the first in the lower half."""
    # Before blocks are merged, and by a sum instead of a selection: otherwise XLA's CPU compiler
    # does not vectorize it.
    at = codes.ndim + axis
    if codes.shape[at] % 2:
        codes = jnp.pad(codes, [(0, int(i == at)) for i in range(codes.ndim)], mode="edge")
    pairs = codes.reshape(*codes.shape[:at], -1, 2, *codes.shape[at + 1 :])
    shape = [2 if at == pairs.ndim + axis else 1 for at in range(pairs.ndim)]
    places = jnp.array([1, 16], codes.dtype).reshape(shape)
    return jnp.sum(pairs * places, axis=axis, dtype=codes.dtype)


def _unpacked(codes: Array, axis: int) -> Array:
    """The inverse of `_packed`; from an odd number of codes it returns one more."""
    at = codes.ndim + axis

    def on_cpu(codes: Array) -> Array:  # vectorized; a GPU would make two kernels of it
        wide = codes.astype(jnp.uint16)
        return jax.lax.bitcast_convert_type((wide | wide << 4) & 0x0F0F, jnp.uint8)

    def shifted(codes: Array) -> Array:
        places = jnp.array([0, 4], jnp.uint8).reshape(*[1] * codes.ndim, 2)
        return codes[..., None] >> places & 15

    pairs = jax.lax.platform_dependent(codes, cpu=on_cpu, default=shifted)
    return jnp.moveaxis(pairs, -1, axis).reshape(*codes.shape[:at], -1, *codes.shape[at + 1 :])
