"""How the state of any optax transformation is stored: in another dtype, or quantized.

`cast_state` stores and computes it in a dtype of its own. With `quantize_state` its large arrays
are codes between two steps (8-bit optimizers, Dettmers et al., arXiv:2110.02861; 4-bit ones,
Li et al., arXiv:2309.01507), and float32 within a step.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array

from galore_optax import checks
from galore_optax.ordering import opaque
from galore_optax.params import for_init, of_arrays
from galore_optax.quantization.array import dequantized, is_quantized, quantize
from galore_optax.quantization.codes import Code, Dynamic, Table
from galore_optax.quantization.elementwise import updated
from galore_optax.trace.roles import Role, state_roles
from galore_optax.trace.traced import as_floats_asked, trace
from galore_optax.transformation import is_observed

# Of the codes tried on the moments of a LLaMA (benchmarks/four_bit_codes.py) these change Adam's
# update least: squares for numbers with a sign, and over four powers of ten for those without.
_SQUARES = [(i / 8) ** 2 for i in range(9)]
_POWERS = [10 ** (4 * (i / 14 - 1)) for i in range(15)]

# For each number of bits the codes of numbers with and without a sign, and elements in a block.
CODES: dict[int, tuple[Code, Code, int]] = {
    8: (Dynamic(signed=True), Dynamic(signed=False), 256),
    4: (Table((*(-x for x in _SQUARES[-2:0:-1]), *_SQUARES)), Table((0.0, *_POWERS)), 128),
}


def cast_state(
    inner: optax.GradientTransformation, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Stores and computes the state of `inner` in a dtype of its own.

    `inner` is given params and gradients in that dtype; its updates are returned in the gradients'.
    Without it, optax's moments have the dtype of the params. In bfloat16 a second moment hardly
    ever decreases: 0.1% of it is less than half of its last bit.

    Args:
        inner: The transformation.
        dtype: A float type; None takes float32, or float64 for params that are float64. An array
            whose dtype `inner` chooses by itself keeps that.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import cast_state, galore
        >>> tx = galore(16, cast_state(optax.adamw(0.01)))
        >>> state = tx.init({"w": jnp.ones((64, 256), jnp.bfloat16)})
        >>> state.inner[0].nu["w"].dtype.name, state.bases["w"].dtype.name
        ('float32', 'bfloat16')
    """
    if dtype is not None:
        checks.float_dtype(dtype, "dtype")
    inner = optax.with_extra_args_support(_transformation(inner))

    def cast(tree: Any) -> Any:
        def one(x: Any) -> Any:
            own = jnp.result_type(x)
            wanted = dtype or jnp.promote_types(own, jnp.float32)
            return jnp.asarray(x, wanted) if jnp.issubdtype(own, jnp.floating) else x

        return jax.tree.map(one, dequantized(tree))

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(cast(for_init(params)))

    @of_arrays
    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        new, state = inner.update(cast(updates), state, cast(params), **extra_args)

        def as_given(u: Array, g: Any) -> Array:  # but no fractions as integers, as in optax
            own = jnp.result_type(g)
            return u.astype(own) if jnp.issubdtype(own, jnp.inexact) else u

        return jax.tree.map(as_given, new, updates), state

    # optax's types say that a state is any tree, not which one.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def quantize_state(
    inner: optax.GradientTransformation,
    bits: int = 8,
    *,
    min_size: int = 4096,
    unsigned: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Quantizes each large floating-point array of the state of `inner`, between updates.

    A second moment rounded to zero would make the next update as large as the first moment over
    eps. So only signed numbers in 4 bits are ever rounded to zero, and two kinds of arrays take
    more bits, with a warning: 8 instead of 4 for an array that the update divides by and that may
    have a sign (for every signed array, if the update cannot be traced), and floats for one whose
    difference from another the update takes a root of, such as E[g²] - E[g]². Zeros stay zeros.

    Args:
        inner: The transformation.
        bits: 8, bitsandbytes' dynamic codes in blocks of 256 elements; or 4, in blocks of 128, with
            different codes for numbers with and without a sign.
        min_size: Arrays of fewer elements stay floats. A stack of layers counts as a whole; with
            `unstacked` around it, each layer by itself.
        unsigned: From the path of an array in the state, such as "[0].nu['w']", to whether it is
            never negative; negative numbers in it then become zero, and all arrays take `bits`.
            None reads it from the traced update; what is not shown to be unsigned is signed.

    Returns:
        The transformation. Its state is that of `inner` with `QuantizedArray`s instead of arrays.

    References:
        Dettmers et al., `8-bit Optimizers via Block-wise Quantization
        <https://arxiv.org/abs/2110.02861>`_, 2021.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import quantize_state
        >>> tx = quantize_state(optax.adam(1e-3))
        >>> state = tx.init({"w": jnp.ones((64, 256)), "b": jnp.ones(256)})
        >>> state[0].mu["w"].nbytes, state[0].mu["b"].nbytes
        (16640, 1024)
    """
    checks.choice(bits, "bits", tuple(CODES))
    min_size = checks.whole(min_size, "min_size", least=0)
    if not (unsigned is None or callable(unsigned)):
        raise ValueError(
            f"unsigned={checks.said(unsigned)} is not a function; give one from an array's path "
            "to whether it "
            "is never negative, or None"
        )
    inner = cast_state(inner)
    said: set[str] = set()

    def warn(path: str, how: str) -> None:  # once, though galore traces `init` at each update
        if path not in said or is_observed():  # `explain` says all of it
            said.add(path)
            warnings.warn(f"quantize_state stores {path} {how}", stacklevel=3)

    def large(leaf: Any) -> bool:
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return floating and np.ndim(leaf) > 0 and np.size(leaf) >= max(min_size, 1)

    def init(params: optax.Params) -> optax.OptState:
        params = dequantized(for_init(params))
        state = inner.init(params)
        if as_floats_asked():
            return state
        pairs = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
        paths = [jax.tree_util.keystr(path) for path, _ in pairs]
        leaves, tree = jax.tree.flatten(state, is_leaf=is_quantized)
        if any(map(is_quantized, leaves)):
            raise ValueError(
                "inner: its state is quantized already, in part; put quantize_state around the "
                "part of it whose state is floats, such as the inner transformation of galore"
            )
        chosen = [i for i, leaf in enumerate(leaves) if large(leaf)]
        if not chosen:
            return state
        if unsigned:
            roles = [
                Role(nonnegative=bool(checks.called(unsigned, "unsigned", path)), divisor=False)
                for path in paths
            ]
        else:
            roles = state_roles(trace(inner, params))
        for i in chosen:
            role = roles[i]
            if role.rooted:
                warn(paths[i], "as floats: the update takes a root of its difference with another")
                continue
            careful = bits == 4 and role.divisor and not role.nonnegative
            if careful:
                warn(paths[i], "in 8 bits: the update may divide by it, and it may have a sign")
            signed_code, unsigned_code, block = CODES[8 if careful else bits]
            code = unsigned_code if role.nonnegative else signed_code
            leaves[i] = quantize(opaque(leaves[i]), code, block=block)
        return tree.unflatten(leaves)

    @of_arrays
    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return updated(partial(inner.update, **extra_args), updates, state, params)

    # optax's types say that a state is any tree, not which one.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _transformation(inner: Any) -> optax.GradientTransformation:
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner={checks.said(inner)} is not an optax.GradientTransformation; give one, such as "
            "optax.adam(1e-3)"
        )
    return inner
