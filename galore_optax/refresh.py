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
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from galore_optax.moments import CarryOver, transition
from galore_optax.projection import Projection, unfold
from galore_optax.sharding import specs, with_automatic_axes
from galore_optax.subspace import FindSubspace, refreshed

Bases = tuple[Array, ...]
Moments = tuple[tuple[Array, ...], ...]


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
    steps = jnp.maximum(jnp.asarray(gap(count) if callable(gap) else gap, jnp.int32), 1)
    total = matrices(plans) * layers
    gaps, before = [], 0
    for plan, at in zip(plans, due, strict=True):
        if plan is None:
            gaps.append(None)
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


# Compiled on its own, since outside of jit every conditional would be compiled anew at every call.
@partial(jax.jit, static_argnums=(0, 1, 2))
def refresh(
    projection: Projection,
    find: FindSubspace,
    carry_over: CarryOver | None,
    grad: Float[Array, "..."],
    bases: tuple[Float[Array, "*batch n r"], ...],
    moments: Moments,
    due: Int[Array, "*batch"],
    count: Int[Array, ""],
    gaps: Int[Array, "*batch"],
    kept: Float[Array, ""] | None,
    key: PRNGKeyArray,
    path: Int[Array, ""],
    first: Int[Array, ""],
) -> tuple[Bases, Moments, Int[Array, "*batch"]]:
    """New bases for the matrices of a leaf that are due one; costs nothing on other steps.

    A conditional inside a loop over the stack: under `vmap` it would become a select, which
    computes every basis at every step.

    Args:
        projection: How the leaf is projected.
        find: Finds a basis of one gradient `(n, m)`, the projected side first.
        carry_over: What becomes of the moments; None leaves them.
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
        The bases, the moments, and the steps from which the next refreshes are due.
    """
    return with_automatic_axes(
        partial(_refresh, projection, find, carry_over),
        lambda _: specs((bases, moments, due)),
        grad, bases, moments, due, count, gaps, kept, key, path, first,
    )  # fmt: skip


def _refresh(
    projection: Projection,
    find: FindSubspace,
    carry_over: CarryOver | None,
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
) -> tuple[Bases, Moments, Array]:
    def matrix(
        gradient: Float[Array, "*sizes"],
        bases: Bases,
        due: Array,
        gap: Array,
        index: Array | int,
    ) -> tuple[Bases, Bases, Array]:
        """Of one matrix the new bases, the transitions to them, and when the next are due."""

        def search() -> tuple[Bases, Bases, Array]:
            own = jax.random.fold_in(
                jax.random.fold_in(jax.random.fold_in(key, count), path), first + index
            )
            pairs = [
                refreshed(find, unfold(gradient, mode), basis, jax.random.fold_in(own, mode), kept)
                for mode, basis in zip(projection.modes, bases, strict=True)
            ]
            found = jnp.all(jnp.array([ok for _, ok in pairs]))
            new = tuple(jnp.where(found, b, old) for (b, _), old in zip(pairs, bases, strict=True))
            return new, transitions(bases, new), jnp.where(found, count + gap, due)

        def stay() -> tuple[Bases, Bases, Array]:
            return (
                bases,
                jax.tree.map(jnp.zeros_like, jax.eval_shape(transitions, bases, bases)),
                due,
            )

        return jax.lax.cond(count >= due, search, stay)

    def transitions(old: Bases, new: Bases) -> Bases:
        if carry_over is None:
            return ()
        return tuple(transition(a, b) for a, b in zip(old, new, strict=True))

    def carried(turns: Bases, found: Array, moments: tuple[Array, ...]) -> tuple[Array, ...]:
        if carry_over is None:
            return moments
        return jax.lax.cond(found, lambda: carry_over(turns, moments), lambda: moments)

    def single() -> tuple[Bases, Moments, Array]:
        new, turns, following = matrix(projection.view.to_stack(grad), bases, due, gaps, 0)
        return new, (carried(turns, following != due, moments[0]),), following

    def stack() -> tuple[Bases, Moments, Array]:
        gradients, shape = projection.view.to_stack(grad), projection.view.batch_shape

        def body(i: Array, state: tuple[Bases, Bases, Array]) -> tuple[Bases, Bases, Array]:
            # The transitions are kept, not the old bases, so that new ones can take their place.
            own = partial(_matrix_of, i=i, batch_shape=shape)
            stacks, turns, dues = state
            # The gradient is read beside the condition: with the collectives that send a matrix of
            # a sharded stack inside it, devices waited for each other forever (jaxlib 0.10, CPU).
            new, turn, following = matrix(
                own(gradients), tuple(map(own, stacks)), own(dues), own(gaps), i
            )
            at = jnp.unravel_index(i, shape)
            stacks = tuple(b.at[at].set(x) for b, x in zip(stacks, new, strict=True))
            turns = tuple(t.at[i].set(x) for t, x in zip(turns, turn, strict=True))
            return stacks, turns, dues.at[at].set(following)

        one = tuple(jax.ShapeDtypeStruct(b.shape[len(shape) :], b.dtype) for b in bases)
        turns = jax.tree.map(
            lambda t: jnp.zeros((projection.matrices, *t.shape), t.dtype),
            jax.eval_shape(transitions, one, one),
        )
        state = bases, turns, due
        new, turns, dues = jax.lax.fori_loop(0, projection.matrices, body, state)
        found = (dues != due).reshape(-1)
        turned = tuple(
            carried(tuple(turn[i] for turn in turns), found[i], own)
            for i, own in enumerate(moments)
        )
        return new, turned, dues

    change = stack if projection.view.batch_axes else single
    return jax.lax.cond(jnp.any(count >= due), change, lambda: (bases, moments, due))


def _matrix_of(
    stack: Shaped[Array, "..."], i: Int[Array, ""], batch_shape: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """Matrix `i` of a stack, as a gather: where the stack is sharded XLA sends that one matrix.

    A dynamic slice (`stack[i]`) would have it send all of them.
    """
    at = jnp.unravel_index(i[None], batch_shape)
    return stack[at][0]
