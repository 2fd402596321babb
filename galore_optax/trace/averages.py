"""Which first moments are averages of gradients, read from an optimizer's traced update.

The square of such an average compares with the average of squares beside it. That of a sum of
gradients does not (Simplified AdEMAMix: m ← g + β₁ m), nor that of an average of gradients that
were divided by another moment (ADOPT).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn, Literal

from galore_optax.trace.interpreter import Reading, known_number, shape_of

WITHOUT, PART, WHOLE, SCALED = range(4)
_SAME = {"convert_element_type", "copy", "stop_gradient"}


class Share(NamedTuple):
    """How a value contains the gradient, element by element.

    Attributes:
        gradient: WITHOUT it; a PART of it, below 1 or of an unknown size; the WHOLE; or SCALED by
            an array of the state.
        state: Whether it contains arrays of the state.
        name: The variable that it was computed as.
    """

    gradient: int = WITHOUT
    state: bool = False
    name: Any = None

    @property
    def is_average(self) -> bool:
        """Whether a moment into which the gradient enters like this may be an average."""
        return self.gradient in (WITHOUT, PART)


class Shares(Reading):
    """Abstract values are `Share`s; scalars have none.

    A gradient that `optax.scale` or a clip has multiplied is WHOLE to what comes after. It is known
    by its square, which enters the second moment: an update is to be read twice.
    """

    def __init__(self) -> None:
        self._squared: set[Any] = set()  # names

    def constant(self, value: Any) -> Share:
        return Share()

    def join(self, values: Sequence[Share]) -> Share:
        return Share(max(v.gradient for v in values), any(v.state for v in values))

    def bound(self, var: Any, value: Share) -> Share:
        if shape_of(var) == ():
            return Share()
        named = value._replace(name=value.name or var)
        whole = named.name in self._squared and named.gradient == PART
        return named._replace(gradient=WHOLE) if whole else named

    def equation(self, equation: JaxprEqn, into: list[Share]) -> Share:
        name = equation.primitive.name
        if name in _SAME:
            return into[0]
        if _is_square(equation, into) and not into[0].state:
            self._squared.add(into[0].name)
        all_of_them = self.join([*(into[1:] if name == "select_n" else into), Share()])
        if name not in ("mul", "div") or all_of_them.gradient in (WITHOUT, SCALED):
            return all_of_them
        without = [v for v in (into if name == "mul" else into[1:]) if not v.gradient]
        # By √v, or times 1 / √v.
        if any(v.state for v in (into[1:] if name == "div" else without)):
            return all_of_them._replace(gradient=SCALED)
        numbers = [known_number(x.val) for x in equation.invars if isinstance(x, Literal)]
        sizes = [abs(n) for n in numbers if n]
        less = not sizes or (sizes[0] < 1 if name == "mul" else sizes[0] > 1)
        return all_of_them._replace(gradient=PART) if less and len(without) == 1 else all_of_them


def _is_square(equation: JaxprEqn, into: Sequence[Share]) -> bool:
    name = equation.primitive.name
    if name == "mul":
        return into[0].name is not None and into[0].name is into[1].name
    return name == "square" or (name == "integer_pow" and equation.params["y"] == 2)
