"""What becomes of an inner optimizer's moments when a subspace changes.

Moments live in the coordinates of the old basis. With the transition Q = P_newᵀ P_old between the
two (LDAdam, arXiv:2410.16103, section 3.2), a first moment m becomes Q m, and a second moment v,
with the first beside it,

    v ← (Q∘Q) (v - m²) + (Q m)²

v - m² is a variance; its covariances are taken as zero. Where m² exceeds v, v takes its place, so
that no second moment becomes negative. A second moment without a first becomes (Q∘Q) v, and so does
one whose size is not that of m²: a magnitude (AdaMax: the update takes no root of it), and v beside
a sum of gradients (Simplified AdEMAMix) or of quotients (ADOPT). Of a factored second moment
(Adafactor, SM3) the factor along the rank is multiplied by Q∘Q, and the other one is kept.

The rows of Q∘Q sum to the share of each new direction that the old subspace covers. The rest was
outside of it, so it is weaker than the weakest of the old directions. If strengths go on falling
outside as they fall inside, from `most` to `least`, those of the next r directions are around
least · √(least / most). The rest is taken to be as strong: for each column, the mean of v over the
old directions is scaled to that. A rest of 0, as in LDAdam, would make v fall to the covered share
at each refresh if the gradient's spectrum is flat, to 0.37 of itself; Adam's v takes 1 / (1 - b2)
steps to recover, and the steps grow with 1 / √v. The mean of v, or the weakest, is too much for a
spectrum that falls (benchmarks/RESULTS.md). If the update divides by v of the step before (ACProp,
ADOPT), too little is worse than too much, and the rest is taken to be as strong as the mean.

A reset forgets which direction a moment belongs to, not its size. Adam counts its steps for all
params together, and corrects young moments by that count, which a reset cannot set back: zeros
would be taken for moments of many gradients, and Adam's steps would be up to 5 times too large. So
a first moment gets the present gradient's direction and keeps its norm; second moments and factors
are assigned anew, the largest to the new direction with most of the present gradient. With a
constant gradient both are what they were.
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
from galore_optax.trace.roles import FACTOR, FIRST, OTHER, SECOND, Role

Turn = Callable[..., Array]
MomentsFunction = Callable[[str, Array, Turn], Array]
"""Returns the moment in the new basis. Arguments: its name in the inner's state, the moment, and a
function `turn(x, squared=False)` that multiplies x by Q, or by Q∘Q."""

RULES = ("rotate", "keep", "reset")
ROUNDING = 0.01  # of the share covered: bases in bfloat16 or 8 bits are orthonormal to about that


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
        if role.kind == SECOND and role.root:
            beside = (
                k
                for k, other in enumerate(own)
                if other.role.kind == FIRST and other.role.average
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
    init: Callable[[], Any],
    leaves: list[Any],
    places: MomentsOf,
    plans: Plans,
    remembers: bool,
    refreshed: Sequence[Array],
) -> list[Array]:
    """The leaves of the inner's state, as `init` makes those that are no moments of gradients.

    That is where a matrix was refreshed. `remembers` says whether first moments may be values of
    the params.
    """

    def restarts(moment: Moment, plan: Any) -> bool:
        moves = not set(plan.modes).isdisjoint(moment.role.axes) or moment.role.unclear
        return (remembers and moment.role.kind == FIRST) or (moment.role.kind == OTHER and moves)

    chosen = [
        [[m.position for m in own if restarts(m, plans[i])] for own in matrices]
        for i, matrices in places.items()
    ]
    if not any(map(any, chosen)):
        return leaves
    # `where` instead of a conditional: it is fused with the update of the moment, and a conditional
    # for all matrices would make each of them wait for all gradients.
    fresh = sharded_like(jax.tree.leaves(init(), is_leaf=is_quantized), leaves)
    new = list(leaves)
    for matrices, happened in zip(chosen, refreshed, strict=True):
        for positions, found in zip(matrices, jnp.split(happened, len(matrices)), strict=True):
            for i in positions:
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

    The rule is "rotate", "reset", or the user's own function.
    """

    projection: Projection
    rule: str | MomentsFunction
    moments: tuple[Moment, ...]

    def __call__(
        self,
        transitions: Sequence[Float[Array, "r r"]],
        moments: Sequence[Any],
        small: Float[Array, "..."] | None = None,
    ) -> tuple[Any, ...]:
        """The moments in the new bases, each in its own shape, dtype and code.

        A reset needs the gradient, projected into the new bases.
        """
        floats = dequantized(tuple(moments))
        if self.rule == "reset":
            carried = [self._dealt(i, floats, small) for i in range(len(floats))]
        else:
            by_mode = dict(zip(self.projection.modes, transitions, strict=True))
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
            turned = turn(jnp.sign(first) * _root(mean))
            carried = turn(second - mean, squared=True) + turned * turned
        moved = tuple(at for at, axis in enumerate(own.role.axes) if axis in transitions)
        shape = [n if at in moved else 1 for at, n in enumerate(moment.shape)]
        outside = 1 - turn(jnp.ones(shape, carried.dtype), squared=True)
        outside = jnp.where(outside > ROUNDING, outside, 0)
        usual = jnp.mean(_wide(moment), moved, keepdims=True)
        if not own.role.stale:
            for at in moved:
                along = _sums(_wide(moment), at)
                mean, least = jnp.mean(along), jnp.min(along)
                falls = _root(least / jnp.where(mean > 0, jnp.max(along), 1))
                # Products of moments would leave the range of float32 where these do not.
                usual = usual * falls * (least / jnp.where(mean > 0, mean, 1))
        return carried + outside * usual

    def _dealt(self, i: int, moments: Sequence[Array], small: Any) -> Array:
        """A moment of the size that it had, with the directions of the present gradient."""
        own, moment = self.moments[i], _wide(moments[i])
        moved = tuple(at for at, axis in enumerate(own.role.axes) if axis in self.projection.modes)
        gradient = _wide(small)
        if own.role.kind == FIRST:
            known = [axis for axis in own.role.axes if axis is not None]
            other = [at for at, axis in enumerate(own.role.axes) if axis is None]
            direction = jnp.einsum(gradient, [*range(gradient.ndim)], known)
            direction = jnp.expand_dims(direction, other)
            norm = _root(jnp.sum(direction * direction, moved, keepdims=True))
            size = _root(jnp.sum(moment * moment, moved, keepdims=True))
            return size / jnp.where(norm > 0, norm, 1) * direction
        if own.role.kind not in (SECOND, FACTOR):
            return moment
        mean = jnp.zeros((), moment.dtype)
        if own.role.rooted and own.first is not None:
            # The update takes a root of v - m² (centered RMSProp), which is dealt by itself.
            first = _wide(moments[own.first])
            moment = moment - jnp.minimum(moment, first * first)
            mean = self._dealt(own.first, moments, small) ** 2
        total, dealt = jnp.sum(moment), jnp.ones((), moment.dtype)
        for at, axis in enumerate(own.role.axes):
            along = _sums(moment, at)
            if axis is not None and at in moved:
                order = jnp.argsort(jnp.argsort(_sums(gradient * gradient, axis)))
                along = jnp.sort(along)[order]
            share = along / jnp.where(total > 0, total, 1)
            dealt = dealt * share.reshape([n if k == at else 1 for k, n in enumerate(moment.shape)])
        return total * dealt + mean


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


def transition(
    old: Float[Array, "n r"], new: Float[Array, "n r"], rounding: float = 0.0
) -> Float[Array, "r r"]:
    """Q = P_newᵀ P_old, at least in float32; of rounded bases P_newᵀ P_old (P_oldᵀ P_old)⁻¹.

    Rows longer than 1, or shorter by up to `rounding` in the square, get that length. Otherwise
    moments grew at each refresh (with bases in 4 bits by 1% to 3%), without bound at short gaps.
    """
    product = partial(jnp.matmul, precision="highest")
    old, new = _wide(old), _wide(new)
    turn = product(new.T, old)
    if not rounding:
        return turn
    gram, two = product(old.T, old), 2 * jnp.eye(old.shape[-1], dtype=old.dtype)
    inverse = two - gram
    for _ in range(3):  # Newton's iteration: from an error of 0.3 to less than 1e-8
        inverse = product(inverse, two - product(gram, inverse))
    turn = product(turn, inverse)
    share = jnp.sum(turn * turn, 1, keepdims=True)
    return turn / jnp.sqrt(jnp.where(share > 1 - rounding, share, 1))


def _sums(x: Array, axis: int) -> Float[Array, " n"]:
    """The sums over all other axes."""
    return jnp.sum(x, [k for k in range(x.ndim) if k != axis])


def _root(x: Array) -> Array:
    """The square root, whose derivative at 0 counts as 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _wide(x: Any) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
