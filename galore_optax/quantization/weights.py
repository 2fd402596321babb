"""Weights held in 8 bits with no float copy, and written back with stochastic rounding.

Q-GaLore (arXiv:2407.08296, sections 3.3 and 3.4). An update is smaller than a step of an 8-bit code
as a rule; rounded to the nearest it would be lost, rounded up or down at random it arrives in the
mean. The same holds for weights in bfloat16.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax import checks
from galore_optax.keys import for_path
from galore_optax.quantization.array import QuantizedArray, added, is_quantized, quantize
from galore_optax.quantization.codes import Affine, random_bits
from galore_optax.quantization.elementwise import chunks, over_chunks
from galore_optax.sharding import specs, with_automatic_axes


def quantize_weights(
    params: optax.Params,
    which: optax.Params | Callable[[str, Any], bool] | None = None,
    *,
    bits: int = 8,
    block: int = 256,
) -> optax.Params:
    """The params with matrices as `QuantizedArray`s: evenly spaced codes in groups of elements.

    Args:
        params: Tree of arrays.
        which: Which leaves: a tree of booleans like params, or a prefix of one, or a function from
            a leaf's path (`jax.tree_util.keystr`) and the leaf. None takes every floating-point
            leaf with two axes or more and at least 4,096 elements.
        bits: 8 or 4.
        block: Elements of the last axis (of the one before it, if that is longer and the last is
            shorter than half a group) that share a scale and an offset.

    Returns:
        The tree, in which a model that is to compute with it calls `dequantize()` on such leaves, a
        layer at a time. Of a stack each matrix is a `QuantizedArray` again.

    Raises:
        ValueError: If `bits` is neither 8 nor 4, `block` is no whole number from 1, `which` is
            something else, or a chosen leaf cannot be quantized or is.

    References:
        Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import quantize_weights
        >>> params = quantize_weights({"w": jnp.ones((64, 256)), "norm": jnp.ones(256)})
        >>> params["w"].nbytes, params["norm"].nbytes
        (16896, 1024)
    """
    checks.choice(bits, "bits", (8, 4))
    block = checks.whole(block, "block")

    def matrix(path: str, leaf: Any) -> bool:
        del path
        return is_quantized(leaf) or (
            leaf.ndim >= 2 and leaf.size >= 4096 and jnp.issubdtype(leaf.dtype, jnp.floating)
        )

    if which is None or callable(which):
        choose = which or matrix
        chosen = jax.tree.map_with_path(
            lambda path, leaf: choose(jax.tree_util.keystr(path), leaf),
            params,
            is_leaf=is_quantized,
        )
    else:
        wrong = [x for x in jax.tree.leaves(which) if not isinstance(x, bool | np.bool_)]
        if wrong:
            raise ValueError(
                f"which={which!r} is neither a function of path and leaf nor a tree of booleans"
            )
        chosen = jax.tree.broadcast(which, params, is_leaf=is_quantized)

    def held(path: Any, leaf: Any, chosen: bool) -> Any:
        if not chosen:
            return leaf
        name = jax.tree_util.keystr(path)
        if is_quantized(leaf):
            raise ValueError(f"params: the leaf at {name} is in {leaf.code.bits} bits already")
        if np.ndim(leaf) == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"which: the leaf at {name}, of shape {leaf.shape} and dtype {leaf.dtype}, cannot "
                "be held in few bits; choose floating-point leaves with axes"
            )
        axis = -2 if leaf.ndim > 1 and leaf.shape[-1] < min(block, leaf.shape[-2]) else -1
        return quantize(leaf, Affine(bits), block=block, axis=axis)

    return jax.tree.map_with_path(held, params, chosen, is_leaf=is_quantized)


def value_and_grad(
    function: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, optax.Updates]]:
    """`jax.value_and_grad` with respect to params in which there are `QuantizedArray`s.

    Args:
        function: Of params and further arguments, to a scalar. It sees each `QuantizedArray` as one
            whose `dequantize()` has a derivative. In a product, what that gives is kept for the
            backward pass as a float copy; `galore_optax.adapters.base.product` makes it again instead.
        has_aux: As for `jax.value_and_grad`.

    Returns:
        A function of the same arguments to the value and the gradient, which at a `QuantizedArray`
        is an array: the gradient with respect to the dequantized weight, in its dtype.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import quantize_weights
        >>> from galore_optax.quantization.weights import value_and_grad
        >>> params = quantize_weights({"w": jnp.full((64, 256), 3.0)})
        >>> value, grads = value_and_grad(lambda p: jnp.sum(p["w"].dequantize() ** 2))(params)
        >>> grads["w"].shape, float(grads["w"][0, 0])
        ((64, 256), 6.0)
    """

    def wrapped(params: optax.Params, *args: Any, **kwargs: Any) -> tuple[Any, optax.Updates]:
        def of_sources(sources: optax.Params) -> Any:
            return function(with_sources(params, sources), *args, **kwargs)

        return jax.value_and_grad(of_sources, has_aux=has_aux)(sources(params))

    return wrapped


def sources(params: optax.Params) -> optax.Params:
    """The params with zeros in the place of each `QuantizedArray`, to differentiate by.

    They stand for the weights in a derivative; nothing reads them, and under jit they take no
    memory.
    """
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if is_quantized(x) else x,
        params,
        is_leaf=is_quantized,
    )


def with_sources(params: optax.Params, sources: optax.Params) -> optax.Params:
    """The params, whose derivative with respect to their `sources` is the weights' own."""
    return jax.tree.map(
        lambda x, source: _WithSource(x, source) if is_quantized(x) else source,
        params,
        sources,
        is_leaf=is_quantized,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WithSource:
    """A `QuantizedArray` whose value has the derivative of another array, its source."""

    array: QuantizedArray
    source: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def dequantize(self) -> Float[Array, "..."]:
        return _value_of(self.array, self.source)


@jax.custom_vjp
def _value_of(array: QuantizedArray, source: Float[Array, "..."]) -> Float[Array, "..."]:
    del source
    return array.dequantize()


_value_of.defvjp(
    lambda array, source: (_value_of(array, source), None), lambda _, gradient: (None, gradient)
)


def apply_updates(
    params: optax.Params, updates: optax.Updates, key: PRNGKeyArray | None
) -> optax.Params:
    """`optax.apply_updates` for weights of few bits: sums in float32, rounded at random.

    Where a weight holds fewer bits than its sum with the update, it becomes one of the two nearest
    that it can hold, each as likely as the other is far: the mean is the sum. That holds for
    `QuantizedArray`s, whose blocks without any update stay as they are, and for bfloat16; float32
    and wider weights are summed as they are, float16 is rounded to the nearest.

    Args:
        params: Tree of arrays and `QuantizedArray`s.
        updates: Like params, with an array in the place of each `QuantizedArray`.
        key: A new one at each step; None rounds to the nearest everywhere, which loses updates
            below half a step of the code.

    Raises:
        ValueError: If `key` is none, or an update is held in few bits itself.

    References:
        Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.4.

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
        raise ValueError(f"key={key!r} is no key; give one, such as jax.random.key(0), or None")
    leaves, tree = jax.tree.flatten_with_path(params, is_leaf=is_quantized)
    new: list[Any] = []
    for (path, param), update in zip(leaves, tree.flatten_up_to(updates), strict=True):
        if is_quantized(update):
            raise ValueError(
                f"updates: the one at {jax.tree_util.keystr(path)} is a QuantizedArray; give arrays"
            )
        own = None if key is None else for_path(key, path)
        if is_quantized(param) or (own is not None and param.dtype == jnp.bfloat16):
            new.append(_summed(param, update, own))
        else:
            new.append(optax.apply_updates(param, update))
    return tree.unflatten(new)


def _summed(param: Any, update: Float[Array, "..."], key: PRNGKeyArray | None) -> Any:
    """The sum, a few rows at a time where it is large, rounded to what holds the param."""

    def summed(param: Any, update: Array, number: Array) -> Any:
        own = None if key is None else jax.random.fold_in(key, number)
        if is_quantized(param):
            return added(param, update, own)
        assert own is not None
        return _bfloat16(param.astype(jnp.float32) + update.astype(jnp.float32), own)

    return over_chunks(summed, param, update, chunks(param))


def _bfloat16(x: Float[Array, "..."], key: PRNGKeyArray) -> Float[Array, "..."]:
    """Rounded at random: bfloat16 is the upper half of a float32."""

    def rounded(x: Array, key: PRNGKeyArray) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        up = random_bits(key, x.shape).astype(jnp.uint32)
        upper = ((bits + up) >> 16).astype(jnp.uint16)
        near = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
        return jnp.where(jnp.isfinite(x), near, x.astype(jnp.bfloat16))

    return with_automatic_axes(rounded, lambda _: specs(x), x, key)
