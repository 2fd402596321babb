"""Which outputs of a traced function depend on which of its inputs.

A transformation that updates a leaf from another leaf's gradient too, such as clipping by the
global norm, needs all gradients at once, and cannot run layer by layer (`galore_optax.layerwise`).
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from galore_optax.trace.interpreter import Reading, interpret, known_number, shape_of

Names = frozenset[Hashable]
_NONE: Names = frozenset()


class _Dependence(Reading):
    """Abstract values are the names of the inputs that a value depends on."""

    def __init__(self, through_scalars: bool, through_choices: bool):
        self.through_scalars, self.through_choices = through_scalars, through_choices

    def constant(self, value: Any) -> Names:
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
        scalar = shape_of(var) == ()
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
        traced: The function.
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
    return isinstance(atom, Literal) and known_number(atom.val) == 0


def coupled_leaves(
    tx: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    axes: Sequence[str] = (),
    **extra_args: object,
) -> tuple[str, str] | None:
    """The paths of two leaves, the first of which is updated by the second's gradient.

    None if every leaf is updated by itself. A dependence through a scalar of the state, one or more
    updates later, counts too. One through an array of the state does not: the array would have to
    hold something of several leaves. The values of the params are not used. `axes` are those of
    `jax.shard_map` that the update sums over.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax.trace.dependence import coupled_leaves
        >>> params = {"a": jnp.ones(3), "b": jnp.ones(3)}
        >>> coupled_leaves(optax.with_extra_args_support(optax.adamw(1e-3)), params)
        >>> coupled_leaves(optax.with_extra_args_support(optax.clip_by_global_norm(1.0)), params)
        ("['a']", "['b']")
    """
    state = jax.eval_shape(tx.init, params)

    def update(gradient: optax.Updates, state: optax.OptState, params: optax.Params) -> object:
        return tx.update(gradient, state, params, **extra_args)

    traced = jax.make_jaxpr(update, axis_env=[(axis, 1) for axis in axes])(params, state, params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    n = len(paths)
    # Paths name gradients, and numbers the scalars of the state, which are followed.
    scalars = [i if np.ndim(x) == 0 else None for i, x in enumerate(jax.tree.leaves(state))]
    before, made_of = None, dependences(traced, [*paths, *scalars, *[None] * n])
    while made_of != before:
        before = made_of
        followed = [[before[n + i] for i in names if isinstance(i, int)] for names in before]
        made_of = [names.union(*more) for names, more in zip(before, followed, strict=True)]
    for path, names in zip(paths, made_of, strict=False):
        others = {name for name in names if isinstance(name, str)} - {path}
        if others:
            return path, min(others)
    return None
