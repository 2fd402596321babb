"""`quantize_state`: any optax transformation with its large arrays of state held in few bits.

Between two steps they are codes (8-bit optimizers, Dettmers et al., arXiv:2110.02861; 4-bit ones,
Li et al., arXiv:2309.01507); within a step they are what the transformation expects.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import checks
from galore_optax.nnx_variables import without_variables
from galore_optax.ordering import opaque
from galore_optax.quantization.array import is_quantized, quantize
from galore_optax.quantization.codes import Code, Dynamic, Table
from galore_optax.quantization.elementwise import updated
from galore_optax.trace.nonnegative import nonnegative_state
from galore_optax.trace.sensitive import sensitive_state

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

    What is not zero is never rounded to zero where numbers have no sign, nor in 8 bits where they
    have one: a second moment of zero would make the next update as large as the first moment over
    eps. Zeros stay zeros. Two kinds of arrays are therefore held in more bits, with a warning: in 8
    instead of 4 what the update divides by and may have a sign (or all that may, where it cannot be
    traced), and as floats what it takes a root of the difference of, such as E[g²] - E[g]².

    Args:
        inner: The transformation.
        bits: 8, bitsandbytes' dynamic codes in blocks of 256 elements; or 4, in blocks of 128, with
            codes of their own for numbers with and without a sign.
        min_size: Arrays of fewer elements stay as they are, as do integers and scalars. A stack of
            layers counts whole; with `galore_optax.layerwise.unstacked` around, each layer by itself.
        unsigned: From the path of an array in the state, such as "[0].nu['w']", to whether it is
            never below zero; what is below it then becomes zero. None finds out by itself
            (`galore_optax.trace.nonnegative`); arrays of which that cannot be shown have a sign. With a
            function all arrays are held in `bits`.

    Returns:
        The transformation. Its state is that of `inner` with `QuantizedArray`s in place of arrays.

    Raises:
        ValueError: If `bits` is neither 8 nor 4, `min_size` is negative, `unsigned` is no function
            or `inner` no transformation; at `init`, if the state of `inner` has `QuantizedArray`s.

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
            f"unsigned={unsigned!r} is no function; give one from an array's path to whether it is "
            "never below zero, or None"
        )
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner={inner!r} is no optax.GradientTransformation; give one, such as "
            "optax.adam(1e-3)"
        )
    inner = optax.with_extra_args_support(inner)

    def large(leaf: Any) -> bool:
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return floating and np.ndim(leaf) > 0 and np.size(leaf) >= max(min_size, 1)

    def init(params: optax.Params) -> optax.OptState:
        params = without_variables(params)
        state = inner.init(params)
        pairs, tree = jax.tree.flatten_with_path(state, is_leaf=is_quantized)
        paths = [jax.tree_util.keystr(path) for path, _ in pairs]
        leaves = [leaf for _, leaf in pairs]
        if any(map(is_quantized, leaves)):
            raise ValueError(
                "inner: its state is in few bits already, in part; put quantize_state around that "
                "part of it that has floats, such as the inner transformation of galore"
            )
        chosen = [i for i, leaf in enumerate(leaves) if large(leaf)]
        if not chosen:
            return state
        marks = list(map(unsigned, paths)) if unsigned else nonnegative_state(inner, params)
        divisors, differences = ([], []) if unsigned else sensitive_state(inner, params, state)
        for i in chosen:
            if i in differences:
                _warn(paths[i], "as floats: the update takes a root of its difference with another")
                continue
            careful = bits == 4 and i in divisors and not marks[i]
            if careful:
                _warn(paths[i], "in 8 bits: the update may divide by it, and it may have a sign")
            signed_code, unsigned_code, block = CODES[8 if careful else bits]
            code = unsigned_code if marks[i] else signed_code
            leaves[i] = quantize(opaque(leaves[i]), code, block=block)
        return tree.unflatten(leaves)

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


def _warn(path: str, held: str) -> None:
    warnings.warn(f"quantize_state holds {path} {held}", stacklevel=4)
