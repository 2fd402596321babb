"""Which leaves of an optimizer's state are never negative, read from its traced update.

A second moment is one, as a weighted sum of squares. Names do not tell: the v of Adafactor is one,
that of Adan is an average of gradients' differences. The argument is by induction over the steps:
what starts at zero or above, and follows from such values without a difference, stays so.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from galore_optax.trace.interpreter import Reading

# Primitives that return nothing negative: from any operand, and from operands that are not negative.
_FROM_ANY = {"abs", "square", "exp", "exp2", "logistic", "sqrt", "rsqrt", "iota"}
_FROM_NONNEGATIVE = {
    "add", "add_any", "mul", "div", "min", "pow", "integer_pow", "log1p", "cbrt",
    "reduce_sum", "reduce_max", "reduce_min", "dot_general", "cumsum", "concatenate", "pad",
    "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "dynamic_slice", "rev",
    "dynamic_update_slice", "convert_element_type", "reduce_precision", "copy", "stop_gradient",
    "sharding_constraint", "reshard", "optimization_barrier",
}  # fmt: skip


class Nonnegative(Reading):
    """Abstract values are whether a value is shown to be at least zero."""

    def constant(self, value: Any) -> bool:
        # Not large ones, not tracers, and no random keys, which have no number.
        return (
            np.size(value) <= 1
            and not isinstance(value, jax.core.Tracer)
            and not jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended)
            and jnp.issubdtype(np.asarray(value).dtype, np.number)  # bfloat16, too
            and bool(np.all(np.asarray(value) >= 0))
        )

    def join(self, values: Sequence[bool]) -> bool:
        return all(values)

    def equation(self, equation: JaxprEqn, into: list[bool]) -> bool | list[bool]:
        name, invars = equation.primitive.name, equation.invars
        if name == "optimization_barrier":
            return into
        if name == "select_n":
            return all(into[1:])
        if name == "sub":
            # One minus a decay rate, which may follow a schedule: a weight.
            first = invars[0]
            one = isinstance(first, Literal) and np.ndim(first.val) == 0 and first.val == 1
            return one and invars[1].aval.shape == ()
        if name == "max":
            return any(into)
        even = name == "integer_pow" and equation.params["y"] % 2 == 0
        squared = name == "mul" and invars[0] is invars[1]
        return even or squared or name in _FROM_ANY or (name in _FROM_NONNEGATIVE and all(into))
