"""How each leaf of an optimizer's state follows the coordinates of the gradient.

If one coordinate of the gradient changes its sign, a first moment changes the sign of that
coordinate, too (it is odd), and a second moment stays (it is even). That, and along which of its
axes a leaf has the gradient's coordinates, is read from the traced update: no name is looked at.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from galore_optax.trace.interpreter import Reading, known_number, shape_of

# Parities. EITHER is zero, or a random number of symmetric distribution: odd and even. SIGNED has
# elements that are odd and others that are even, so that its magnitude is even.
EITHER, ODD, EVEN, SIGNED, NEITHER = "either", "odd", "even", "signed", "neither"

Axis = tuple[Any, ...] | str | None
"""A gradient's leaf and its axis, or several such that are merged; None where all elements are
alike; `MIXED`."""
MIXED = "mixed"

Number = float | tuple[int, Any] | None

_ADD = {"add", "add_any", "sub"}
_MULTIPLY = {"mul", "div"}
_KEEP = {"neg", "convert_element_type", "reduce_precision", "copy", "stop_gradient", "real"}
_EVEN_FUNCTIONS = {"abs", "square", "cos", "cosh", "is_finite"}
_ODD_FUNCTIONS = {
    "sign", "sin", "tan", "tanh", "asin", "atan", "sinh", "asinh", "atanh", "erf", "erf_inv",
    "cbrt", "round",
}  # fmt: skip
# Of even values they are even; of others nothing is known.
_OTHER_FUNCTIONS = {
    "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "logistic", "pow", "floor", "ceil",
    "max", "min", "clamp", "rem", "nextafter", "and", "or", "not", "xor", "eq", "ne", "lt", "le",
    "gt", "ge", "atan2", "erfc", "lgamma", "digamma", "integer_pow", "select_n",
    "shift_left", "shift_right_logical", "shift_right_arithmetic",
}  # fmt: skip
_ELEMENTWISE = _ADD | _MULTIPLY | _KEEP | _EVEN_FUNCTIONS | _ODD_FUNCTIONS | _OTHER_FUNCTIONS
_RANDOM = ("random_", "threefry")


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The abstract value.

    Attributes:
        axes: For each axis of the value the gradient's leaf and axis that it runs along.
        parity: EITHER, ODD, EVEN, SIGNED or NEITHER.
        leaves: The gradient's leaves that the value depends on, other than through scalars.
        random: Whether it depends on nothing but random numbers and constants.
        number: What a scalar is: a number, or (sign, the variable that it was computed as).
        cut: ("max" or "min", `number`) of an odd value that was bounded on one side: bounded on the
            other by the opposite it is odd again.
    """

    axes: tuple[Axis, ...]
    parity: str
    leaves: frozenset[int] = frozenset()
    random: bool = False
    number: Number = None
    cut: tuple[str, Number] | None = None


class CoordinatesReading(Reading):
    """Reads an update for `Coordinates`."""

    def __init__(self, moving: frozenset[tuple[int, int]]):
        self.moving = moving  # the gradient's leaves and axes whose coordinates change their signs

    def constant(self, value: Any) -> Coordinates:
        axes = tuple(MIXED if n > 1 else None for n in np.shape(value))
        number = None if axes else known_number(value)
        return Coordinates(axes, EITHER if number == 0 else EVEN, number=number)

    def join(self, values: Sequence[Coordinates]) -> Coordinates:
        first, *others = values
        for other in others:
            if other != first:
                first = Coordinates(
                    _joined_axes([first.axes, other.axes]),
                    _either_of([first.parity, other.parity]),
                    first.leaves | other.leaves,
                    first.random and other.random,
                )
        return first

    def chosen(self, predicate: Coordinates, value: Coordinates) -> Coordinates:
        known = predicate.parity in (EVEN, EITHER)
        return value if known else dataclasses.replace(value, parity=NEITHER)

    def sliced(self, value: Coordinates) -> Coordinates:
        return dataclasses.replace(value, axes=value.axes[1:])

    def stacked(self, value: Coordinates) -> Coordinates:
        return dataclasses.replace(value, axes=(MIXED, *value.axes))

    def bound(self, var: Any, value: Coordinates) -> Coordinates:
        ndim = len(shape_of(var))
        if len(value.axes) != ndim:
            return dataclasses.replace(value, axes=(MIXED,) * ndim)
        if not ndim and value.number is None:
            return dataclasses.replace(value, number=(1, var))
        return value

    def equation(self, equation: JaxprEqn, into: list[Coordinates]) -> Any:
        name = equation.primitive.name
        if name in ("sharding_constraint", "reshard"):
            return into
        ndim = len(shape_of(equation.outvars[0]))
        noise = name.startswith(_RANDOM) or (
            any(v.random for v in into) and all(v.random or not v.leaves for v in into)
        )
        if noise:
            return Coordinates((None,) * ndim, EITHER, random=True)
        arrays = [v for v in into if v.axes] or into
        leaves = frozenset().union(*(v.leaves for v in arrays))
        if name in _ELEMENTWISE:
            parity, cut = _elementwise(name, equation, into)
            axes = _joined_axes([v.axes for v in arrays])
            number = into[0].number if name in _KEEP else None
            number = _opposite(number) if name == "neg" else number
            return Coordinates(axes, parity, leaves, number=number, cut=cut)
        axes = _axes_of(name, equation, into)
        if axes is None:
            # Whatever is computed from even values is even.
            parities = {v.parity for v in into} - {EITHER}
            parity = NEITHER if parities - {EVEN} else EVEN if parities else EITHER
            return Coordinates((MIXED,) * ndim, parity, leaves)
        parity = into[0].parity
        if name.startswith("reduce_") or name in ("argmax", "argmin"):
            removed = [into[0].axes[i] for i in equation.params["axes"]]
            signs = any(self._moves(axis) for axis in removed)
            if parity == ODD and (signs or name != "reduce_sum"):
                parity = NEITHER
        if name == "dot_general":
            parity = _product([v.parity for v in into])
            if parity == EVEN and ODD in (v.parity for v in into):
                pairs = zip(*equation.params["dimension_numbers"][0], strict=True)
                same = all(into[0].axes[i] == into[1].axes[j] != MIXED for i, j in pairs)
                free = any(map(self._moves, axes))
                parity = EVEN if same and not free else NEITHER
            elif parity in (ODD, SIGNED):
                parity = NEITHER
        number = None
        if name == "broadcast_in_dim" and not into[0].axes:
            leaves, number = frozenset(), into[0].number  # the dependence goes through a scalar
        return Coordinates(axes, parity, leaves, number=number)

    def _moves(self, axis: Axis) -> bool:
        """Whether coordinates along an axis may change their signs."""
        merged = isinstance(axis, tuple) and any(part in self.moving for part in axis)
        return axis == MIXED or axis in self.moving or merged


def _elementwise(
    name: str, equation: JaxprEqn, into: list[Coordinates]
) -> tuple[str, tuple[str, Number] | None]:
    """The parity of an elementwise equation's result, and its one-sided bound."""
    parities = [v.parity for v in into]
    same = len(into) == 2 and equation.invars[0] is equation.invars[1]
    even = name in _EVEN_FUNCTIONS or (name == "mul" and same)
    if name == "integer_pow":
        even = equation.params["y"] % 2 == 0
    if even:
        return EVEN if parities[0] in (ODD, SIGNED) else parities[0], None
    if name in _ODD_FUNCTIONS or name == "integer_pow":
        return parities[0], None
    if name in _ADD or name in _KEEP:
        return _sum(parities), None
    if name in _MULTIPLY:
        return _product(parities), None
    if name == "select_n":
        return _either_of(parities[1:]) if parities[0] in (EVEN, EITHER) else NEITHER, None
    if {*parities} <= {EVEN, EITHER} or (name in ("eq", "ne") and {*parities} == {ODD, EITHER}):
        return EITHER if {*parities} == {EITHER} else EVEN, None
    if name in ("eq", "ne") and same:
        return EVEN, None
    return _bounded(name, into) if name in ("max", "min", "clamp") else (NEITHER, None)


def _sum(parities: Sequence[str]) -> str:
    known = {*parities} - {EITHER}
    return EITHER if not known else known.pop() if len(known) == 1 else NEITHER


def _either_of(parities: Sequence[str]) -> str:
    known = {*parities} - {EITHER}
    return SIGNED if len(known) > 1 and NEITHER not in known else _sum(parities)


def _product(parities: Sequence[str]) -> str:
    for special in (EITHER, NEITHER, SIGNED):
        if special in parities:
            return special
    return ODD if parities.count(ODD) % 2 else EVEN


def _bounded(name: str, into: list[Coordinates]) -> tuple[str, tuple[str, Number] | None]:
    """Of an odd value clipped at a number and its opposite, in one equation or in two."""
    if name == "clamp":
        low, value, high = into
        symmetric = low.number is not None and high.number == _opposite(low.number)
        return (ODD if symmetric and value.parity == ODD else NEITHER), None
    for value, bound in (into, into[::-1]):
        if bound.number is None:
            continue
        if value.parity == ODD:
            return NEITHER, (name, bound.number)
        if value.cut == ("min" if name == "max" else "max", _opposite(bound.number)):
            return ODD, None
    return NEITHER, None


def _opposite(number: Number) -> Number:
    if isinstance(number, tuple):
        return (-number[0], number[1])
    return None if number is None else -number


def _joined_axes(several: Sequence[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    if len({len(axes) for axes in several}) > 1:
        return (MIXED,) * max(map(len, several))

    def joined(axes: tuple[Axis, ...]) -> Axis:
        known = {*axes} - {None}
        return None if not known else known.pop() if len(known) == 1 else MIXED

    return tuple(map(joined, zip(*several, strict=True)))


def _axes_of(name: str, equation: JaxprEqn, into: list[Coordinates]) -> tuple[Axis, ...] | None:
    """The axes of what only moves, removes or multiplies axes; None of other equations."""
    params, axes = equation.params, into[0].axes if into else ()
    shape = shape_of(equation.invars[0]) if into else ()
    out = shape_of(equation.outvars[0])
    if name == "broadcast_in_dim":
        made: list[Axis] = [None] * len(out)
        for axis, at, size in zip(axes, params["broadcast_dimensions"], shape, strict=True):
            made[at] = axis if size == out[at] else None
        return tuple(made)
    if name == "transpose":
        return tuple(axes[i] for i in params["permutation"])
    if name in ("reshape", "squeeze", "expand_dims"):
        kept = [axis for axis, n in zip(axes, shape, strict=True) if n != 1]
        if [n for n in shape if n != 1] != [n for n in out if n != 1]:
            if len(out) == 1 and MIXED not in kept:
                return (tuple(kept),)
            return tuple(MIXED if n > 1 else None for n in out)
        remaining = iter(kept)
        return tuple(None if n == 1 else next(remaining) for n in out)
    if name.startswith("reduce_") or name in ("argmax", "argmin"):
        return tuple(axis for i, axis in enumerate(axes) if i not in params["axes"])
    if name == "slice":
        pairs = zip(axes, shape, out, strict=True)
        return tuple(axis if n == m else MIXED if axis else None for axis, n, m in pairs)
    if name == "dot_general":
        (left, right), (left_batch, right_batch) = params["dimension_numbers"]
        gone = [(*left, *left_batch), (*right, *right_batch)]
        sides = zip(into, gone, strict=True)
        free = [axis for v, out in sides for i, axis in enumerate(v.axes) if i not in out]
        return (*(axes[i] for i in left_batch), *free)
    return None
