"""In which arrays of an optimizer's state a small error may ruin the update, read from its trace.

Errors of rounding are harmless in what an update is proportional to. They are not where it divides
by an array, which must not become zero, nor where it takes the root of a difference of two, which
must not fall below zero.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from galore_optax.trace.interpreter import opened, traced_update

_ROOTS = {"sqrt", "rsqrt", "log", "pow"}
_INVERSES = {"rsqrt", "log"}
# What is at a place there says little, or nothing, of what is at one place of the operands.
_OTHER = {
    "sign", "eq", "ne", "lt", "le", "gt", "ge", "is_finite", "floor", "ceil", "round", "and", "or",
    "not", "xor", "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or",
    "reduce_prod", "argmax", "argmin", "dot_general", "cumsum", "stop_gradient",
}  # fmt: skip


class _Of(NamedTuple):
    """Positions in the state of the arrays that a value is made of, place by place.

    Attributes:
        arrays: All of them.
        differences: Those of which it has a difference.
    """

    arrays: frozenset[int] = frozenset()
    differences: frozenset[int] = frozenset()


def sensitive_state(
    inner: optax.GradientTransformation, params: optax.Params, state: optax.OptState
) -> tuple[set[int], set[int]]:
    """Which leaves of a state the update divides by, and of the differences of which it has roots.

    Args:
        inner: The transformation. Of one that cannot be traced, since it wants extra arguments
            other than optax's usual ones, the update may divide by anything.
        params: Its params.
        state: Its state.

    Returns:
        Two sets of positions among the leaves of the state.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax.trace.sensitive import sensitive_state
        >>> params = {"w": jnp.ones((64, 256))}
        >>> adam, centered = optax.scale_by_adam(), optax.scale_by_stddev()
        >>> sensitive_state(adam, params, adam.init(params))  # of count, mu, nu
        ({2}, set())
        >>> sensitive_state(centered, params, centered.init(params))  # of mu, nu
        ({0, 1}, {0, 1})
    """
    inner = optax.with_extra_args_support(inner)
    leaves = len(jax.tree.leaves(state))
    traced = traced_update(inner, params, state)
    if traced is None:
        return set(range(leaves)), set()
    given = [_Of()] * (len(traced.jaxpr.invars) - leaves)
    given += [_Of(frozenset([i])) for i in range(leaves)]
    found: tuple[set[int], set[int]] = set(), set()
    _follow(traced, given, *found)
    return found


def _follow(
    traced: ClosedJaxpr | Jaxpr, inputs: Sequence[_Of], divisors: set[int], rooted: set[int]
) -> list[_Of]:
    """What the outputs are made of; adds to the sets what is divided by, and rooted differences."""
    jaxpr = opened(traced)
    made = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> _Of:
        return _Of() if isinstance(atom, Literal) else made.get(atom, _Of())

    for equation in jaxpr.eqns:
        into, name = [of(atom) for atom in equation.invars], equation.primitive.name
        if name == "div":
            divisors.update(into[1].arrays)
        negative = name == "integer_pow" and equation.params["y"] < 0
        if name in _INVERSES or name == "pow" or negative:
            divisors.update(into[0].arrays)
        if name in _ROOTS:
            rooted.update(into[0].differences)
        inside = partial(_follow, divisors=divisors, rooted=rooted)
        results = zip(equation.outvars, _of_equation(equation, into, inside), strict=True)
        made.update((v, result) for v, result in results if getattr(v.aval, "shape", ()) != ())
    return [of(atom) for atom in jaxpr.outvars]


def _of_equation(equation: Any, into: list[_Of], inside: Any) -> list[_Of]:
    name, params, outputs = equation.primitive.name, equation.params, len(equation.outvars)
    everything = _union(into[1:] if name == "select_n" else into)
    if name in _OTHER:
        return [_Of()] * outputs
    if name == "sub" and not into[0].arrays:  # x less an array is not zero where that is
        return [_Of()]
    if name == "sub" and into[0].arrays and into[1].arrays and into[0] != into[1]:
        return [_Of(everything.arrays, everything.arrays)]
    even = name == "integer_pow" and params["y"] % 2 == 0
    if name in ("abs", "square", "exp") or even or (name == "max" and _from_zero(equation)):
        return [_Of(everything.arrays)]
    if name == "cond":
        branches = [inside(branch, into[1:]) for branch in params["branches"]]
        return [_union(results) for results in zip(*branches, strict=True)]
    bodies = [p for p in params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
    for body in bodies:
        taken, given = len(opened(body).invars), len(opened(body).outvars)
        fits = (taken, given) == (len(into), outputs)
        if fits and len(bodies) == 1 and name != "scan":
            return inside(body, into)
        # A loop may bring anything anywhere.
        inside(body, [everything] * taken)
    return [everything] * outputs


def _union(parts: Sequence[_Of]) -> _Of:
    arrays, differences = ([part[i] for part in parts] for i in range(2))
    return _Of(frozenset().union(*arrays), frozenset().union(*differences))


def _from_zero(equation: Any) -> bool:
    """Whether one of the operands is a number of at least zero."""
    literals = [x.val for x in equation.invars if isinstance(x, Literal)]
    return any(np.ndim(x) == 0 and x >= 0 for x in literals)
