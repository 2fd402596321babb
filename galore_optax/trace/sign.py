"""Which values of a traced optimizer are never negative, or zero.

A second moment is never negative, as a weighted sum of squares. Names do not tell: the v of
Adafactor is one, that of Adan is an average of gradients' differences. The argument is by induction
over the steps: what starts at zero or above, and follows from such values without a difference,
stays so.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn, Literal

from galore_optax.trace.interpreter import Reading, known_number, shape_of

ZERO, NONNEGATIVE, UNKNOWN = range(3)

# Primitives that return nothing negative: from any operands, and from such themselves.
_FROM_ANY = {"abs", "square", "exp", "exp2", "logistic", "sqrt", "rsqrt", "iota"}
_FROM_NONNEGATIVE = {
    "mul", "div", "pow", "integer_pow", "log1p", "cbrt", "dot_general", "cumsum", "rev",
    "dynamic_slice", "dynamic_update_slice", "pad", "sharding_constraint", "reshard",
    "stop_gradient", "reduce_max", "reduce_min",
}  # fmt: skip
# Likewise, and zero if all operands are.
_FROM_ZERO = {
    "add", "add_any", "min", "concatenate", "reduce_sum", "broadcast_in_dim", "reshape", "squeeze",
    "transpose", "slice", "copy", "convert_element_type", "reduce_precision",
}  # fmt: skip


class Sign(Reading):
    """Abstract values are ZERO, NONNEGATIVE or UNKNOWN.

    A product with zero counts as zero, although one with an infinite or undefined number is not.
    """

    def constant(self, value: Any) -> int:
        number = known_number(value)
        if number is None or number < 0:
            return UNKNOWN
        return NONNEGATIVE if number else ZERO

    def join(self, values: Sequence[int]) -> int:
        return max(values, default=ZERO)

    def equation(self, equation: JaxprEqn, into: list[int]) -> int:
        name, invars = equation.primitive.name, equation.invars
        largest = max(into, default=UNKNOWN)
        if name == "select_n":
            return max(into[1:])
        if name in _FROM_ZERO or (largest == ZERO and name in ("neg", "sub", "max", "sign")):
            return largest
        if (name == "mul" and ZERO in into) or (name == "div" and into[0] == ZERO):
            return ZERO
        if name == "sub":
            # One minus a decay rate, which may follow a schedule: a weight.
            weight = isinstance(invars[0], Literal) and known_number(invars[0].val) == 1
            return NONNEGATIVE if weight and shape_of(invars[1]) == () else UNKNOWN
        even = name == "integer_pow" and equation.params["y"] % 2 == 0
        squared = name == "mul" and invars[0] is invars[1]
        shown = name in _FROM_NONNEGATIVE and largest != UNKNOWN
        shown |= name == "max" and min(into) != UNKNOWN
        return NONNEGATIVE if even or squared or shown or name in _FROM_ANY else UNKNOWN
