"""What becomes of an inner optimizer's moments when a subspace changes.

Moments live in the coordinates of the old basis. With the transition Q = P_newᵀ P_old between the
two (LDAdam, arXiv:2410.16103, section 3.2), a first moment m becomes Q m, and a second moment v,
with the first beside it,

    v ← (Q∘Q) (v - m²) + (Q m)²

v - m² is a variance; its covariances are taken as zero. Where m² exceeds v, v takes its place, so
that no second moment becomes negative. A second moment without a first becomes (Q∘Q) v. A factored
second moment (Adafactor, SM3) has a factor along the rank, which becomes (Q∘Q) times it, and one
along the other axis, which is kept. A new direction outside the old subspace thus has variance 0.
That is harmless if the update adds the gradient's square before it divides (Adam). If it divides by
v of the step before (ACProp, ADOPT), the share outside counts with the mean variance inside.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from galore_optax.projection.leaf import Plans, Projection
from galore_optax.quantization.array import dequantized, is_quantized, stored_like
from galore_optax.sharding import sharded_like
from galore_optax.trace.roles import FACTOR, FIRST, SECOND, Role

Turn = Callable[..., Array]
MomentsFunction = Callable[[str, Array, Turn], Array]
"""Returns the moment in the new basis. Arguments: its name in the inner's state, the moment, and a
function `turn(x, squared=False)` that multiplies x by Q, or by Q∘Q."""

RULES = ("rotate", "keep", "reset")


@dataclasses.dataclass(frozen=True)
class Moment:
    """A leaf of the inner's state that belongs to a matrix.

    Attributes:
        name: Its field's name.
        role: What it is.
        first: For a second moment, the index of the first one among the matrix's moments.
        position: Its index among the leaves; not compared, so that equal leaves share programs.
    """

    name: str
    role: Role
    first: int | None = None
    position: int = dataclasses.field(default=0, compare=False)


MomentsOf = dict[int, list[list[Moment]]]
"""For each projected leaf, by index, the moments of all its matrices together, or of each."""


def small_leaves(plans: Plans) -> list[tuple[int, int]]:
    """(leaf of the params, matrix of that leaf) for each leaf that the inner is given."""
    return [
        (i, j)
        for i, plan in enumerate(plans)
        for j in range(1 if plan is None or plan.together else plan.matrices)
    ]


def moving_axes(plans: Plans) -> set[tuple[int, int]]:
    """(leaf that the inner is given, axis) for each axis whose coordinates belong to a basis."""
    owners = ((k, plans[i]) for k, (i, _) in enumerate(small_leaves(plans)))
    return {
        (k, mode + plan.batch_ndim) for k, plan in owners if plan is not None for mode in plan.modes
    }


def moments_of(
    roles: Sequence[Role], state: optax.OptState, params: optax.Params, plans: Plans
) -> MomentsOf:
    """Where the moments of each matrix lie in the inner's state, a `QuantizedArray` being one leaf.

    The roles are those of the leaves of the state, the params those that the inner is given.
    """
    owners = small_leaves(plans)
    param_paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    found: MomentsOf = {
        i: [[] for _ in range(1 if plan.together else plan.matrices)]
        for i, plan in enumerate(plans)
        if plan is not None
    }
    containers: dict[int, tuple[Any, ...]] = {}
    leaves = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
    for position, ((path, _), role) in enumerate(zip(leaves, roles, strict=True)):
        if role.param is None or owners[role.param][0] not in found:
            continue
        i, j = owners[role.param]
        field = _field(path, param_paths[role.param])
        containers[position] = field[:-1]
        own, first = found[i][j], None
        if role.kind == SECOND:
            beside = (
                k
                for k, other in enumerate(own)
                if other.role.kind == FIRST
                if other.role.axes == _of_one_matrix(role, plans[i]).axes
                if containers[other.position] == field[:-1]
            )
            first = next(beside, None)
        name = jax.tree_util.keystr(field[-1:], simple=True) if field else ""
        own.append(Moment(name, _of_one_matrix(role, plans[i]), first, position))
    return found


def _of_one_matrix(role: Role, plan: Projection | None) -> Role:
    """The role of one matrix of a stack's moment."""
    batch = 0 if plan is None else plan.batch_ndim
    axes = tuple(None if axis is None else axis - batch for axis in role.axes[batch:])
    return dataclasses.replace(role, axes=axes)


def _field(path: tuple[Any, ...], param: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path of a field that contains a tree like the params, from the path of a leaf in it."""
    for end in range(len(path) - len(param), -1, -1):
        if path[end : end + len(param)] == param:
            return path[:end]
    return path


def reset(
    init: Callable[[], Any], leaves: list[Any], places: MomentsOf, refreshed: Sequence[Array]
) -> list[Array]:
    """The leaves of the inner's state, as `init` makes them where a matrix was refreshed."""
    if not any(map(any, places.values())):
        return leaves
    # `where` instead of a conditional: it is fused with the update of the moment, and a conditional
    # for all matrices would make each of them wait for all gradients.
    fresh = sharded_like(jax.tree.leaves(init(), is_leaf=is_quantized), leaves)
    new = list(leaves)
    for matrices, happened in zip(places.values(), refreshed, strict=True):
        for matrix, found in zip(matrices, jnp.split(happened, len(matrices)), strict=True):
            for i in [moment.position for moment in matrix]:
                new[i] = jax.tree.map(partial(_where, found), fresh[i], leaves[i])
    return new


def _where(found: Bool[Array, " matrices"], fresh: Array, old: Array) -> Array:
    """The fresh array of each matrix that is marked, of a stack of them or of one."""
    batch = next(k for k in range(old.ndim + 1) if math.prod(old.shape[:k]) == len(found))
    marks = found.reshape(*old.shape[:batch], *[1] * (old.ndim - batch))
    return jnp.where(marks if batch else found[0], fresh, old)


@dataclasses.dataclass(frozen=True)
class CarryOver:
    """Carries the moments of one matrix of a leaf over to a new basis.

    The rule is "rotate", or the user's own function.
    """

    projection: Projection
    rule: str | MomentsFunction
    moments: tuple[Moment, ...]

    def __call__(
        self, transitions: Sequence[Float[Array, "r r"]], moments: Sequence[Any]
    ) -> tuple[Any, ...]:
        """The moments in the new bases, each in its own shape, dtype and code."""
        by_mode = dict(zip(self.projection.modes, transitions, strict=True))
        floats = dequantized(tuple(moments))
        carried = [self._carried(i, floats, by_mode) for i in range(len(floats))]
        for own, new, moment in zip(self.moments, carried, floats, strict=True):
            if jnp.shape(new) != moment.shape:
                raise ValueError(
                    f"moments: from the moment {own.name!r} of shape {moment.shape} the function "
                    f"makes one of shape {jnp.shape(new)}"
                )
        pairs = zip(carried, moments, strict=True)
        return tuple(stored_like(new.astype(old.dtype), old) for new, old in pairs)

    def _carried(self, i: int, moments: Sequence[Array], transitions: dict[int, Array]) -> Array:
        own, moment = self.moments[i], moments[i]

        def turn(x: Array, squared: bool = False) -> Array:
            for at, axis in enumerate(own.role.axes):
                if axis in transitions:
                    q = transitions[axis]
                    turned = jnp.tensordot(q * q if squared else q, _wide(x), (1, at))
                    x = jnp.moveaxis(turned, 0, at)
            return x

        if callable(self.rule):
            known = any(axis is not None for axis in own.role.axes)
            return self.rule(own.name, moment, turn) if known else moment
        if own.role.kind == FIRST:
            return turn(moment)
        if own.role.kind not in (SECOND, FACTOR):
            return moment
        if own.first is None:
            carried = turn(moment, squared=True)
        else:
            second, first = _wide(moment), _wide(moments[own.first])
            mean = jnp.minimum(second, first * first)
            turned = turn(jnp.sign(first) * jnp.sqrt(mean))
            carried = turn(second - mean, squared=True) + turned * turned
        if not own.role.stale:
            return carried
        moved = tuple(at for at, axis in enumerate(own.role.axes) if axis in transitions)
        uncovered = 1 - turn(jnp.ones_like(_wide(moment)), squared=True)
        return carried + jnp.maximum(uncovered, 0) * jnp.mean(_wide(moment), moved, keepdims=True)


def check_rule(
    rule: MomentsFunction, leaves: Sequence[Any], places: MomentsOf, plans: Plans
) -> None:
    """Refuses a user's function that does not carry over the moments among the state's leaves."""
    for i, matrices in places.items():
        plan = plans[i]
        if plan is None or not matrices[0]:
            continue
        turns = [jax.ShapeDtypeStruct((rank, rank), jnp.float32) for rank in plan.ranks]
        own = tuple(leaves[moment.position] for moment in matrices[0])
        one = itemgetter((0,) * plan.batch_ndim)
        own = jax.eval_shape(partial(jax.tree.map, one), own)
        try:
            jax.eval_shape(CarryOver(plan, rule, tuple(matrices[0])), turns, own)
        except Exception as error:
            said = str(error).removeprefix("moments: ")
            raise ValueError(f"moments: the function does not carry them over: {said}") from error


def transition(old: Float[Array, "n r"], new: Float[Array, "n r"]) -> Float[Array, "r r"]:
    """Q = P_newᵀ P_old, at least in float32."""
    return _wide(new).T @ _wide(old)


def _wide(x: Any) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
