"""Which outputs of a traced function depend on which of its inputs."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from galore_optax.trace.interpreter import Reading, interpret

Names = frozenset[Hashable]
_NONE: Names = frozenset()


class _Dependence(Reading):
    """Abstract values are the names of the inputs that a value depends on."""

    def __init__(self, through_scalars: bool, through_choices: bool):
        self.through_scalars, self.through_choices = through_scalars, through_choices

    def constant(self, value: Any) -> Names:
        del value
        return _NONE

    def join(self, values: Sequence[Names]) -> Names:
        return _NONE.union(*values)

    def chosen(self, predicate: Names, value: Names) -> Names:
        return predicate | value if self.through_choices else value

    def equation(self, equation: JaxprEqn, into: list[Names]) -> Names:
        match equation.primitive.name:
            case "select_n":
                return self.chosen(into[0], self.join(into[1:]))
            # Such a product says when something is computed, not what.
            case "mul" if any(map(is_zero, equation.invars)):
                return _NONE
        return self.join(into)

    def bound(self, var: Any, value: Names) -> Names:
        scalar = getattr(var.aval, "shape", ()) == ()
        return _NONE if scalar and not self.through_scalars else value

    @property
    def inside_loops(self) -> Reading:
        # There a scalar may be an element of an array.
        return _Dependence(True, self.through_choices)


def dependences(
    traced: ClosedJaxpr | Jaxpr,
    inputs: Sequence[Hashable],
    *,
    through_scalars: bool = True,
    through_choices: bool = True,
) -> list[Names]:
    """For each output of a traced function the names of the inputs that it depends on.

    Args:
        traced: What `jax.make_jaxpr` returns.
        inputs: A name for each of its flattened inputs; None for one that does not matter.
        through_scalars: Whether a dependence through a value without axes counts.
        through_choices: Whether it counts that a value decides which of others is taken (by
            `jnp.where`, `jax.lax.cond`, or as the end of a `while_loop`).
    """
    reading = _Dependence(through_scalars, through_choices)
    names = [_NONE if name is None else frozenset([name]) for name in inputs]
    return interpret(traced, names, reading)


def is_zero(atom: Any) -> bool:
    """Whether a variable of a traced function is the constant zero."""
    # A random key has no number.
    return isinstance(atom, Literal) and np.ndim(atom.val) == 0 and bool(np.all(atom.val == 0))
