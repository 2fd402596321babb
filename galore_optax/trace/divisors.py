"""By which leaves of an optimizer's state the update divides, read from its traced update.

An error of rounding is harmless in what an update is proportional to. It is not where the update
divides by an array, which must not become zero, nor where it takes the root of a difference of two,
which must not become negative.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn, Literal

from galore_optax.trace.interpreter import Reading, known_number, shape_of

_ROOTS = {"sqrt", "rsqrt", "log", "pow"}
_INVERSES = {"rsqrt", "log", "pow"}
# Their result at one index says little, or nothing, about the operands at that index.
_OTHER = {
    "sign", "eq", "ne", "lt", "le", "gt", "ge", "is_finite", "floor", "ceil", "round", "and", "or",
    "not", "xor", "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or",
    "reduce_prod", "argmax", "argmin", "dot_general", "cumsum", "stop_gradient",
}  # fmt: skip


class Made(NamedTuple):
    """What a value is made of, element by element."""

    leaves: frozenset[int] = frozenset()  # of the state, by position
    differences: frozenset[int] = frozenset()  # those that it contains a difference of
    fresh: bool = False  # whether it contains the updates that come in
    powers: frozenset[int] = frozenset()  # those that it contains a power of


class Divisors(Reading):
    """Collects, while it reads an update, the positions of the leaves of the state that need care.

    Attributes:
        divisors: Something is divided by them.
        stale: Likewise, without the present updates in them, so that a leaf near zero makes the
            quotient arbitrarily large (ACProp, ADOPT).
        rooted: A root is taken of their difference from another one.
        roots: A root is taken of them, as of squares; not of a fourth moment, nor of the square
            of a stored root.
    """

    def __init__(self) -> None:
        self.divisors: set[int] = set()
        self.stale: set[int] = set()
        self.rooted: set[int] = set()
        self._roots: set[int] = set()
        self._other_powers: set[int] = set()

    @property
    def roots(self) -> set[int]:
        return self._roots - self._other_powers

    def constant(self, value: Any) -> Made:
        return Made()

    def join(self, values: Sequence[Made]) -> Made:
        leaves = frozenset().union(*(v.leaves for v in values))
        differences = frozenset().union(*(v.differences for v in values))
        powers = frozenset().union(*(v.powers for v in values))
        return Made(leaves, differences, any(v.fresh for v in values), powers)

    def bound(self, var: Any, value: Made) -> Made:
        return Made() if shape_of(var) == () else value

    def _divide(self, value: Made) -> None:
        self.divisors |= value.leaves
        if not value.fresh:
            self.stale |= value.leaves

    def equation(self, equation: JaxprEqn, into: list[Made]) -> Made:
        name = equation.primitive.name
        power = equation.params.get("y", 0) if name == "integer_pow" else 0
        if name == "div":
            self._divide(into[1])
        if name in _INVERSES or power < 0:
            self._divide(into[0])
        if name in _ROOTS:
            self.rooted |= into[0].differences
        if name in _ROOTS or name == "cbrt":
            self._roots |= into[0].leaves
            self._other_powers |= into[0].powers
        if name == "pow" and (_exponent(equation) or 0.5) * 2 % 2 != 1:
            self._other_powers |= into[0].leaves
        everything = self.join(into[1:] if name == "select_n" else into)
        same = name == "mul" and equation.invars[0] is equation.invars[1]
        if name in _ROOTS or name in ("square", "integer_pow") or same:
            everything = everything._replace(powers=everything.leaves)
        if name in _OTHER:
            return Made(fresh=everything.fresh)
        if name == "sub" and not into[0].leaves:
            return Made(fresh=everything.fresh)  # x minus an array is not zero where the array is
        if name == "sub" and into[1].leaves and into[0][:2] != into[1][:2]:
            return everything._replace(differences=everything.leaves)
        even = name == "integer_pow" and power % 2 == 0
        if name in ("abs", "square", "exp") or even or (name == "max" and _from_zero(equation)):
            return everything._replace(differences=frozenset())
        return everything


def _exponent(equation: JaxprEqn) -> float | None:
    """The exponent of a power, if it is a number."""
    exponent = equation.invars[1]
    return known_number(exponent.val) if isinstance(exponent, Literal) else None


def _from_zero(equation: JaxprEqn) -> bool:
    """Whether one of the operands is a number of at least zero."""
    numbers = [known_number(x.val) for x in equation.invars if isinstance(x, Literal)]
    return any(x is not None and x >= 0 for x in numbers)
