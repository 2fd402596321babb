"""Products of a few rows with a quantized matrix, on a GPU without the matrix in floats.

With few rows a product takes as long as its matrix is read. Dequantizing it first reads the codes,
writes 16-bit floats and reads them; here the kernel (Pallas, Triton) decodes the codes that it has
read. With many rows the time is that of the arithmetic, and XLA's own products do it faster.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from galore_optax.lowering import on_one_gpu
from galore_optax.ordering import codes_after
from galore_optax.quantization.array import QuantizedArray, is_quantized
from galore_optax.quantization.kernel import load_codes
from galore_optax.sharding import explicit_axes

# The most rows: of these the arithmetic takes about as long as the dequantized matrix's bytes.
FEW = 512
_ROWS, _INNER, _COLUMNS = 64, 64, 128  # of a tile


def fits_product(rows: Array, weight: Any) -> bool:
    """Whether the kernel takes rows and a weight."""
    if any(map(explicit_axes, jax.tree.leaves((rows, weight)))):
        return False
    return (
        is_quantized(weight)
        and not is_quantized(weight.scales)
        and (weight.ndim, weight.axis) == (2, -1)
        and weight.block % _COLUMNS == 0
        and rows.dtype in (jnp.bfloat16, jnp.float16)
        and rows.ndim == 2
        and 16 <= rows.shape[0] <= FEW
        and weight.size < 2**31
    )


def quantized_product(
    rows: Float[Array, "N in"], weight: QuantizedArray, *, transposed: bool = False
) -> Float[Array, "N out"]:
    """`rows @ weight`, or with `transposed` `rows @ weightᵀ`, in the dtype of the rows.

    Where it is transposed, which is in a backward pass, the matrix is dequantized again.
    """

    def dequantized(rows: Array, weight: QuantizedArray) -> Array:
        if transposed:
            return rows @ codes_after(rows, weight).dequantize().astype(rows.dtype).T
        return rows @ weight.dequantize().astype(rows.dtype)

    return on_one_gpu(partial(kernel_product, transposed=transposed), dequantized, rows, weight)


def kernel_product(
    rows: Array, weight: QuantizedArray, *, transposed: bool, interpret: bool = False
) -> Array:
    """The product by the kernel: a program has a tile of the result."""
    count, shape = rows.shape[0], weight.shape
    width = shape[0] if transposed else shape[1]
    # Of the result; of the axis that is summed over.
    tile = (_ROWS, _INNER if transposed else _COLUMNS)
    step, length = (_COLUMNS, shape[1]) if transposed else (_INNER, shape[0])
    across = pl.cdiv(width, tile[1])
    # `train.memory.program` reads the length of the sums from the axes of the rows.
    arrays, tree = jax.tree.flatten((rows, jax.tree.map(lambda x: x.reshape(-1), weight)))

    def kernel(*refs: Any) -> None:
        own, matrix = tree.unflatten(refs[:-1])
        row = pl.program_id(0) // across * tile[0] + jnp.arange(tile[0])
        column = pl.program_id(0) % across * tile[1] + jnp.arange(tile[1])

        def add(i: Array, total: Array) -> Array:
            summed = i * step + jnp.arange(step)
            at = jnp.minimum(row, count - 1)[:, None], jnp.minimum(summed, length - 1)[None, :]
            x = triton.load(own.at[at])
            x = jnp.where((summed < length)[None, :], x, jnp.zeros((), x.dtype))
            if transposed:
                w = _decoded(weight, matrix, column, summed).astype(x.dtype)
                return total + triton.dot(x, w, trans_b=True)
            return total + triton.dot(x, _decoded(weight, matrix, summed, column).astype(x.dtype))

        zeros = jnp.zeros(tile, jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(length, step), add, zeros)
        there = (row < count)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        triton.store(refs[-1].at[at], total.astype(rows.dtype), mask=there)

    made = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((count * width,), rows.dtype),
        grid=(pl.cdiv(count, tile[0]) * across,),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="quantized_product",
    )(*arrays)
    return made.reshape(count, width)


def _decoded(like: QuantizedArray, ref: Any, row: Array, column: Array) -> Array:
    """Part of a matrix in floats, of which consecutive columns are in one block."""
    row = jnp.minimum(row, like.shape[0] - 1)[:, None]
    column = jnp.minimum(column, like.shape[1] - 1)[None, :]
    codes = load_codes(like, ref.codes, row, column)
    at = row * like.scales.shape[1] + jnp.min(column) // like.block
    offsets = None if like.offsets is None else triton.load(ref.offsets.at[at])
    return like.code.decode(codes, triton.load(ref.scales.at[at]), offsets)
