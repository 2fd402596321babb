"""Does an inner optimizer use the params for decoupled weight decay, and at which rate?

An optimizer inside GaLore sees projected weights, yet decay must reach the whole matrix. Decay is
recognised from the traced update itself: an update that is affine in the params, with a slope that is
one number for a whole leaf, and a state that never sees the params' values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

Update = Callable[
    [optax.Updates, optax.OptState, optax.Params], tuple[optax.Updates, optax.OptState]
]

_LOOPS = (
    "scan",
    "while",
)  # their outputs feed their inputs: one pass through the body is not enough


def decay_slopes(
    update: Update,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    check: bool = True,
) -> list[Array | None] | None:
    """The slope of each leaf's update with respect to its params, if `update` applies decoupled decay.

    Args:
        update: `(updates, state, params) -> (updates, state)`.
        updates: Updates to trace with; their values are not used.
        state: The state to trace with. Slopes may depend on its scalars (a step count), and do so
            correctly under `jit`.
        params: Params to trace with; their values are not used.
        check: Whether to return None for what is not decoupled decay; else the slopes at params zero
            are returned whatever they depend on.

    Returns:
        For each leaf of params, in the order of `jax.tree.leaves`, a scalar (minus learning rate
        times decay), or None where the leaf's update does not depend on params. None in place of the
        list where the use of params is not decoupled decay.
    """
    params_leaves, params_tree = jax.tree.flatten(params)
    rest_leaves, rest_tree = jax.tree.flatten((updates, state))

    def apply(rest: Sequence[Array], leaves: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        updates, state = jax.tree.unflatten(rest_tree, rest)
        new_updates, new_state = update(updates, state, jax.tree.unflatten(params_tree, leaves))
        return jax.tree.leaves(new_updates), jax.tree.leaves(new_state)

    def slope(rest: Sequence[Array], leaves: Sequence[Array]) -> list[Array]:
        ones = [jnp.ones_like(leaf) for leaf in leaves]
        return jax.jvp(lambda leaves: apply(rest, leaves)[0], (list(leaves),), (ones,))[1]

    traced = jax.make_jaxpr(apply)(rest_leaves, params_leaves)
    from_params = _depends(traced, [False] * len(rest_leaves) + [True] * len(params_leaves))
    in_updates, in_state = from_params[: len(params_leaves)], from_params[len(params_leaves) :]
    if check and any(in_state):
        return None
    if not any(in_updates):
        return [None] * len(params_leaves)
    if check:
        traced = jax.make_jaxpr(slope)(rest_leaves, params_leaves)
        if any(_depends(traced, [False] * len(rest_leaves) + [True] * len(params_leaves))):
            return None
        # One number for a whole leaf: what has axes may enter the slope through a scalar only.
        arrays = [jnp.ndim(leaf) > 0 for leaf in rest_leaves] + [False] * len(params_leaves)
        if any(_depends(traced, arrays, through_scalars=False)):
            return None
    slopes = slope(rest_leaves, [jnp.zeros_like(leaf) for leaf in params_leaves])
    return [s[(0,) * s.ndim] if used else None for s, used in zip(slopes, in_updates, strict=True)]


def _depends(
    traced: ClosedJaxpr | Jaxpr, inputs: Sequence[bool], *, through_scalars: bool = True
) -> list[bool]:
    """Which outputs of a traced function depend on the marked inputs.

    With `through_scalars=False` a dependence that passes through a value without axes does not count.
    Loops, and whatever cannot be looked into, make each output depend on each input.
    """
    jaxpr = traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in marked

    for equation in jaxpr.eqns:
        into = [is_marked(atom) for atom in equation.invars]
        if not any(into):
            continue
        marks = _equation_depends(equation, into, through_scalars)
        marked.update(
            var
            for var, mark in zip(equation.outvars, marks, strict=True)
            if mark and (through_scalars or var.aval.ndim > 0)
        )
    return [is_marked(atom) for atom in jaxpr.outvars]


def _equation_depends(equation: Any, into: list[bool], through_scalars: bool) -> list[bool]:
    everything = [True] * len(equation.outvars)
    if equation.primitive.name in _LOOPS:
        return everything
    if equation.primitive.name == "cond":
        if into[0]:  # the predicate
            return everything
        branches = [
            _depends(branch, into[1:], through_scalars=through_scalars)
            for branch in equation.params["branches"]
        ]
        return [any(marks) for marks in zip(*branches, strict=True)]
    bodies = [p for p in equation.params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
    if len(bodies) == 1:
        body = bodies[0].jaxpr if isinstance(bodies[0], ClosedJaxpr) else bodies[0]
        if len(body.invars) == len(into) and len(body.outvars) == len(everything):
            return _depends(body, into, through_scalars=through_scalars)
    return everything
