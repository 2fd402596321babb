"""Interprets a traced function over abstract values: the one place that reads jaxprs.

A `Reading` says what an equation makes of abstract values, such as "is never negative" or "depends
on this input". Calls, branches and loops are followed here, for every reading alike.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Value = Any


class Reading:
    """How a reading combines its abstract values, which are compared by `==`.

    Joins must be monotone over finitely many values, so that loops come to an end.
    """

    def constant(self, value: Any) -> Value:
        """The abstract value of a number or array that is known, or of a tracer."""
        raise NotImplementedError

    def join(self, values: Sequence[Value]) -> Value:
        """What holds of a value that is one of these, as after a branch or a turn of a loop."""
        raise NotImplementedError

    def equation(self, equation: JaxprEqn, into: list[Value]) -> Value | list[Value]:
        """The outputs of an equation that calls no traced function; one value stands for all."""
        raise NotImplementedError

    def chosen(self, predicate: Value, value: Value) -> Value:
        """A value that a predicate has selected."""
        return value

    def sliced(self, value: Value) -> Value:
        """One element along the first axis, as the body of `scan` is given it."""
        return value

    def stacked(self, value: Value) -> Value:
        """Elements stacked along a new first axis, as `scan` returns them."""
        return value

    def bound(self, var: Any, value: Value) -> Value:
        """The value of a variable, whose shape and dtype are in `var.aval`."""
        return value

    @property
    def inside_loops(self) -> "Reading":
        """The reading of a loop's body."""
        return self


def interpret(
    traced: ClosedJaxpr | Jaxpr, inputs: Sequence[Value], reading: Reading
) -> list[Value]:
    """The abstract values of a traced function's outputs, from those of its inputs."""
    closed = isinstance(traced, ClosedJaxpr)
    jaxpr, constants = (traced.jaxpr, traced.consts) if closed else (traced, ())
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, map(reading.constant, constants), strict=True))

    def of(atom: Any) -> Value:
        return reading.constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        made = _outputs(equation, [of(atom) for atom in equation.invars], reading)
        for var, value in zip(equation.outvars, made, strict=True):
            values[var] = reading.bound(var, value)
    return [of(atom) for atom in jaxpr.outvars]


def shape_of(var: Any) -> tuple[int, ...]:
    """The shape of a variable; `()` of what has none, such as a token."""
    return getattr(var.aval, "shape", ())


def known_number(value: Any) -> float | None:
    """The number that a constant is; None of a large array, a tracer, and a random key."""
    key = jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended)
    if key or isinstance(value, jax.core.Tracer) or np.size(value) != 1:
        return None
    return float(np.real(np.asarray(value)).item())


def _outputs(equation: JaxprEqn, into: list[Value], reading: Reading) -> list[Value]:
    params = equation.params
    match equation.primitive.name:
        case "cond":
            branches = [interpret(branch, into[1:], reading) for branch in params["branches"]]
            joined = [reading.join(values) for values in zip(*branches, strict=True)]
            return [reading.chosen(into[0], value) for value in joined]
        case "scan":
            n, m = params["num_consts"], params["num_consts"] + params["num_carry"]
            each = [reading.sliced(value) for value in into[m:]]
            carry, rest = _loop(params["jaxpr"], into[:n], into[n:m], each, reading)
            return carry + [reading.stacked(value) for value in rest]
        case "while":
            n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            carry, _ = _loop(params["body_jaxpr"], into[n:m], into[m:], [], reading)
            (predicate,) = interpret(params["cond_jaxpr"], into[:n] + carry, reading)
            return [reading.chosen(predicate, value) for value in carry]
        case "optimization_barrier" | "pvary":
            return into
    bodies = [p for p in params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
    if len(bodies) == 1:  # a function that is called on the equation's own inputs, if they fit
        jaxpr = getattr(bodies[0], "jaxpr", bodies[0])
        sizes = len(jaxpr.invars), len(jaxpr.outvars)
        if sizes == (len(into), len(equation.outvars)):
            return interpret(bodies[0], into, reading)
    made = reading.equation(equation, into)
    return made if isinstance(made, list) else [made] * len(equation.outvars)


def _loop(
    body: ClosedJaxpr, constants: list[Value], carry: list[Value], each: list[Value], reading: Any
) -> tuple[list[Value], list[Value]]:
    """The carry and the other outputs of a loop, once another turn would change nothing."""
    while True:
        outputs = interpret(body, constants + carry + each, reading.inside_loops)
        new = [reading.join(pair) for pair in zip(carry, outputs, strict=False)]
        if new == carry:
            return carry, outputs[len(carry) :]
        carry = new
