"""`quantize_state`: any optax transformation with its large arrays of state held in few bits.

Between two steps they are codes (8-bit optimizers, Dettmers et al., arXiv:2110.02861; 4-bit ones,
Li et al., arXiv:2309.01507); within a step they are what the transformation expects.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from galore_optax.codes import Code, Dynamic, Table
from galore_optax.elementwise import updated
from galore_optax.nnx_variables import without_variables
from galore_optax.nonnegative import nonnegative_state
from galore_optax.quantized import is_quantized, quantize

# Of the codes tried on the moments of a LLaMA (benchmarks/four_bit_codes.py) these change Adam's
# update least: squares for numbers with a sign, and over four powers of ten for those without.
_SQUARES = [(i / 8) ** 2 for i in range(9)]
_POWERS = [10 ** (4 * (i / 14 - 1)) for i in range(15)]

# For each number of bits the codes of numbers with and without a sign, and elements in a block.
CODES: dict[int, tuple[Code, Code, int]] = {
    8: (Dynamic(signed=True), Dynamic(signed=False), 256),
    4: (Table((*(-x for x in _SQUARES[-2:0:-1]), *_SQUARES)), Table((0.0, *_POWERS)), 128),
}


def quantize_state(
    inner: optax.GradientTransformation,
    bits: int = 8,
    *,
    min_size: int = 4096,
    unsigned: Callable[[str], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`inner` with each large floating-point array of its state as a `QuantizedArray`.

    What is not zero is never rounded to zero where numbers have no sign: a second moment of zero
    would make the next update as large as the first moment over eps. Zeros stay zeros.

    Args:
        inner: The transformation.
        bits: 8, bitsandbytes' dynamic codes in blocks of 256 elements; or 4, in blocks of 128, with
            codes of their own for numbers with and without a sign.
        min_size: Arrays of fewer elements stay as they are, as do integers and scalars. A stack of
            layers counts whole; with `galore_optax.unstacked` around, each layer by itself.
        unsigned: From the path of an array in the state, such as "[0].nu['w']", to whether it is
            never below zero; what is below it then becomes zero. None finds out by itself
            (`galore_optax.nonnegative`); arrays of which that cannot be shown have a sign.

    Returns:
        The transformation. Its state is that of `inner` with `QuantizedArray`s in place of arrays.

    Raises:
        ValueError: If `bits` is neither 8 nor 4, `min_size` is negative, or `inner` is no
            transformation.

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
    if bits not in CODES:
        raise ValueError(f"bits={bits!r}: choose one of {', '.join(map(str, CODES))}")
    if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
        raise ValueError(f"min_size={min_size!r} is no number of elements; give 0 or more")
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner={inner!r} is no optax.GradientTransformation; give one, such as "
            "optax.adam(1e-3)"
        )
    inner = optax.with_extra_args_support(inner)
    signed_code, unsigned_code, block = CODES[bits]

    def large(leaf: Any) -> bool:
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return floating and np.ndim(leaf) > 0 and np.size(leaf) >= max(min_size, 1)

    def init(params: optax.Params) -> optax.OptState:
        params = without_variables(params)
        state = inner.init(params)
        leaves, tree = jax.tree.flatten(state, is_leaf=is_quantized)
        if not any(map(large, leaves)):
            return state
        if unsigned is None:
            marks = nonnegative_state(inner, params)
        else:
            paths = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
            marks = [unsigned(jax.tree_util.keystr(path)) for path, _ in paths]
        return tree.unflatten(
            quantize(_opaque(x), unsigned_code if mark else signed_code, block=block)
            if large(x)
            else x
            for x, mark in zip(leaves, marks, strict=True)
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        def of_floats(updates: optax.Updates, state: optax.OptState, params: optax.Params) -> Any:
            return inner.update(updates, state, params, **extra_args)

        return updated(of_floats, updates, state, params)

    # optax's types say that a state is any tree, not which one.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def _opaque(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The same numbers, not known to the compiler.

    XLA would encode the zeros that most states start as while it compiles, which took it minutes
    for a large embedding. Behind a barrier themselves they would all be in memory as floats.
    """
    return x + jax.lax.optimization_barrier(jnp.zeros((), x.dtype))
