"""Which arrays of an optimizer's state are never below zero, read from its traced update.

Like a second moment, a weighted sum of squares. Names do not tell: the v of Adafactor is one, that
of Adan is an average of gradients' differences. The argument is by induction over the steps: what
starts at zero or above, and follows from such without a difference, stays so.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from galore_optax.trace.interpreter import opened, traced_update

# Primitives that give nothing below zero: of anything, and of what is not below zero itself.
_OF_ANYTHING = {"abs", "square", "exp", "exp2", "logistic", "sqrt", "rsqrt", "iota"}
_OF_SUCH = {
    "add", "add_any", "mul", "div", "min", "pow", "integer_pow", "log1p", "cbrt",
    "reduce_sum", "reduce_max", "reduce_min", "dot_general", "cumsum", "concatenate", "pad",
    "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "dynamic_slice", "rev",
    "dynamic_update_slice", "convert_element_type", "reduce_precision", "copy", "stop_gradient",
    "sharding_constraint", "reshard", "optimization_barrier",
}  # fmt: skip


def nonnegative_state(inner: optax.GradientTransformation, params: optax.Params) -> list[bool]:
    """A mark for each leaf of `inner.init(params)`, in the order of `jax.tree.leaves`.

    Args:
        inner: The transformation. One that wants extra arguments other than optax's usual ones
            cannot be traced: then nothing is marked.
        params: Its params: arrays or `jax.ShapeDtypeStruct`; their values are not used.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax.trace.nonnegative import nonnegative_state
        >>> params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
        >>> nonnegative_state(optax.scale_by_adam(), params)  # count, mu, nu
        [True, False, True]
    """
    inner = optax.with_extra_args_support(inner)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    made, state = jax.make_jaxpr(inner.init, return_shape=True)(params)
    leaves = jax.tree.leaves(params)
    marks = _nonnegative(made, [False] * len(leaves))
    updated = traced_update(inner, params, state)
    if updated is None:
        return [False] * len(marks)
    while True:
        after = _nonnegative(updated, [False] * (2 * len(leaves)) + marks)
        kept = [a and b for a, b in zip(marks, after, strict=True)]
        if kept == marks:
            return marks
        marks = kept


def _nonnegative(traced: ClosedJaxpr | Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """A mark for each output, where marked inputs are not below zero."""
    jaxpr = opened(traced)
    constants = traced.consts if isinstance(traced, ClosedJaxpr) else []
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    marked |= {v for v, c in zip(jaxpr.constvars, constants, strict=False) if _known(c)}

    def is_marked(atom: Any) -> bool:
        return _known(atom.val) if isinstance(atom, Literal) else atom in marked

    for equation in jaxpr.eqns:
        marks = _of_equation(equation, [is_marked(atom) for atom in equation.invars])
        marked |= {v for v, mark in zip(equation.outvars, marks, strict=True) if mark}
    return [is_marked(atom) for atom in jaxpr.outvars]


def _of_equation(equation: Any, into: list[bool]) -> list[bool]:
    name, params, outputs = equation.primitive.name, equation.params, len(equation.outvars)
    invars = equation.invars
    if name == "cond":
        branches = [_nonnegative(branch, into[1:]) for branch in params["branches"]]
        return [all(marks) for marks in zip(*branches, strict=True)]
    bodies = [p for p in params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
    if len(bodies) == 1 and name not in ("scan", "while"):
        body = opened(bodies[0])
        fits = len(body.invars) == len(into) and len(body.outvars) == outputs
        return _nonnegative(bodies[0], into) if fits else [False] * outputs
    if name == "select_n":
        return [all(into[1:])]
    if name == "sub":
        # One minus a decay rate, which may follow a schedule: a weight.
        first = invars[0]
        one = isinstance(first, Literal) and np.ndim(first.val) == 0 and first.val == 1
        return [one and invars[1].aval.shape == ()]
    if name == "max":
        return [any(into)]
    even = name == "integer_pow" and params["y"] % 2 == 0
    squared = name == "mul" and invars[0] is invars[1]
    return [even or squared or name in _OF_ANYTHING or (name in _OF_SUCH and all(into))] * outputs


def _known(value: Any) -> bool:
    """Whether a constant is seen to be not below zero, without looking at large ones."""
    # A random key has no number.
    return (
        np.size(value) <= 1
        and not jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended)
        and jnp.issubdtype(np.asarray(value).dtype, np.number)  # bfloat16, too
        and bool(np.all(np.asarray(value) >= 0))
    )
