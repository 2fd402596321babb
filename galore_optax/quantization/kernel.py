"""Elementwise updates of quantized arrays on an NVIDIA GPU, in one kernel each (Pallas, Triton).

A program of the kernel has whole blocks of one row in registers: it decodes them, computes, and
encodes the results in place, so that each byte is read once and written once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Int, UInt32

from galore_optax.keys import hashed
from galore_optax.quantization.array import QuantizedArray, is_quantized
from galore_optax.sharding import explicit_axes

Compute = Callable[[dict[int, Array], Sequence[Array]], dict[int, Array]]
"""From the floats of all leaves, and scalars, to the new ones of the stored leaves."""

_TILE = 1024  # elements of a program: 8 for each thread of 4 warps


def fits(leaves: Sequence[Any]) -> bool:
    """Whether the kernel takes arrays: blocks along rows, of a power of two, 32-bit offsets.

    Explicit mesh axes are part of the arrays' types, which do not fit the kernel's.
    """
    if any(map(explicit_axes, jax.tree.leaves(leaves))):
        return False
    quantized = [x for x in leaves if is_quantized(x)]
    blocks = all(
        x.axis == -1 and not is_quantized(x.scales) and x.block in _POWERS for x in quantized
    )
    return (
        bool(quantized)
        and blocks
        and all(0 < x.size < 2**31 and x.dtype.itemsize <= 4 for x in leaves)
    )


_POWERS = [2**i for i in range(1, _TILE.bit_length())]


def in_one_kernel(
    compute: Compute,
    stored: dict[int, Any],
    read: dict[int, Any],
    scalars: Sequence[Any] = (),
    seed: UInt32[Array, "2"] | None = None,
    *,
    leaf: int = 0,
    keep: bool = False,
    interpret: bool = False,
) -> dict[int, Any]:
    """Overwrites arrays and `QuantizedArray`s of one shape, `stored`, by what `compute` makes.

    Only the codes are overwritten in place: an array is usually a gradient, which the caller may
    keep, and XLA would copy it for that.

    Args:
        compute: The function, elementwise.
        stored: The leaves to overwrite, which `compute` gets, too.
        read: Other leaves that it gets.
        scalars: Numbers that it gets.
        seed: Codes are rounded stochastically with it; None rounds to the nearest.
        leaf: A number of the leaf, so that leaves with one seed have other random numbers.
        keep: Whether a block whose numbers all stay the same keeps its codes bit for bit.
        interpret: Runs on a CPU what a GPU would run.
    """
    leaves = [*stored.values(), *read.values()]
    *lead, columns = leaves[0].shape
    width = max(x.block for x in leaves if is_quantized(x))
    tile = max(width, min(_TILE, pl.next_power_of_2(columns)))
    tiles = -(-columns // tile)
    numbers = [jnp.asarray(x) for x in scalars]
    # A kernel gets no arrays of booleans.
    given = [x.astype(jnp.int32) if x.dtype == bool else x for x in numbers]
    inputs, tree = jax.tree.flatten((stored, read, given, seed))
    outputs, out_tree = jax.tree.flatten(stored)
    marks = jax.tree.map(
        lambda x: jax.tree.map(lambda _: is_quantized(x), x), stored, is_leaf=is_quantized
    )
    in_place = {i: i for i, quantized in enumerate(jax.tree.leaves(marks)) if quantized}

    def kernel(*refs: Any) -> None:
        row, number = pl.program_id(0) // tiles, pl.program_id(0) % tiles
        at = _Tile(row, number * tile, tile, columns)
        old, others, given, seed = tree.unflatten(refs[: len(inputs)])
        new = out_tree.unflatten(refs[len(inputs) :])
        old_and_others = old | others
        floats = {k: at.load(x, old_and_others[k]) for k, x in (stored | read).items()}
        values = [ref[0].astype(x.dtype) for ref, x in zip(given, numbers, strict=True)]
        bits = (
            None
            if seed is None
            else hashed((seed[0], seed[1]), at.element.astype(jnp.uint32), leaf)
        )
        for k, x in compute(floats, values).items():
            at.store(stored[k], new[k], x, bits, floats[k] if keep else None)

    made = pl.pallas_call(
        kernel,
        [jax.ShapeDtypeStruct((x.size,), x.dtype) for x in outputs],
        grid=(math.prod(lead) * tiles,),
        input_output_aliases=in_place,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="quantized_update",
    )(*(x.reshape(-1) for x in inputs))
    return out_tree.unflatten(x.reshape(like.shape) for x, like in zip(made, outputs, strict=True))


def load_codes(like: QuantizedArray, ref: Any, row: Array, column: Array) -> Array:
    """The codes of an array's elements in those rows and columns, one for each."""
    length = like.codes.shape[-1]
    if like.code.bits == 8:
        return triton.load(ref.at[row * length + column])
    pair = triton.load(ref.at[row * length + column // 2]).astype(jnp.int32)
    return ((pair >> (4 * (column % 2))) & 15).astype(jnp.uint8)


class _Tile(NamedTuple):
    """The elements of a row that one program has; past the row's end its last element, again."""

    row: Int[Array, ""]
    start: Int[Array, ""]
    size: int
    columns: int

    @property
    def inside(self) -> Int[Array, " size"]:
        return jnp.minimum(self.start + jnp.arange(self.size), self.columns - 1)

    @property
    def element(self) -> Int[Array, " size"]:
        """Numbers of the elements in the whole array."""
        return self.row * self.columns + self.inside

    def _blocks(self, like: QuantizedArray) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
        """Numbers of the blocks' scales in the whole array, and which of the blocks are there."""
        count = like.scales.shape[-1]
        index = self.start // like.block + jnp.arange(self.size // like.block)
        return self.row * count + index, index < count

    def load(self, like: Any, ref: Any) -> Array:
        """An array's floats (size,)."""
        if not is_quantized(like):
            return triton.load(ref.at[self.element])
        at, there = self._blocks(like)
        last = (self.row + 1) * like.scales.shape[-1] - 1
        at = jnp.where(there, at, last)
        codes = load_codes(like, ref.codes, self.row, self.inside).reshape(-1, like.block)
        scales = triton.load(ref.scales.at[at]).reshape(-1, 1)
        offsets = None
        if like.offsets is not None:
            offsets = triton.load(ref.offsets.at[at]).reshape(-1, 1)
        return like.code.decode(codes, scales, offsets).reshape(-1)

    def store(self, like: Any, ref: Any, x: Array, bits: Any, old: Array | None) -> None:
        """Writes new floats (size,)."""
        if not is_quantized(like):
            index = self.start + jnp.arange(self.size)
            place = self.row * self.columns + index
            triton.store(ref.at[place], x.astype(like.dtype), mask=index < self.columns)
            return
        at, write = self._blocks(like)
        shape = (len(at), like.block)
        if old is not None:
            write &= jnp.max((x != old).astype(jnp.int32).reshape(shape), axis=-1) > 0
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(shape)
        codes, *rest = like.code.encode(wide, -1, None if bits is None else bits.reshape(shape))
        for part, new in zip((ref.scales, ref.offsets), rest, strict=True):
            if new is not None:
                triton.store(part.at[at], new.reshape(-1), mask=write)
        per_byte, length = 8 // like.code.bits, like.codes.shape[-1]
        if per_byte == 2:
            pairs = codes.astype(jnp.int32).reshape(-1, 2)
            codes = jnp.sum(pairs << (4 * jnp.arange(2)[None]), axis=-1).astype(jnp.uint8)
        index = self.start // per_byte + jnp.arange(self.size // per_byte)
        write = jnp.broadcast_to(write[:, None], (len(at), like.block // per_byte)).reshape(-1)
        place = self.row * length + index
        triton.store(ref.codes.at[place], codes.reshape(-1), mask=write & (index < length))
