"""Weights stored in 8 bits without a float copy, updated with stochastic rounding.

Q-GaLore (arXiv:2407.08296, sections 3.3 and 3.4). An update is usually smaller than a step of an
8-bit code or of bfloat16. Rounding to the nearest loses it; stochastic rounding keeps its mean.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from galore_optax import checks
from galore_optax.keys import hashed, number_of
from galore_optax.quantization.array import QuantizedArray, added, is_quantized, quantize
from galore_optax.quantization.codes import Affine, rounded_to_bfloat16
from galore_optax.quantization.elementwise import chunks, over_chunks
from galore_optax.quantization.kernel import fits, in_one_kernel
from galore_optax.sharding import specs, varying_alike, with_automatic_axes, zeros_like


def quantize_weights(
    params: optax.Params,
    which: optax.Params | Callable[[str, Any], bool] | None = None,
    *,
    bits: int = 8,
    block: int = 256,
) -> optax.Params:
    """Quantizes matrices among the params, to evenly spaced codes in blocks.

    A model calls `dequantize()` on the `QuantizedArray`s that it gets, one layer at a time: an
    index into a stack gives a `QuantizedArray`.

    Args:
        params: Tree of arrays.
        which: The leaves to quantize: a tree of booleans like params, a prefix of one, or a
            function from a leaf's path (`jax.tree_util.keystr`) and the leaf. None takes every
            floating-point leaf with at least two axes and 4,096 elements.
        bits: 8 or 4.
        block: Elements that share a scale and an offset. Blocks run along the last axis; if it is
            shorter than a block and than the axis before, along that one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import quantize_weights
        >>> params = quantize_weights({"w": jnp.ones((64, 256)), "norm": jnp.ones(256)})
        >>> params["w"].nbytes, params["norm"].nbytes
        (16896, 1024)
    """
    checks.choice(bits, "bits", (8, 4))
    block = checks.whole(block, "block")

    def large(_: str, leaf: Any) -> bool:
        matrix = np.ndim(leaf) >= 2 and np.size(leaf) >= 4096
        return matrix and jnp.issubdtype(leaf.dtype, jnp.floating)

    choose = large if which is None else which
    if callable(choose):
        marks = params
    elif all(isinstance(x, bool | np.bool_) for x in jax.tree.leaves(which)):
        marks = jax.tree.broadcast(which, params, is_leaf=is_quantized)
    else:
        raise ValueError(
            f"which={checks.said(which)} is neither a function of path and leaf nor a tree of "
            "booleans"
        )

    def stored(path: Any, leaf: Any, mark: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if not (checks.called(choose, "which", name, leaf) if callable(choose) else mark):
            return leaf
        if is_quantized(leaf):
            raise ValueError(
                f"params: the leaf at {name} is already stored in {leaf.code.bits} bits"
            )
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if np.ndim(leaf) == 0 or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"which: the leaf at {name}, of shape {np.shape(leaf)} and dtype {dtype}, cannot "
                "be quantized; choose floating-point leaves with axes"
            )
        axis = -2 if leaf.ndim > 1 and leaf.shape[-1] < min(block, leaf.shape[-2]) else -1
        return quantize(leaf, Affine(bits), block=block, axis=axis)

    return jax.tree.map_with_path(stored, params, marks, is_leaf=is_quantized)


def value_and_grad(
    function: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, optax.Updates]]:
    """`jax.value_and_grad` with respect to params, which may have `QuantizedArray`s.

    For a `QuantizedArray` the gradient is an array: the gradient with respect to the dequantized
    weight, in its dtype. A product keeps the dequantized weight for the backward pass;
    `galore_optax.product` dequantizes it again there.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import quantize_weights, value_and_grad
        >>> params = quantize_weights({"w": jnp.full((64, 256), 3.0)})
        >>> value, grads = value_and_grad(lambda p: jnp.sum(p["w"].dequantize() ** 2))(params)
        >>> grads["w"].shape, float(grads["w"][0, 0])
        ((64, 256), 6.0)
    """
    checks.function(function, "function")
    checks.choice(has_aux, "has_aux", (False, True))

    def wrapped(params: optax.Params, *args: Any, **kwargs: Any) -> tuple[Any, optax.Updates]:
        def of_sources(sources: optax.Params) -> Any:
            return function(with_sources(params, sources), *args, **kwargs)

        return jax.value_and_grad(of_sources, has_aux=has_aux)(sources(params))

    return wrapped


def sources(params: optax.Params) -> optax.Params:
    """Returns the arrays to differentiate with respect to: zeros for a `QuantizedArray`."""

    def zeros(x: Any) -> Any:  # never read
        return zeros_like(jnp.asarray(x.codes), x.shape, x.dtype) if is_quantized(x) else x

    return jax.tree.map(zeros, params, is_leaf=is_quantized)


def with_sources(params: optax.Params, sources: optax.Params) -> optax.Params:
    """Returns params that have the weights' values, and whose gradients go to the `sources`."""

    def one(x: Any, source: Any) -> Any:
        return _WithSource(x, source) if is_quantized(x) else source

    return jax.tree.map(one, params, sources, is_leaf=is_quantized)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WithSource:
    """A `QuantizedArray` whose gradient goes to another array, its source."""

    array: QuantizedArray
    source: Float[Array, "*shape"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def dequantize(self) -> Float[Array, "*shape"]:
        return _value_of(*varying_alike((self.array, self.source)))


def array_of(weight: Any) -> Any:
    """Returns the `QuantizedArray` of one that has a source; anything else itself."""
    return weight.array if isinstance(weight, _WithSource) else weight


@jax.custom_vjp
def _value_of(array: QuantizedArray, source: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return array.dequantize()


_value_of.defvjp(lambda *args: (_value_of(*args), None), lambda _, gradient: (None, gradient))


def apply_updates(
    params: optax.Params, updates: optax.Updates, key: PRNGKeyArray | None
) -> optax.Params:
    """`optax.apply_updates` with stochastic rounding of low-bit weights.

    Sums are computed in float32. A `QuantizedArray` or a bfloat16 weight becomes one of the two
    nearest values that it can store, at random such that the mean is the sum; blocks whose updates
    are all zero stay as they are. All other weights are updated by `optax.apply_updates`.

    Each step needs a new key. None rounds to the nearest, which loses updates below half a step.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from galore_optax import apply_updates
        >>> w = jnp.ones(10_000, jnp.bfloat16)
        >>> update = jnp.full(10_000, 1e-4, jnp.bfloat16)  # a step at 1 is 2^-7
        >>> float(jnp.mean(apply_updates(w, update, None).astype(jnp.float32)))
        1.0
        >>> new = apply_updates(w, update, jax.random.key(0))
        >>> round(float(jnp.mean(new.astype(jnp.float32))), 4)
        1.0001
    """
    if not (key is None or hasattr(key, "dtype")):
        raise ValueError(
            f"key={checks.said(key)} must be a key, such as jax.random.key(0), or None"
        )

    # One for all leaves: a GPU starts several kernels for a key of each.
    seed = None if key is None else jax.random.bits(key, (2,), jnp.uint32)

    previous: list[Any] = []

    def new(path: Any, param: Any, update: Any) -> Any:
        if is_quantized(update):
            raise ValueError(
                f"updates: the one at {jax.tree_util.keystr(path)} is a QuantizedArray; give arrays"
            )
        if is_quantized(param) and is_quantized(param.scales):
            raise ValueError(
                f"params: the scales of the one at {jax.tree_util.keystr(path)} are quantized, "
                "so that an update would change other blocks; train an adapter of it (LoRA), or "
                "quantize it with quantize_nf4(weight, double=False)"
            )
        if isinstance(update, AddsItself):
            made = update.added_to(param, seed, number_of(path), previous[-1:])
            previous.append(made)
            return made
        return rounded_sum(param, update, seed, number_of(path))

    return jax.tree.map_with_path(new, params, updates, is_leaf=is_quantized)


@runtime_checkable
class AddsItself(Protocol):
    """An update that is no array yet, such as `galore_optax.projection.factored.FactoredUpdate`."""

    def added_to(
        self, param: Any, seed: UInt32[Array, "2"] | None, leaf: int, previous: Any
    ) -> Any:
        """What `rounded_sum` makes of the param and the array, after the `previous` new param."""


def rounded_sum(
    param: Any,
    update: Float[Array, "*shape"],
    seed: UInt32[Array, "2"] | None,
    leaf: int,
    in_kernel: bool = True,
) -> Any:
    """Returns the sum in the param's dtype or code, rounded stochastically if there is a seed.

    `leaf` is a number of the param, so that params with one seed have other random numbers. The sum
    is computed a few rows at a time; of a quantized param on a single GPU, if `in_kernel`, in one
    kernel.
    """
    if not is_quantized(param) and (seed is None or getattr(param, "dtype", None) != jnp.bfloat16):
        return optax.apply_updates(param, update)

    def begin(stored: Any, read: Any, elements: Array) -> Any:
        random = None if seed is None else hashed(seed, elements, leaf)
        if is_quantized(stored[0]):
            return {0: added(stored[0], read[1], random)}
        return {0: _bfloat16(stored[0].astype(jnp.float32) + read[1].astype(jnp.float32), random)}

    def summed(floats: Any, _: Any) -> dict[int, Array]:
        return {0: floats[0] + floats[1].astype(floats[0].dtype)}

    def kernel(stored: Any, read: Any) -> Any:
        return in_one_kernel(summed, stored, read, seed=seed, leaf=leaf, keep=True)

    fitting = kernel if in_kernel and fits([param]) else None
    return over_chunks(begin, {0: param}, {1: update}, partial(chunks, param), kernel=fitting)[0]


@jax.custom_jvp
def _bfloat16(x: Float[Array, "*shape"], random: Any) -> Float[Array, "*shape"]:
    """Rounds float32 stochastically to bfloat16, with the derivative of rounding to nearest."""
    return with_automatic_axes(rounded_to_bfloat16, lambda _: specs(x), x, random)


@_bfloat16.defjvp
def _bfloat16_jvp(primals: Any, tangents: Any) -> Any:
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)
