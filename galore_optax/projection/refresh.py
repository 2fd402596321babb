"""When to look for a new subspace, and the exchange: every `update_proj_gap` steps (GaLore,
algorithm 2), the moments carried over to the new basis.

A refresh stays due until a finite, non-zero gradient performs it.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from galore_optax import checks
from galore_optax.projection.leaf import Bases, Projection, unfold
from galore_optax.projection.moments import CarryOver, transition
from galore_optax.projection.schedule import Similarity
from galore_optax.projection.subspace import FindSubspace, refreshed
from galore_optax.quantization.array import dequantized, stored_like
from galore_optax.sharding import specs, with_automatic_axes

Moments = tuple[tuple[Any, ...], ...]
Change = tuple[tuple[Float[Array, "r r"], ...], Float[Array, ""]]
"""The transitions from old bases to new ones, if moments are carried over, and their similarity."""

_LAST = 2**31 - 1


def matrices(plans: Sequence[Projection | None]) -> int:
    """How many matrices are projected, over all leaves."""
    return sum(plan.matrices for plan in plans if plan is not None)


def by_leaf(plans: Sequence[Projection | None], every: Any) -> list[Any]:
    """Of one number for every matrix those of each leaf, `(*batch,)`; none of one unprojected."""
    if not any(plans):
        return [None] * len(plans)
    shapes = [(0,) if plan is None else plan.view.batch_shape for plan in plans]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [x.reshape(shape) for x, shape in zip(jnp.split(every, ends), shapes, strict=True)]


def flat(leaves: Sequence[Array], dtype: Any) -> Shaped[Array, " matrices"]:
    """The inverse of `by_leaf`."""
    return jnp.concatenate([jnp.zeros(0, dtype), *(x.reshape(-1).astype(dtype) for x in leaves)])


def steps_to_next(
    plans: Sequence[Projection | None],
    due: Sequence[Any],
    count: Array,
    gap: int | optax.Schedule,
    stagger: bool,
    layer: ArrayLike = 0,
    layers: int = 1,
) -> list[Any]:
    """Steps from a refresh at this step to the next, for each matrix of each projected leaf.

    Of `layers` layers these are the leaves of `layer`; all layers' are counted leaf by leaf.
    """
    steps = jnp.asarray(gap(count) if callable(gap) else gap)
    # A gap that is infinite, or no number, is one that never ends.
    steps = jnp.where(steps < 2**30, jnp.maximum(steps, 1), 2**30).astype(jnp.int32)
    total = matrices(plans) * layers
    gaps, before = [], 0
    for plan, at in zip(plans, due, strict=True):
        if plan is None:
            gaps.append(at)
            continue
        own = jnp.full(at.shape, steps)
        if stagger:
            # From half a gap to one and a half after the first refresh, then a gap for each.
            phase = (before + np.arange(layers * plan.matrices) + 0.5) / total + 0.5
            phase = jnp.asarray(phase.reshape(layers, *at.shape), jnp.float32)[layer]
            own = jnp.where(at == 0, jnp.ceil(steps * phase).astype(jnp.int32), own)
        gaps.append(own)
        before += layers * plan.matrices
    return gaps


def later(step: Int[Array, "*n"], gap: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """So many steps later, or the last step that can be counted."""
    return step + jnp.minimum(gap, _LAST - step)


def multiplied(gap: Int[Array, "*n"], factor: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """The gap so many times, or as often as can be counted."""
    return jnp.minimum(gap, _LAST // factor) * factor


def check_subspace(find: FindSubspace, plans: Sequence[Projection | None]) -> None:
    """Whether a user's function finds bases of the right shape.

    Raises:
        ValueError: If it does not, or cannot be called.
    """
    for plan in filter(None, plans):
        for mode, rank in zip(plan.modes, plan.ranks, strict=True):
            n = plan.view.sizes[mode]
            gradient, basis = (
                jax.ShapeDtypeStruct((n, m), jnp.float32)
                for m in (math.prod(plan.view.sizes) // n, rank)
            )
            checks.gives(find, "subspace", (gradient, basis, jax.random.key(0)), basis)


# Compiled on its own, since outside of jit every conditional would be compiled anew at every call.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def refresh(
    projection: Projection,
    find: FindSubspace,
    carry_over: CarryOver | None,
    similarity: Similarity | None,
    grad: Float[Array, "..."],
    bases: Bases,
    moments: Moments,
    due: Int[Array, "*batch"],
    count: Int[Array, ""],
    gaps: Int[Array, "*batch"],
    kept: Float[Array, ""] | None,
    key: PRNGKeyArray,
    path: Int[Array, ""],
    first: Int[Array, ""],
) -> tuple[Bases, Moments, Int[Array, "*batch"], Float[Array, " matrices"]]:
    """New bases for the matrices of a leaf that are due one; costs nothing on other steps.

    A conditional inside a loop over the stack: under `vmap` it would become a select, which
    computes every basis at every step.

    Args:
        projection: How the leaf is projected.
        find: Finds a basis of one gradient `(n, m)`, the projected side first.
        carry_over: What becomes of the moments; None leaves them.
        similarity: Compares the new basis with the old one; None does not.
        grad: The leaf's gradient.
        bases: The present bases, of each projected side.
        moments: For each matrix, its moments in the inner's state.
        due: The step from which each matrix's refresh is due.
        count: The present step.
        gaps: Steps until the next refresh of each matrix, if one is performed now.
        kept: Fraction of the rank that new bases use; None uses it all.
        key: Of the whole transformation; step, path and the matrix's index are folded in.
        path: The hash of the leaf's path.
        first: The index of the leaf's first matrix; not 0 where other layers are before it.

    Returns:
        The bases, the moments, the steps from which the next refreshes are due, and of each
        refreshed matrix the similarity, the mean of those of its sides.
    """
    return with_automatic_axes(
        partial(_refresh, projection, find, carry_over, similarity),
        lambda _: (*specs((bases, moments, due)), PartitionSpec()),
        grad, bases, moments, due, count, gaps, kept, key, path, first,
    )  # fmt: skip


def _refresh(
    projection: Projection,
    find: FindSubspace,
    carry_over: CarryOver | None,
    similarity: Similarity | None,
    grad: Array,
    bases: Bases,
    moments: Moments,
    due: Array,
    count: Array,
    gaps: Array,
    kept: Array | None,
    key: PRNGKeyArray,
    path: Array,
    first: Array,
) -> tuple[Bases, Moments, Array, Array]:
    def matrix(
        gradient: Float[Array, "*sizes"],
        bases: Bases,
        due: Array,
        gap: Array,
        index: Array | int,
    ) -> tuple[Bases, Change, Array]:
        """Of one matrix the new bases, what they are to the old, and when the next are due."""

        def search() -> tuple[Bases, Change, Array]:
            own = jax.random.fold_in(
                jax.random.fold_in(jax.random.fold_in(key, count), path), first + index
            )
            old = dequantized(bases)
            pairs = [
                refreshed(find, unfold(gradient, mode), basis, jax.random.fold_in(own, mode), kept)
                for mode, basis in zip(projection.modes, old, strict=True)
            ]
            found = jnp.all(jnp.array([ok for _, ok in pairs]))
            new = tuple(stored_like(p[0], basis) for p, basis in zip(pairs, bases, strict=True))
            new = jax.tree.map(partial(jnp.where, found), new, bases)
            return new, change(old, dequantized(new)), jnp.where(found, later(count, gap), due)

        def stay() -> tuple[Bases, Change, Array]:
            none = jax.eval_shape(lambda b: change(dequantized(b), dequantized(b)), bases)
            return bases, jax.tree.map(jnp.zeros_like, none), due

        return jax.lax.cond(count >= due, search, stay)

    def change(old: Sequence[Any], new: Sequence[Any]) -> Change:
        pairs = list(zip(old, new, strict=True))
        turns = () if carry_over is None else tuple(transition(a, b) for a, b in pairs)
        if similarity is None:
            return turns, jnp.zeros((), jnp.float32)
        wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
        return turns, jnp.mean(jnp.array([similarity(a, b) for a, b in wide], jnp.float32))

    def carried(turns: Any, found: Array, moments: tuple[Any, ...]) -> tuple[Any, ...]:
        if carry_over is None:
            return moments
        return jax.lax.cond(found, lambda: carry_over(turns, moments), lambda: moments)

    def single() -> tuple[Bases, Moments, Array, Array]:
        stack = projection.view.to_stack(grad)
        new, (turns, similar), following = matrix(stack, bases, due, gaps, 0)
        return new, (carried(turns, following != due, moments[0]),), following, similar[None]

    def stack() -> tuple[Bases, Moments, Array, Array]:
        gradients, shape = projection.view.to_stack(grad), projection.view.batch_shape

        def body(i: Array, state: tuple[Bases, Change, Array]) -> tuple[Bases, Change, Array]:
            # The transitions are kept, not the old bases, so that new ones can take their place.
            own = partial(_matrix_of, i=i, batch_shape=shape)
            stacks, changes, dues = state
            # The gradient is read beside the condition: with the collectives that send a matrix of
            # a sharded stack inside it, devices waited for each other forever (jaxlib 0.10, CPU).
            new, one, following = matrix(
                own(gradients), jax.tree.map(own, stacks), own(dues), own(gaps), i
            )
            at = jnp.unravel_index(i, shape)
            stacks = jax.tree.map(lambda b, x: b.at[at].set(x), stacks, new)
            changes = jax.tree.map(lambda c, x: c.at[i].set(x), changes, one)
            return stacks, changes, dues.at[at].set(following)

        def one_of(stacks: Bases) -> Bases:
            return dequantized(jax.tree.map(lambda b: b[(0,) * len(shape)], stacks))

        one = jax.eval_shape(lambda b: change(one_of(b), one_of(b)), bases)
        changes = jax.tree.map(lambda c: jnp.zeros((projection.matrices, *c.shape), c.dtype), one)
        new, (turns, similar), dues = jax.lax.fori_loop(
            0, projection.matrices, body, (bases, changes, due)
        )
        found = (dues != due).reshape(-1)
        turned = tuple(
            carried(tuple(turn[i] for turn in turns), found[i], own)
            for i, own in enumerate(moments)
        )
        return new, turned, dues, similar

    def stay() -> tuple[Bases, Moments, Array, Array]:
        return bases, moments, due, jnp.zeros(projection.matrices, jnp.float32)

    refresh_all = stack if projection.view.batch_axes else single
    return jax.lax.cond(jnp.any(count >= due), refresh_all, stay)


def _matrix_of(
    stack: Shaped[Array, "..."], i: Int[Array, ""], batch_shape: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """Matrix `i` of a stack, as a gather: where the stack is sharded XLA sends that one matrix.

    A dynamic slice (`stack[i]`) would have it send all of them.
    """
    at = jnp.unravel_index(i[None], batch_shape)
    return stack[at][0]
