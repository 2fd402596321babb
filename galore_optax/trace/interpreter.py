"""Interprets a traced function over abstract values: the one place that reads jaxprs.

A `Reading` says what an equation makes of abstract values, such as "is never negative" or "depends
on this input". Calls, branches and loops are followed here, for every reading alike.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
        del predicate
        return value

    def sliced(self, value: Value) -> Value:
        """One element along the first axis, as the body of `scan` is given it."""
        return value

    def stacked(self, value: Value) -> Value:
        """Elements stacked along a new first axis, as `scan` returns them."""
        return value

    def bound(self, var: Any, value: Value) -> Value:
        """The value of a variable, whose shape and dtype are in `var.aval`."""
        del var
        return value

    @property
    def inside_loops(self) -> "Reading":
        """The reading of a loop's body."""
        return self


def interpret(
    traced: ClosedJaxpr | Jaxpr, inputs: Sequence[Value], reading: Reading
) -> list[Value]:
    """The abstract values of a traced function's outputs, from those of its inputs."""
    jaxpr, constants = opened(traced)
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, map(reading.constant, constants), strict=True))

    def of(atom: Any) -> Value:
        return reading.constant(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        made = _outputs(equation, [of(atom) for atom in equation.invars], reading)
        for var, value in zip(equation.outvars, made, strict=True):
            values[var] = reading.bound(var, value)
    return [of(atom) for atom in jaxpr.outvars]


def opened(traced: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """The equations of a traced function, and the constants that it closes over."""
    return (traced.jaxpr, traced.consts) if isinstance(traced, ClosedJaxpr) else (traced, ())


def called(equation: JaxprEqn) -> ClosedJaxpr | Jaxpr | None:
    """The function that an equation calls on its own inputs, if it calls just one."""
    bodies = [p for p in equation.params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
    if len(bodies) != 1 or equation.primitive.name in ("scan", "while"):
        return None
    jaxpr, _ = opened(bodies[0])
    fits = len(jaxpr.invars), len(jaxpr.outvars)
    return bodies[0] if fits == (len(equation.invars), len(equation.outvars)) else None


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
    if (body := called(equation)) is not None:
        return interpret(body, into, reading)
    made = reading.equation(equation, into)
    return made if isinstance(made, list) else [made] * len(equation.outvars)


def _loop(
    body: ClosedJaxpr,
    constants: list[Value],
    carry: list[Value],
    each: list[Value],
    reading: Reading,
) -> tuple[list[Value], list[Value]]:
    """The carry and the other outputs of a loop, once another turn would change nothing."""
    while True:
        outputs = interpret(body, constants + carry + each, reading.inside_loops)
        new = [reading.join(pair) for pair in zip(carry, outputs, strict=False)]
        if new == carry:
            return carry, outputs[len(carry) :]
        carry = new


class TracedUpdate(NamedTuple):
    """A transformation's update as equations.

    Attributes:
        equations: From the leaves of updates, state and params, in this order, to the leaves of the
            new updates and the new state.
        params: How many leaves the params have.
        states: How many leaves the state has.
    """

    equations: ClosedJaxpr
    params: int
    states: int

    def read(
        self, reading: Reading, updates: Sequence[Value], state: Sequence[Value], params: Any
    ) -> tuple[list[Value], list[Value]]:
        """The abstract values of the new updates and the new state."""
        made = interpret(self.equations, [*updates, *state, *params], reading)
        return made[: self.params], made[self.params :]

    def settled(
        self, reading: Reading, updates: Sequence[Value], state: Sequence[Value], params: Any
    ) -> list[Value]:
        """The abstract values of the state that hold before and after any number of updates."""
        state = list(state)
        while True:
            _, after = self.read(reading, updates, state, params)
            new = [reading.join(pair) for pair in zip(state, after, strict=True)]
            if new == state:
                return state
            state = new


def traced_update(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    state: optax.OptState,
    **extra_args: Any,
) -> TracedUpdate | None:
    """Traces an update; None if the transformation needs extra arguments that are not known here.

    Args:
        inner: The transformation.
        params: Its params, arrays or `jax.ShapeDtypeStruct`; their values are not used.
        state: Its state, in the same manner.
        **extra_args: Those of the update. optax's usual ones (`value`, `grad`, `value_fn`,
            `obj_fn`, `grad_fn`) are made up where they are not given.
    """
    # Without shardings, which some updates cannot be traced with, and which change nothing here.
    params, state = without_shardings((params, state))
    leaves, tree = jax.tree.flatten(params)
    state_leaves, state_tree = jax.tree.flatten(state)

    def flat(updates: Any, state: Any, params: Any) -> tuple[list[Any], list[Any]]:
        updates = tree.unflatten(updates)
        arguments = {**_usual_arguments(inner.update, updates), **extra_args}
        updates, state = inner.update(
            updates, state_tree.unflatten(state), tree.unflatten(params), **arguments
        )
        return tree.flatten_up_to(updates), state_tree.flatten_up_to(state)

    try:
        equations = jax.make_jaxpr(flat)(leaves, state_leaves, leaves)
    except Exception:  # a missing argument may fail in any manner
        return None
    return TracedUpdate(equations, len(leaves), len(state_leaves))


def without_shardings(tree: Any) -> Any:
    """The shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def _usual_arguments(update: Callable[..., Any], updates: optax.Updates) -> dict[str, Any]:
    # The curvature is constant, since a Hessian's diagonal (Sophia) is no remembered value of the
    # params; values are negative, as a loss may be. Line searches refuse arguments that their
    # value_fn does not name.
    def value_fn(params: optax.Params, obj_fn: Any = None, grad_fn: Any = None) -> Any:
        del obj_fn, grad_fn
        return -sum(jnp.sum(x * x).real for x in jax.tree.leaves(params))

    arguments = {
        "value": np.float32(-1),
        "grad": updates,
        "value_fn": value_fn,
        "obj_fn": value_fn,
        "grad_fn": lambda *_: updates,
    }
    taken = inspect.signature(update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return arguments
    names = {p.name for p in taken}
    return {name: value for name, value in arguments.items() if name in names}
