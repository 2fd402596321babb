"""What an optimizer's traced update says: which of its outputs depend on which of its inputs.

A value is followed through every equation that it enters: calls, branches and loops are looked
into. Nothing is computed, so that a question about an optimizer costs no more than tracing it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def traced_update(
    inner: optax.GradientTransformationExtraArgs, params: optax.Params, state: optax.OptState
) -> ClosedJaxpr | None:
    """The new state of an update, traced with optax's usual extra arguments.

    They are `value`, `grad`, `value_fn`, `obj_fn` and `grad_fn`.

    Args:
        inner: The transformation.
        params: Its params: arrays or `jax.ShapeDtypeStruct`; their values are not used.
        state: Its state, in the same manner.

    Returns:
        From updates, params and state, in this order, to the new state; None where the
        transformation wants arguments of its own.
    """
    # Without shardings, which some updates cannot be traced with, and which change nothing here.
    params, state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state))

    def states(updates: optax.Updates, params: optax.Params, state: optax.OptState) -> Any:
        return inner.update(updates, state, params, **_usual_arguments(inner.update, updates))[1]

    try:
        return jax.make_jaxpr(states)(params, params, state)
    except Exception:  # it may miss its arguments in any manner
        return None


def depends(
    traced: ClosedJaxpr | Jaxpr,
    inputs: Sequence[bool],
    *,
    through_scalars: bool = True,
    through_choices: bool = True,
) -> list[bool]:
    """Which outputs of a traced function depend on the marked inputs.

    Args:
        traced: What `jax.make_jaxpr` gives.
        inputs: A mark for each of its flattened inputs.
        through_scalars: Whether a dependence through a value without axes counts.
        through_choices: Whether it counts that a marked value decides which of others is taken (by
            `jnp.where`, `jax.lax.cond`, or as the end of a `while_loop`).

    Returns:
        A mark for each output. What cannot be looked into makes every output depend on every input.
    """
    jaxpr = opened(traced)
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in marked

    def inside(
        body: ClosedJaxpr | Jaxpr, inputs: Sequence[bool], through_scalars: bool = through_scalars
    ) -> list[bool]:
        return depends(
            body, inputs, through_scalars=through_scalars, through_choices=through_choices
        )

    for equation in jaxpr.eqns:
        into = [is_marked(atom) for atom in equation.invars]
        if not any(into):
            continue
        marks = _equation_depends(equation, into, inside, through_choices)
        for var, mark in zip(equation.outvars, marks, strict=True):
            if mark and (through_scalars or getattr(var.aval, "shape", ()) != ()):
                marked.add(var)
    return [is_marked(atom) for atom in jaxpr.outvars]


def opened(traced: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """The equations of a traced function, without the constants that it may be closed over."""
    return traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced


def _equation_depends(
    equation: Any, into: list[bool], inside: Any, through_choices: bool
) -> list[bool]:
    everything = [True] * len(equation.outvars)
    params = equation.params
    match equation.primitive.name:
        case "select_n":
            return [any(into) if through_choices else any(into[1:])]
        # Such a product says when something is computed, not what.
        case "mul" if any(isinstance(x, Literal) and np.all(x.val == 0) for x in equation.invars):
            return [False]
        case "cond":
            if into[0] and through_choices:
                return everything
            branches = [inside(branch, into[1:]) for branch in params["branches"]]
            return [any(marks) for marks in zip(*branches, strict=True)]
        case "scan":
            n, m = params["num_consts"], params["num_consts"] + params["num_carry"]
            carry, rest = _carried(params["jaxpr"], inside, into[:n], into[n:m], into[m:])
            return carry + rest
        case "while":
            n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            carry, _ = _carried(params["body_jaxpr"], inside, into[n:m], into[m:], [])
            if through_choices and any(inside(params["cond_jaxpr"], into[:n] + carry)):
                return everything
            return carry
    bodies = [p for p in params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
    if len(bodies) == 1:
        body = opened(bodies[0])
        if len(body.invars) == len(into) and len(body.outvars) == len(everything):
            return inside(body, into)
    return everything


def _carried(
    body: ClosedJaxpr, inside: Any, constants: list[bool], carry: list[bool], rest: list[bool]
) -> tuple[list[bool], list[bool]]:
    """Marks of a loop's carry and of its other outputs, once another turn would mark no more."""
    while True:
        # Through scalars: in a loop they may be the elements of an array.
        outputs = inside(body, constants + carry + rest, True)
        new = [a or b for a, b in zip(carry, outputs, strict=False)]
        if new == carry:
            return carry, outputs[len(carry) :]
        carry = new


# Primitives that give zero where their first operand, or where all of them, are zero.
_ZERO_IF_FIRST = {
    "neg", "div", "convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "transpose",
    "reduce_sum", "copy", "slice", "sign", "reduce_precision",
}  # fmt: skip
_ZERO_IF_ALL = {"add", "add_any", "sub", "max", "min", "concatenate"}


def zeros(traced: ClosedJaxpr | Jaxpr, inputs: Sequence[bool] = ()) -> list[bool]:
    """Which outputs of a traced function are zero, whatever its inputs but those marked as zero.

    A product with zero counts as zero, although one with an infinite or undefined number is not.
    """
    jaxpr = opened(traced)
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=False) if mark}

    def is_marked(atom: Any) -> bool:
        if isinstance(atom, Literal):
            return np.ndim(atom.val) == 0 and atom.val == 0
        return atom in marked

    for equation in jaxpr.eqns:
        into = [is_marked(atom) for atom in equation.invars]
        name = equation.primitive.name
        bodies = [p for p in equation.params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
        if name in ("jit", "pjit", "closed_call") and len(bodies) == 1:
            marks = zeros(bodies[0], into)
        else:
            zero = (
                (name == "mul" and any(into))
                or (name in _ZERO_IF_FIRST and into[0])
                or (name in _ZERO_IF_ALL and all(into))
            )
            marks = [zero] * len(equation.outvars)
        marked |= {var for var, mark in zip(equation.outvars, marks, strict=True) if mark}
    return [is_marked(atom) for atom in jaxpr.outvars]


def _usual_arguments(update: Callable[..., Any], updates: optax.Updates) -> dict[str, Any]:
    # Of constant curvature, since a Hessian's diagonal (Sophia) is no remembered value of params.
    # Line searches refuse arguments that their value_fn does not name. Values are below zero, as a
    # loss may be.
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
