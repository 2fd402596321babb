"""Adds a product of two matrices to weights of 8 or 16 bits, on a GPU without storing the product.

GaLore's update of a weight is scale · P N (arXiv:2403.03507, equation 11). XLA adds a product to a
matrix as it makes it, but not where the sum is encoded, or rounded at random: it would write the
product and read it again. Here a program of the kernel (Pallas, Triton) has a tile of the weight,
makes the product's tile, and stores the sum in place.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int, UInt32

from galore_optax.keys import hashed
from galore_optax.quantization.array import QuantizedArray, is_quantized
from galore_optax.quantization.codes import rounded_to_bfloat16
from galore_optax.quantization.kernel import load_codes
from galore_optax.sharding import explicit_axes

# Of a tile, and of a part of the axis that is summed over. A block of codes is in one tile.
_ROWS, _COLUMNS, _INNER = 64, 256, 32


class Factors(NamedTuple):
    """A product `left @ right`, plus `slope` times the weight.

    Attributes:
        left: `(*batch, n, r)`, in bfloat16 or float16.
        right: `(*batch, r, m)`, or with `transposed` `(*batch, m, r)`, in the same dtype.
        slope: float32, one number or one for each matrix; None for zero.
        transposed: How `right` is stored.
    """

    left: Float[Array, "*batch n r"]
    right: Float[Array, "*batch r m"]
    slope: Float[Array, " k"] | None
    transposed: bool


def fits_sum(weight: Any, factors: Factors, seed: Any) -> bool:
    """Whether the kernel is for a weight, `(*batch, n, m)`, and what is to be added.

    XLA itself adds a product to bfloat16 numbers, if they are rounded to the nearest.
    """
    given = weight, factors.left, factors.right
    if any(map(explicit_axes, jax.tree.leaves(given))):
        return False
    if is_quantized(weight):
        whole = weight.axis == -1 and weight.code.bits == 8 and not is_quantized(weight.scales)
        taken = whole and _COLUMNS % weight.block == 0 and weight.offsets is not None
    else:
        taken = weight.dtype == jnp.bfloat16 and seed is not None
    same = factors.left.dtype == factors.right.dtype
    halves = same and factors.left.dtype in (jnp.bfloat16, jnp.float16)
    return taken and halves and 0 < weight.size < 2**31 and weight.dtype.itemsize <= 4


def add_product(
    weight: Any,
    factors: Factors,
    seed: UInt32[Array, "2"] | None,
    *,
    leaf: int = 0,
    interpret: bool = False,
) -> Any:
    """The weight plus the product, in its code or bfloat16, by the kernel.

    The product, and slope times the weight, are rounded to the factors' dtype, as if they were
    stored. Blocks of codes whose numbers all stay the same are kept bit for bit.

    Args:
        weight: A `QuantizedArray` or an array in bfloat16, `(*batch, n, m)`; it is overwritten
            unless the caller keeps it.
        factors: What to add.
        seed: The sum is rounded stochastically with it; None rounds to the nearest.
        leaf: A number of the leaf, so that leaves with one seed have other random numbers.
        interpret: Runs on a CPU what a GPU would run.
    """
    *batch, rows, columns = weight.shape
    down, across = pl.cdiv(rows, _ROWS), pl.cdiv(columns, _COLUMNS)
    numbers = {"slope": factors.slope, "seed": seed}
    flat = jax.tree.map(lambda x: x.reshape(-1), (weight, numbers))
    both = (x.reshape(-1, x.shape[-1]) for x in (factors.left, factors.right))
    inputs, tree = jax.tree.flatten((flat[0], *both, flat[1]))
    outputs, out_tree = jax.tree.flatten(weight)

    def kernel(*refs: Any) -> None:
        old, left, right, given = tree.unflatten(refs[: len(inputs)])
        new = out_tree.unflatten(refs[len(inputs) :])
        matrix = pl.program_id(0) // (down * across)
        at = _Tile(
            matrix * rows,
            pl.program_id(0) // across % down * _ROWS,
            pl.program_id(0) % across * _COLUMNS,
            (rows, columns),
        )
        added = _product(factors, (left, right), matrix, at).astype(factors.left.dtype)
        floats = at.load(weight, old)
        if factors.slope is not None:
            slope = given["slope"][matrix if factors.slope.size > 1 else 0]
            decay = slope * floats.astype(weight.dtype).astype(jnp.float32)
            added += decay.astype(added.dtype)
        bits = None
        if seed is not None:
            seeds = given["seed"][0], given["seed"][1]
            bits = hashed(seeds, at.element.astype(jnp.uint32), leaf)
        at.store(weight, new, floats + added.astype(jnp.float32), bits, floats)

    made = pl.pallas_call(
        kernel,
        [jax.ShapeDtypeStruct((x.size,), x.dtype) for x in outputs],
        grid=(math.prod(batch) * down * across,),
        input_output_aliases={i: i for i in range(len(outputs))},
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="product_added",
    )(*inputs)
    return out_tree.unflatten(x.reshape(like.shape) for x, like in zip(made, outputs, strict=True))


def _product(
    factors: Factors, refs: tuple[Any, Any], matrix: Array, at: "_Tile"
) -> Float[Array, "a b"]:
    """A tile of the product, in float32."""
    left, right = refs
    rank = left.shape[1]

    def add(i: Array, total: Array) -> Array:
        summed = i * _INNER + jnp.arange(_INNER)
        across = down = None  # which of a tile's columns, and rows, are within the rank
        if rank % _INNER:
            across, down = (summed < rank)[None, :], (summed < rank)[:, None]
        x = _loaded(left, (at.before + at.row)[:, None], summed[None, :], across)
        if factors.transposed:
            row = matrix * at.shape[1] + at.column
            y = _loaded(right, row[:, None], summed[None, :], across)
        else:
            y = _loaded(right, (matrix * rank + summed)[:, None], at.column[None, :], down)
        return total + triton.dot(x, y, trans_b=factors.transposed)

    zeros = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(rank, _INNER), add, zeros)


def _loaded(ref: Any, row: Array, column: Array, there: Array | None) -> Array:
    """A tile of a factor, with zeros for what is not `there`; None if all is."""
    if there is None:
        return triton.load(ref.at[row, column])
    shape = jnp.broadcast_shapes(row.shape, column.shape)
    return triton.load(ref.at[row, column], mask=jnp.broadcast_to(there, shape), other=0.0)


class _Tile(NamedTuple):
    """A tile of one matrix; past the matrix's end its last row and column, again."""

    before: Int[Array, ""]  # rows of the stack before the matrix
    first_row: Int[Array, ""]
    first_column: Int[Array, ""]
    shape: tuple[int, int]  # of the matrix

    @property
    def row(self) -> Int[Array, " a"]:
        return _inside(self.first_row + jnp.arange(_ROWS), self.shape[0], _ROWS)

    @property
    def column(self) -> Int[Array, " b"]:
        return _inside(self.first_column + jnp.arange(_COLUMNS), self.shape[1], _COLUMNS)

    @property
    def element(self) -> Int[Array, "a b"]:
        """Numbers of the elements in the whole stack."""
        return (self.before + self.row)[:, None] * self.shape[1] + self.column[None, :]

    def _blocks(self, like: QuantizedArray) -> tuple[Array, Array]:
        """Places of the blocks' scales, `(a, blocks)`, and which of the blocks are there."""
        count = like.scales.shape[-1]
        number = self.first_column // like.block + jnp.arange(_COLUMNS // like.block)
        there = jnp.broadcast_to((number < count)[None, :], (_ROWS, len(number)))
        place = (self.before + self.row)[:, None] * count + jnp.minimum(number, count - 1)[None, :]
        return place, there

    def load(self, like: Any, ref: Any) -> Float[Array, "a b"]:
        """The weight's numbers, in float32."""
        if not is_quantized(like):
            return triton.load(ref.at[self.element]).astype(jnp.float32)
        place, _ = self._blocks(like)
        codes = load_codes(like, ref.codes, (self.before + self.row)[:, None], self.column[None, :])
        scales, offsets = (
            triton.load(x.at[place]).reshape(-1, 1) for x in (ref.scales, ref.offsets)
        )
        floats = like.code.decode(codes.reshape(-1, like.block), scales, offsets)
        return floats.reshape(_ROWS, _COLUMNS)

    def store(self, like: Any, ref: Any, x: Array, bits: Array | None, old: Array) -> None:
        """Writes new numbers."""
        rows, columns = (
            (first + jnp.arange(tile) < size)
            for first, tile, size in zip(
                (self.first_row, self.first_column), (_ROWS, _COLUMNS), self.shape, strict=True
            )
        )
        there = rows[:, None] & columns[None, :]
        if not is_quantized(like):
            assert bits is not None
            self._store(ref, self.element, rounded_to_bfloat16(x, bits), there)
            return
        place, write = self._blocks(like)
        split = (-1, like.block)
        differs = jnp.max((x != old).astype(jnp.int32).reshape(split), axis=-1) > 0
        write &= differs.reshape(write.shape) & rows[:, None]
        random = None if bits is None else bits.reshape(split)
        codes, scales, offsets = like.code.encode(x.reshape(split), -1, random)
        for part, new in ((ref.scales, scales), (ref.offsets, offsets)):
            self._store(part, place, new.reshape(place.shape), write)
        each = jnp.broadcast_to(write.reshape(-1, 1), (write.size, like.block))
        there &= each.reshape(_ROWS, _COLUMNS)
        self._store(ref.codes, self.element, codes.reshape(_ROWS, _COLUMNS), there)

    def _store(self, ref: Any, place: Array, new: Array, there: Array) -> None:
        """Stores what is there. What is not has the places of others, or goes past the end."""
        if self.shape[0] % _ROWS or self.shape[1] % _COLUMNS:
            place = jnp.where(there, place, ref.shape[0])
        triton.store(ref.at[place], new, mask=there)


def _inside(index: Array, size: int, tile: int) -> Array:
    return index if size % tile == 0 else jnp.minimum(index, size - 1)
