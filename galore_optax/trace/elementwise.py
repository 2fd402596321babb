"""Which parts of an update are elementwise: a result at an index depends on no other index."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from galore_optax.trace.traced import Traced

# Primitives whose result at an index depends only on scalars and on the arrays' elements there.
_ELEMENTWISE = {
    "abs", "add", "add_any", "and", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos",
    "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite",
    "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "or", "pow", "pvary", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin",
    "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip


class Part(NamedTuple):
    """Connected elementwise equations on arrays of one shape, and on scalars, in order."""

    equations: list[Any]
    inputs: dict[int, Any]  # its variables among the function's arguments, by index
    outputs: dict[int, Any]  # and among its results


def elementwise_parts(jaxpr: Jaxpr) -> list[Part]:
    """Finds the connected groups of equations that are elementwise."""
    group, equations, other = _groups(jaxpr)

    def of(atoms: Sequence[Any], number: int) -> dict[int, Any]:
        return {i: v for i, v in enumerate(atoms) if arrays([v]) and group.get(v) == number}

    return [
        Part([jaxpr.eqns[i] for i in sorted(own)], of(jaxpr.invars, g), of(jaxpr.outvars, g))
        for g, own in equations.items()
        if g not in other
    ]


def is_elementwise(traced: Traced, leaves: Collection[int]) -> bool:
    """Whether an update of some params, by index, and of all that they are used with, is."""
    if traced.update is None:
        return False
    jaxpr, count = traced.update.jaxpr, len(traced.params)
    group, _, other = _groups(jaxpr)
    atoms = [atom for i in leaves for atom in (jaxpr.invars[i], jaxpr.outvars[i])]
    atoms += [jaxpr.invars[count + len(traced.states) + i] for i in leaves]
    return not any(group.get(v) in other for v in arrays(atoms))


def same_equations(one: Traced, other: Traced) -> bool:
    """Whether two updates have the same equations, whatever the shapes."""

    def names(jaxpr: Jaxpr) -> list[Any]:
        return [
            equation.primitive.name if (body := body_of(equation)) is None else names(body.jaxpr)
            for equation in jaxpr.eqns
        ]

    if one.update is None or other.update is None:
        return False
    return names(one.update.jaxpr) == names(other.update.jaxpr)


def _groups(jaxpr: Jaxpr) -> tuple[dict[Any, int], dict[int, list[int]], set[int | None]]:
    """Each array's group, the groups' equations by number, and the groups that are others."""
    group: dict[Any, int] = {}  # by variable
    variables: dict[int, list[Any]] = {}  # by group
    equations: dict[int, list[int]] = {}
    other = set()
    for number, equation in enumerate(jaxpr.eqns):
        own = arrays((*equation.invars, *equation.outvars))
        if not own:
            continue
        joined = {group[v] for v in own if v in group}
        variables[number] = [v for g in joined for v in variables.pop(g)] + own
        equations[number] = [e for g in joined for e in equations.pop(g)] + [number]
        group.update(dict.fromkeys(variables[number], number))
        if joined & other or not _is_elementwise(equation):
            other.add(number)
    other |= {group.get(v) for v in arrays(jaxpr.constvars)}

    return group, equations, other


def _is_elementwise(equation: Any) -> bool:
    """Whether an equation works element by element, on arrays of one shape and scalars."""
    shapes = {v.aval.shape for v in arrays((*equation.invars, *equation.outvars))}
    if len(shapes) != 1 or not all(v.aval.shape for v in equation.outvars):
        return False
    if (body := body_of(equation)) is not None:
        inside = (e for e in body.jaxpr.eqns if arrays((*e.invars, *e.outvars)))
        return not arrays(body.jaxpr.constvars) and all(map(_is_elementwise, inside))
    name = equation.primitive.name
    return name in _ELEMENTWISE or (name == "broadcast_in_dim" and not arrays(equation.invars))


def body_of(equation: Any) -> ClosedJaxpr | None:
    """Returns the jitted function that an equation calls, if it does."""
    return equation.params["jaxpr"] if equation.primitive.name in ("jit", "pjit") else None


def arrays(atoms: Sequence[Any]) -> list[Any]:
    """Returns the variables that have axes."""
    return [v for v in atoms if not isinstance(v, Literal) and v.aval.shape]
