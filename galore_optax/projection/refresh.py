"""The refresh of a leaf's subspaces: new bases where they are due, moments carried over to them.

A refresh stays due until a finite, non-zero gradient performs it.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from galore_optax import checks
from galore_optax.projection.leaf import Bases, Projection, unfold
from galore_optax.projection.moments import CarryOver, transition
from galore_optax.projection.schedule import Similarity
from galore_optax.projection.subspace import FindSubspace, refreshed
from galore_optax.quantization.array import dequantized, stored_like
from galore_optax.sharding import specs, with_automatic_axes

Moments = tuple[tuple[Any, ...], ...]
"""For each matrix its moments in the inner's state."""
Change = tuple[tuple[Float[Array, "r r"], ...], Float[Array, ""]]
"""The transitions from old bases to new ones, if moments are carried over, and their similarity."""


@dataclasses.dataclass(frozen=True)
class Refresh:
    """How a leaf is refreshed; fixed when the program is compiled.

    Attributes:
        projection: How the leaf is projected.
        find: Finds a basis of one gradient `(n, m)`, the projected side first.
        carry_over: What becomes of the moments; None leaves them.
        similarity: Compares the new basis with the old one; None does not.
    """

    projection: Projection
    find: FindSubspace
    carry_over: CarryOver | None
    similarity: Similarity | None


class Leaf(NamedTuple):
    """A leaf before its refresh.

    Attributes:
        gradient: Its gradient.
        bases: Its bases, one for each projected side.
        moments: Its moments; `()` for each matrix if they are not carried over.
        due: Whether a refresh is due, for each matrix.
    """

    gradient: Float[Array, "*shape"]
    bases: Bases
    moments: Moments
    due: Bool[Array, "*batch"]


class Refreshed(NamedTuple):
    """A leaf after its refresh.

    Attributes:
        bases: Its bases.
        moments: Its moments.
        happened: Whether a matrix was refreshed.
        similarities: Of a refreshed matrix' new basis to the old one, the mean over its sides.
    """

    bases: Bases
    moments: Moments
    happened: Bool[Array, " matrices"]
    similarities: Float[Array, " matrices"]


def check_subspace(find: FindSubspace, plans: Sequence[Projection | None]) -> None:
    """Checks that a user's function finds bases of the right shape.

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
@partial(jax.jit, static_argnums=0)
def refresh(how: Refresh, leaf: Leaf, key: PRNGKeyArray, first: Int[Array, ""]) -> Refreshed:
    """Refreshes the matrices of a leaf that are due; costs nothing on other steps.

    Args:
        how: How.
        leaf: The leaf.
        key: Of the leaf and the step; a matrix's index is folded in.
        first: The index of the leaf's first matrix; not 0 if other layers are before it.
    """
    return with_automatic_axes(
        partial(_refresh, how),
        lambda _: Refreshed(*specs((leaf.bases, leaf.moments)), PartitionSpec(), PartitionSpec()),
        leaf, key, first,
    )  # fmt: skip


def _refresh(how: Refresh, leaf: Leaf, key: PRNGKeyArray, first: Array) -> Refreshed:
    projection, carry_over = how.projection, how.carry_over

    def matrix(
        gradient: Float[Array, "*sizes"], bases: Bases, due: Array, index: Array | int
    ) -> tuple[Bases, Change, Array]:
        """Of one matrix the new bases, what they are to the old, and whether they are new."""

        def search() -> tuple[Bases, Change, Array]:
            own = jax.random.fold_in(key, first + index)
            old = dequantized(bases)
            pairs = [
                refreshed(how.find, unfold(gradient, mode), basis, jax.random.fold_in(own, mode))
                for mode, basis in zip(projection.modes, old, strict=True)
            ]
            found = jnp.all(jnp.array([ok for _, ok in pairs]))
            new = tuple(stored_like(p[0], basis) for p, basis in zip(pairs, bases, strict=True))
            new = jax.tree.map(partial(jnp.where, found), new, bases)
            return new, change(old, dequantized(new)), found

        def stay() -> tuple[Bases, Change, Array]:
            none = jax.eval_shape(lambda b: change(dequantized(b), dequantized(b)), bases)
            return bases, jax.tree.map(jnp.zeros_like, none), jnp.array(False)

        # Never `select`, which would compute every basis at every step; so there is no `vmap`.
        return jax.lax.cond(due, search, stay)

    def change(old: Sequence[Any], new: Sequence[Any]) -> Change:
        pairs = list(zip(old, new, strict=True))
        turns = () if carry_over is None else tuple(transition(a, b) for a, b in pairs)
        if how.similarity is None:
            return turns, jnp.zeros((), jnp.float32)
        wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
        return turns, jnp.mean(jnp.array([how.similarity(a, b) for a, b in wide], jnp.float32))

    def carried(turns: Any, found: Array, moments: tuple[Any, ...]) -> tuple[Any, ...]:
        if carry_over is None:
            return moments
        return jax.lax.cond(found, lambda: carry_over(turns, moments), lambda: moments)

    def single() -> Refreshed:
        gradient = projection.view.to_stack(leaf.gradient)
        new, (turns, similar), found = matrix(gradient, leaf.bases, leaf.due, 0)
        moments = (carried(turns, found, leaf.moments[0]),)
        return Refreshed(new, moments, found[None], similar[None])

    def stack() -> Refreshed:
        gradients, shape = projection.view.to_stack(leaf.gradient), projection.view.batch_shape

        def body(i: Array, state: tuple[Bases, Change, Array]) -> tuple[Bases, Change, Array]:
            # The transitions are kept, not the old bases, so that new ones can take their place.
            own = partial(_matrix_of, i=i, batch_shape=shape)
            stacks, changes, found = state
            # The gradient is read beside the condition: with the collectives that send a matrix of
            # a sharded stack inside it, devices waited for each other forever (jaxlib 0.10, CPU).
            new, one, happened = matrix(own(gradients), jax.tree.map(own, stacks), own(leaf.due), i)
            at = jnp.unravel_index(i, shape)
            stacks = jax.tree.map(lambda b, x: b.at[at].set(x), stacks, new)
            changes = jax.tree.map(lambda c, x: c.at[i].set(x), changes, one)
            return stacks, changes, found.at[i].set(happened)

        def one_of(stacks: Bases) -> Bases:
            return dequantized(jax.tree.map(lambda b: b[(0,) * len(shape)], stacks))

        number = projection.matrices
        one = jax.eval_shape(lambda b: change(one_of(b), one_of(b)), leaf.bases)
        changes = jax.tree.map(lambda c: jnp.zeros((number, *c.shape), c.dtype), one)
        start = leaf.bases, changes, jnp.zeros(number, bool)
        new, (turns, similar), found = jax.lax.fori_loop(0, number, body, start)
        moments = tuple(
            carried(tuple(turn[i] for turn in turns), found[i], own)
            for i, own in enumerate(leaf.moments)
        )
        return Refreshed(new, moments, found, similar)

    def stay() -> Refreshed:
        none = jnp.zeros(projection.matrices, jnp.float32)
        return Refreshed(leaf.bases, leaf.moments, none > 0, none)

    refresh_all = stack if projection.view.batch_axes else single
    return jax.lax.cond(jnp.any(leaf.due), refresh_all, stay)


def _matrix_of(
    stack: Shaped[Array, "..."], i: Int[Array, ""], batch_shape: tuple[int, ...]
) -> Shaped[Array, "*sizes"]:
    """Matrix `i` of a stack, as a gather: where the stack is sharded XLA sends that one matrix.

    A dynamic slice (`stack[i]`) would have it send all of them.
    """
    at = jnp.unravel_index(i[None], batch_shape)
    return stack[at][0]
