"""What stands in a frozen weight's place: a pytree node of it and what is trained instead.

A model that multiplies its rows by `product` takes plain matrices, quantized ones and adapters
alike, stacked over layers too: a `jax.lax.scan` over the stack gives it one layer's node at a time.
Matrices are (in, out), so the correction that LoRA (arXiv:2106.09685) writes as B A of (out, in)
matrices is a @ b here, a of shape (in, rank) and b of shape (rank, out).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from galore_optax.keys import for_path
from galore_optax.ordering import codes_after
from galore_optax.projection.dimension_numbers import GaLoreDimensionNumbers
from galore_optax.quantization.array import (
    QuantizedArray,
    dequantized,
    is_quantized,
    stored_like,
)
from galore_optax.quantization.codes import Affine


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A frozen weight and the factors that are trained in its place; subclasses say what for.

    Attributes:
        base: The frozen weight, `(*layers, in, out)`, which may be quantized; None among the
            trained params, and where there is none.
        a: The factor at the input, `(*layers, in, rank)`.
        b: The factor at the output, `(*layers, rank, out)`.
    """

    base: Any
    a: Float[Array, "*layers in r"]
    b: Float[Array, "*layers r out"]

    def matrix(self) -> Float[Array, "*layers in out"]:
        """The weight that the model has in effect, in the dtype of the base: the merged one."""
        raise NotImplementedError

    def merged(self) -> Float[Array, "*layers in out"]:
        """`matrix`, computed one layer at a time."""
        make: Callable[[Self], Array] = type(self).matrix
        for _ in range(self.a.ndim - 2):
            make = functools.partial(jax.lax.map, make)
        return make(self)

    def times(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """`rows @ self.matrix()` of one layer, in the rows' dtype."""
        return rows @ self.matrix().astype(rows.dtype)

    def restarted(self, key: PRNGKeyArray) -> Self:
        """The merged weight, stored as the base is, with an adapter that does not change it yet."""
        raise NotImplementedError


def is_adapter(x: Any) -> bool:
    """Whether a node of the params is an `Adapter`; for `is_leaf`."""
    return isinstance(x, Adapter)


def wide(weight: Array | QuantizedArray) -> Float[Array, "..."]:
    """A weight in float32 at least, in which a small correction of it is not lost."""
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    return weight.dequantize(dtype) if isinstance(weight, QuantizedArray) else weight.astype(dtype)


def stored(merged: Float[Array, "..."], base: Any, key: PRNGKeyArray) -> Any:
    """A merged weight in the code of its base, in which affine codes round at random."""
    affine = is_quantized(base) and isinstance(base.code, Affine)
    return stored_like(merged, base, key if affine else None)


def new_factors(
    weight: Array | QuantizedArray, key: PRNGKeyArray, rank: int
) -> tuple[Float[Array, "*layers in r"], Float[Array, "*layers r out"]]:
    """Factors whose product is zero: a uniform within ±1/√in, as PEFT draws it, and b zero.

    Raises:
        ValueError: If the weight is no matrix, or the rank not from 1 to its smaller side.
    """
    if len(weight.shape) < 2:
        raise ValueError(
            f"a weight of shape {weight.shape} has no low-rank factors; adapt only matrices "
            "(in, out) or stacks of them"
        )
    *layers, rows, columns = weight.shape
    most = min(rows, columns)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank!r} for a weight of shape {weight.shape}: a whole number from 1 to its "
            f"smaller side, {most}, is needed"
        )
    a = jax.random.uniform(key, (*layers, rows, rank), weight.dtype, -1, 1) / rows**0.5
    return a, jnp.zeros((*layers, rank, columns), weight.dtype)


def product(rows: Float[Array, "N in"], weight: Any) -> Float[Array, "N out"]:
    """`rows @ weight`, where the weight may be quantized or an adapter.

    Of these only what they are made of is kept for the backward pass: the matrix is made again
    there, so that no more than one layer's is there at a time. A step of LLaMA-60M with
    GradNormLoRP (rank 64, 8 x 256 tokens, products kept) needs 649 MiB so, 745 by plain
    differentiation, which of quantized weights would keep float copies, too.
    """
    if is_adapter(weight) or hasattr(weight, "dequantize"):
        return _product_made_again(rows, weight)
    return _product(rows, weight)


def _product(rows: Array, weight: Any) -> Array:
    return (
        weight.times(rows) if is_adapter(weight) else rows @ dequantized(weight).astype(rows.dtype)
    )


# No jax.checkpoint: one around this, whose policy keeps all products, would keep a @ b, too.
@jax.custom_vjp
def _product_made_again(rows: Array, weight: Any) -> Array:
    return _product(rows, weight)


def _forward(rows: Array, weight: Any) -> tuple[Array, tuple[Array, Any]]:
    return _product(rows, weight), (rows, weight)


def _backward(residuals: tuple[Array, Any], cotangent: Array) -> tuple[Any, ...]:
    rows, weight = residuals
    return jax.vjp(_product, rows, codes_after(cotangent, weight))[1](cotangent)


_product_made_again.defvjp(_forward, _backward)


Frozen = dict[str, Any]


def split(params: PyTree, *, adapters_only: bool = False) -> tuple[PyTree, Frozen]:
    """Params with adapters in them as what is trained and what is frozen.

    Gradients and an optimizer's state are for the first alone: `jax.grad` of
    `lambda trained: loss(join(trained, frozen))`.

    Args:
        params: Tree of arrays and adapters.
        adapters_only: Freezes params that have no adapter; they are trained otherwise.

    Returns:
        The tree with each adapter's base left out (and None in place of what is frozen), and what
        is frozen, by path.
    """

    def trained(x: Any) -> Any:
        return dataclasses.replace(x, base=None) if is_adapter(x) else None if adapters_only else x

    leaves = jax.tree.leaves_with_path(params, is_leaf=_is_one)
    frozen = {
        jax.tree_util.keystr(path): x.base if is_adapter(x) else x
        for path, x in leaves
        if adapters_only or is_adapter(x)
    }
    return jax.tree.map(trained, params, is_leaf=_is_one), frozen


def _is_one(x: Any) -> bool:
    return is_adapter(x) or is_quantized(x)


def join(trained: PyTree, frozen: Frozen) -> PyTree:
    """The inverse of `split`."""

    def one(path: Any, x: Any) -> Any:
        held = frozen.get(jax.tree_util.keystr(path))
        return dataclasses.replace(x, base=held) if is_adapter(x) else held if x is None else x

    return jax.tree.map_with_path(one, trained, is_leaf=lambda x: x is None or is_adapter(x))


def merge(params: PyTree) -> PyTree:
    """Params with each adapter's merged weight in its place: plain arrays, with equal outputs."""
    return jax.tree.map(lambda x: x.merged() if is_adapter(x) else x, params, is_leaf=is_adapter)


def restart(params: PyTree, key: PRNGKeyArray) -> PyTree:
    """Params with each adapter merged into its weight, and begun anew.

    Outputs are equal, to the rounding of the weights' dtype or code.

    Args:
        params: Tree of arrays and adapters.
        key: Of the new factors, and of the rounding of quantized weights; paths are folded in.
    """

    def one(path: Any, x: Any) -> Any:
        return x.restarted(for_path(key, path)) if is_adapter(x) else x

    return jax.tree.map_with_path(one, params, is_leaf=is_adapter)


def factors(params: PyTree) -> PyTree:
    """A tree like params of whether a leaf is a factor, a or b, of an adapter."""

    def one(x: Any) -> Any:
        def is_factor(path: Any, _: Any) -> bool:
            return is_adapter(x) and path[0].name in ("a", "b")

        return jax.tree.map_with_path(is_factor, x)

    return jax.tree.map(one, params, is_leaf=is_adapter)


def factor_dimension_numbers(params: PyTree) -> PyTree:
    """GaLore's `weight_dimension_numbers` for the factors of every adapter, and for them alone."""
    numbers = GaLoreDimensionNumbers(-2, -1)
    return jax.tree.map(lambda is_factor: numbers if is_factor else None, factors(params))
