"""The pytree node that replaces an adapted weight, its product, and trees with such nodes.

A model that multiplies its rows by `product` takes plain matrices, quantized ones and adapters
alike. All of them may be stacked over layers: a `jax.lax.scan` over the stack gives one layer's
node at a time. Matrices are (in, out), so LoRA's B A (arXiv:2106.09685) is a @ b here.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from galore_optax import checks
from galore_optax.keys import for_path
from galore_optax.ordering import codes_after
from galore_optax.projection.dimension_numbers import GaLoreDimensionNumbers
from galore_optax.quantization.array import QuantizedArray, dequantized, is_quantized, stored_like
from galore_optax.quantization.codes import Affine, elements, random_bits
from galore_optax.quantization.product import fits_product, quantized_product
from galore_optax.quantization.weights import array_of, rounded_sum

Frozen = dict[str, Any]  # frozen weights by path, as `split` returns them


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A frozen weight and the factors that are trained instead; subclasses define the product.

    `base` is the frozen weight `(*layers, in, out)`, an array or a `QuantizedArray`. It is None in
    the trained part of the params, and where there is no frozen weight.
    """

    base: Any
    a: Float[Array, "*layers in r"]
    b: Float[Array, "*layers r out"]

    @classmethod
    def create(cls, weight: Any, key: PRNGKeyArray, rank: int) -> Self:
        """Returns an adapter of a matrix or a stack of them, with the weight's own product.

        The key draws `a`; `b` is zero. ValueError if the rank does not fit the weight.
        """
        return cls(weight, **cls.new_parts(weight, key, rank))

    @classmethod
    def new_parts(cls, weight: Any, key: PRNGKeyArray, rank: int) -> dict[str, Array]:
        """Returns trained fields that leave a weight unchanged, by name."""
        check_rank(weight, rank)
        *layers, rows, columns = weight.shape
        # Uniform within ±1/√in, as in PEFT; in float32, since bfloat16 takes 7 random bits.
        wide = jnp.promote_types(weight.dtype, jnp.float32)
        a = jax.random.uniform(key, (*layers, rows, rank), wide, -1, 1) / rows**0.5
        return {"a": a.astype(weight.dtype), "b": jnp.zeros((*layers, rank, columns), weight.dtype)}

    def matrix(self) -> Float[Array, "*layers in out"]:
        """Returns the merged weight, in the dtype of the base."""
        raise NotImplementedError

    def merged(self) -> Float[Array, "*layers in out"]:
        """Returns `matrix`, computed one layer at a time."""
        make: Callable[[Self], Array] = type(self).matrix
        for _ in range(self.a.ndim - 2):
            make = functools.partial(jax.lax.map, make)
        return make(self)

    def times(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """Returns `rows @ self.matrix()` of one layer, in the rows' dtype."""
        return multiply(rows, self.matrix())

    def restarted(self, key: PRNGKeyArray) -> Self:
        """Returns an adapter with the merged weight as base, stored as the old base is."""
        new, rounding = jax.random.split(key)
        if self.base.dtype == jnp.bfloat16 and not is_quantized(self.base):
            base = self._merged_at_random(rounding)
        else:
            affine = is_quantized(self.base) and isinstance(self.base.code, Affine)
            random = random_bits(rounding, elements(self.base.shape)) if affine else None
            base = stored_like(self.merged(), self.base, random)
        return dataclasses.replace(self, base=base, **self.new_parts(base, new, self.a.shape[-1]))

    def _merged_at_random(self, key: PRNGKeyArray) -> Array:
        """Returns `merged` of a base in bfloat16, of which nearest rounding loses small factors."""

        def make(layer: Any) -> Array:
            own, key = layer
            change = dataclasses.replace(own, base=wide(own.base)).matrix() - wide(own.base)
            return rounded_sum(own.base, change, jax.random.bits(key, (2,), jnp.uint32), 0)

        mapped: Callable[[Any], Array] = make
        for _ in range(self.a.ndim - 2):
            mapped = functools.partial(jax.lax.map, mapped)
        return mapped((self, jax.random.split(key, self.a.shape[:-2])))


def is_adapter(x: Any) -> bool:
    """Whether a node of the params is an `Adapter`; for `is_leaf`."""
    return isinstance(x, Adapter)


def check_rank(weight: Array | QuantizedArray, rank: int) -> None:
    """Raises ValueError if a weight is not a matrix, or a rank exceeds its smaller side."""
    if len(getattr(weight, "shape", ())) < 2:
        shape = getattr(weight, "shape", None)
        what = checks.said(weight) if shape is None else f"a weight of shape {shape}"
        raise ValueError(
            f"{what} has no low-rank factors; adapt only matrices (in, out) or stacks of them"
        )
    checks.static(rank, "rank")
    most = min(weight.shape[-2:])
    if not checks.indexes(rank) or not 1 <= rank <= most:
        raise ValueError(
            f"rank={checks.said(rank)} for a weight of shape {weight.shape}: must be an integer "
            f"from 1 to its smaller side, {most}"
        )


def wide(weight: Array | QuantizedArray) -> Float[Array, "*layers n m"]:
    """Returns a weight in float32 or wider, where a small correction is not rounded away."""
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    return weight.dequantize(dtype) if isinstance(weight, QuantizedArray) else weight.astype(dtype)


def product(rows: Float[Array, "N in"], weight: Any) -> Float[Array, "N out"]:
    """Returns `rows @ weight`, where the weight may be quantized or an adapter.

    The backward pass computes the matrix of a quantized weight or an adapter again, so that only
    one layer's exists at a time: 649 MiB instead of 745 MiB for a step of LLaMA-60M with
    GradNormLoRP (rank 64, 8 x 256 tokens, products kept).
    """
    if is_adapter(weight) or hasattr(weight, "dequantize"):
        return _recomputed_product(rows, weight)
    return _product(rows, weight)


def _product(rows: Float[Array, "N in"], weight: Any) -> Float[Array, "N out"]:
    if is_adapter(weight):
        return weight.times(rows)
    return multiply(rows, dequantized(weight))


def multiply(rows: Float[Array, "N in"], matrix: Float[Array, "in out"]) -> Float[Array, "N out"]:
    """Returns `rows @ matrix` in the rows' dtype: every product of floats in a linear layer."""
    return rows @ matrix.astype(rows.dtype)


# Not jax.checkpoint: an outer one whose policy keeps all products would keep a @ b too.
@jax.custom_vjp
def _recomputed_product(rows: Float[Array, "N in"], weight: Any) -> Float[Array, "N out"]:
    array = array_of(weight)
    return quantized_product(rows, array) if fits_product(rows, array) else _product(rows, weight)


def _forward(rows: Array, weight: Any) -> tuple[Array, tuple[Array, Any]]:
    return _recomputed_product(rows, weight), (rows, weight)


def _backward(kept: tuple[Array, Any], cotangent: Array) -> tuple[Any, ...]:
    rows, weight = kept
    array = array_of(weight)
    if not fits_product(rows, array):
        return jax.vjp(_product, rows, codes_after(cotangent, weight))[1](cotangent)
    (of_weight,) = jax.vjp(functools.partial(_product, rows), weight)[1](cotangent)
    return quantized_product(cotangent, array, transposed=True), of_weight


_recomputed_product.defvjp(_forward, _backward)


def adapt(
    params: PyTree, create: Callable[..., Adapter], key: PRNGKeyArray, *, pattern: str = ""
) -> PyTree:
    """Returns params with adapters instead of some of the matrices.

    Adapted are leaves with three axes, `(layers, in, out)`, in whose path, such as "layers/mlp/up",
    the regular expression `pattern` is found. `create`, such as `partial(LoRA.create, rank=8)`,
    makes an adapter from a weight and a key. ValueError if no leaf is adapted.
    """
    checks.instance(pattern, "pattern", str)
    leaves, tree = jax.tree.flatten_with_path(params, is_leaf=is_quantized)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    matrices = [name for name, (_, x) in zip(names, leaves, strict=True) if np.ndim(x) == 3]
    chosen = {name for name in matrices if re.search(pattern, name)}
    if not chosen:
        raise ValueError(
            f"pattern={checks.said(pattern)} matches the path of no matrix that can be adapted; "
            "these are " + (", ".join(matrices) or "none: adapters take stacks (layers, in, out)")
        )
    checks.function(create, "create")

    def made(x: Any, path: Any) -> Adapter:
        adapter = checks.called(create, "create", x, for_path(key, path))
        checks.instance(adapter, "create", Adapter)
        return adapter

    return tree.unflatten(
        made(x, path) if name in chosen else x
        for name, (path, x) in zip(names, leaves, strict=True)
    )


def split(
    params: PyTree,
    *,
    adapters_only: bool = False,
    trains: Callable[[str], bool] = lambda path: True,
) -> tuple[PyTree, Frozen]:
    """Splits params into a trained and a frozen part; `join` is the inverse.

    The trained part has None instead of each adapter's base, and of each leaf or adapter for whose
    path, such as "layers/mlp/up", `trains` returns False; with `adapters_only` also instead of each
    leaf without an adapter. Differentiate `lambda trained: loss(join(trained, frozen))`.
    """
    checks.choice(adapters_only, "adapters_only", (False, True))
    checks.function(trains, "trains")
    frozen: Frozen = {}

    def trained(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        whole = is_adapter(x) or not adapters_only
        if not whole or not checks.called(trains, "trains", name):
            frozen[jax.tree_util.keystr(path)] = x
            return None
        if not is_adapter(x):
            return x
        frozen[jax.tree_util.keystr(path)] = x.base
        return dataclasses.replace(x, base=None)

    def is_leaf(x: Any) -> bool:
        return is_adapter(x) or is_quantized(x)

    return jax.tree.map_with_path(trained, params, is_leaf=is_leaf), frozen


def join(trained: PyTree, frozen: Frozen) -> PyTree:
    """Returns the params that `split` was given."""

    def one(path: Any, x: Any) -> Any:
        base = frozen.get(jax.tree_util.keystr(path))
        return dataclasses.replace(x, base=base) if is_adapter(x) else base if x is None else x

    return jax.tree.map_with_path(one, trained, is_leaf=lambda x: x is None or is_adapter(x))


def merge(params: PyTree) -> PyTree:
    """Returns params with each adapter's merged weight, a plain array with equal outputs."""
    return jax.tree.map(lambda x: x.merged() if is_adapter(x) else x, params, is_leaf=is_adapter)


def factors(params: PyTree) -> PyTree:
    """Returns a tree like params that tells for each leaf whether it is an adapter's a or b."""

    def one(x: Any) -> Any:
        adapter = is_adapter(x)
        return jax.tree.map_with_path(lambda path, _: adapter and path[0].name in ("a", "b"), x)

    return jax.tree.map(one, params, is_leaf=is_adapter)


def factor_dimension_numbers(params: PyTree) -> PyTree:
    """Returns GaLore's `weight_dimension_numbers` that project every adapter's factors only."""
    numbers = GaLoreDimensionNumbers(-2, -1)
    return jax.tree.map(lambda is_factor: numbers if is_factor else None, factors(params))
