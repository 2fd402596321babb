"""The refresh of a leaf's subspaces: new bases where they are due, moments carried over to them.

A refresh stays due until there is a gradient that is finite and not zero. With a history (Alice's
tracking) that is not zero, a zero gradient is enough.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt32

from galore_optax import checks
from galore_optax.keys import for_matrix
from galore_optax.ordering import kept_in_place
from galore_optax.projection.leaf import Bases, Plans, Projection, projected, unfold
from galore_optax.projection.moments import ROUNDING, CarryOver, transition
from galore_optax.projection.schedule import Similarity
from galore_optax.projection.subspace import FindSubspace, refreshed
from galore_optax.quantization.array import dequantized, is_quantized, stored_like
from galore_optax.sharding import specs, sum_of_all, varying_alike, with_automatic_axes

Moments = tuple[tuple[Any, ...], ...]
"""Moments in the inner's state: one tuple for all matrices together, or a tuple for each."""


class Leaf(NamedTuple):
    """A leaf before its refresh."""

    gradient: Float[Array, "*shape"]
    bases: Bases
    moments: Moments  # ((),) if they are not carried over
    due: Bool[Array, "*batch"]
    path: UInt32[Array, ""]  # the number of its path
    recovery: Any  # what the way back remembers, if it has a history; else ()


class Refreshed(NamedTuple):
    """A leaf after its refresh."""

    bases: Bases
    moments: Moments
    happened: Bool[Array, " matrices"]
    similarities: Float[Array, " matrices"]  # of new bases to the old ones, the mean over sides


@dataclasses.dataclass(frozen=True)
class Refresh:
    """How a leaf is refreshed; fixed when the program is compiled.

    Attributes:
        projection: The leaf's projection.
        find: Finds a basis of one gradient `(n, m)`, the projected side first.
        carry_over: What becomes of the moments; None leaves them.
        similarity: Compares the new basis with the old one; None does not.
        sum_over: Mesh axes along which each device has a summand of the gradient.
        history: Columns beside the gradient's, from what the way back remembers and a basis.
    """

    projection: Projection
    find: FindSubspace
    carry_over: CarryOver | None
    similarity: Similarity | None
    sum_over: tuple[str, ...] = ()
    history: Callable[[Any, Array], Array] | None = None

    def __call__(self, leaves: Sequence[Leaf], key: Array, first: Array) -> list[Refreshed]:
        """Refreshes each leaf; see `refresh`.

        A loop: XLA took six minutes to compile the refreshes of 224 leaves one after the other.
        """
        if len(leaves) == 1:
            return [self._leaf(leaves[0], key, first)]
        gradients = [partial(jnp.asarray, leaf.gradient) for leaf in leaves]

        def loop() -> list[Refreshed]:
            # Gradients are not stacked: there is a copy of one at a time.
            stacks = jax.tree.map(lambda *xs: jnp.stack(xs), *[leaf[1:] for leaf in leaves])

            def body(i: Array, made: Refreshed) -> Refreshed:
                parts = made.bases, made.moments, *stacks[2:]
                leaf = Leaf(jax.lax.switch(i, gradients), *jax.tree.map(itemgetter(i), parts))
                return jax.tree.map(
                    lambda xs, x: xs.at[i].set(x), made, self._leaf(leaf, key, first)
                )

            none = jnp.zeros_like(stacks[2], jnp.float32).reshape(len(leaves), -1)
            start = Refreshed(stacks[0], stacks[1], none > 0, none)
            made = jax.lax.fori_loop(0, len(leaves), body, start)
            return [jax.tree.map(itemgetter(i), made) for i in range(len(leaves))]

        due = [jnp.any(leaf.due) for leaf in leaves]
        return jax.lax.cond(
            functools.reduce(operator.or_, due), loop, lambda: [self._stay(leaf) for leaf in leaves]
        )

    def _leaf(self, leaf: Leaf, key: Array, first: Array) -> Refreshed:
        gradient, bases, moments, due, path, recovery = leaf
        if not self.projection.modes:  # no axis is longer than the rank: there is no basis
            return self._stay(leaf)._replace(happened=due.reshape(-1))
        view, number = self.projection.view, self.projection.matrices

        def single() -> Refreshed:
            own = view.to_stack(gradient), (bases, moments[0]), recovery
            (new, carried), found, similar = self._search(
                *own, partial(for_matrix, key, path, first)
            )
            return Refreshed(new, (carried,), found[None], similar[None])

        def stack() -> Refreshed:
            gradients, shape = view.to_stack(gradient), view.batch_shape
            stacks = bases, self._stacked(moments)

            def body(i: Array, carry: Any) -> Any:
                own = partial(_matrix_of, i=i, batch_shape=shape)
                stacks, found, similar = carry
                # Everything is read outside the conditional: with collectives in it, which send a
                # matrix of a sharded stack, devices waited forever (jaxlib 0.10, CPU).
                mine = own(gradients), jax.tree.map(own, stacks), jax.tree.map(own, recovery)
                drawn = partial(for_matrix, key, path, first + i)
                new, happened, similarity = self._matrix(*mine, own(due), drawn)
                at = _place(i, shape)
                stacks = jax.tree.map(lambda b, x: b.at[at].set(x), stacks, new)
                return stacks, found.at[i].set(happened), similar.at[i].set(similarity)

            none = jnp.zeros_like(due, jnp.float32).reshape(-1)
            (new, carried), found, similar = jax.lax.fori_loop(
                0, number, body, (stacks, none > 0, none)
            )
            return Refreshed(new, self._unstacked(carried, len(moments)), found, similar)

        made = stack if view.batch_axes else single
        return jax.lax.cond(jnp.any(due), made, lambda: self._stay(leaf))

    def _stay(self, leaf: Leaf) -> Refreshed:
        none = jnp.zeros_like(leaf.due, jnp.float32).reshape(-1)
        bases, moments = kept_in_place((leaf.bases, leaf.moments))
        return Refreshed(bases, moments, none > 0, none)

    def _matrix(
        self,
        gradient: Float[Array, "*sizes"],
        state: Any,
        recovery: Any,
        due: Array,
        key_of: Callable[[int], PRNGKeyArray],
    ) -> tuple[Any, Array, Array]:
        """As `_search` if it is due."""

        def search() -> tuple[Any, Array, Array]:
            return self._search(gradient, state, recovery, key_of)

        # Not under `vmap`, which would make it a select, and compute every basis at every step.
        return jax.lax.cond(due, search, lambda: (state, due, jnp.zeros_like(due, jnp.float32)))

    def _search(
        self,
        gradient: Float[Array, "*sizes"],
        state: Any,
        recovery: Any,
        key_of: Callable[[int], PRNGKeyArray],
    ) -> tuple[Any, Array, Array]:
        """Of one matrix new bases and moments, whether they are new, and the similarity.

        `key_of` has a key for each side.
        """
        bases, moments = state
        old = dequantized(bases)
        pairs = [
            refreshed(
                self.find,
                self._columns(unfold(gradient, mode), recovery, basis),
                basis,
                key_of(mode),
                self.sum_over,
            )
            for mode, basis in zip(self.projection.modes, old, strict=True)
        ]
        found = jnp.all(jnp.array([ok for _, ok in pairs]))
        new = tuple(stored_like(p[0], basis) for p, basis in zip(pairs, bases, strict=True))
        new = jax.tree.map(partial(jnp.where, found), new, bases)
        change = list(zip(old, dequantized(new), strict=True))
        carried = self._carried(gradient, change, max(map(_rounding, bases)), found, moments)
        return (new, carried), found, self._similarity(change, found)

    def _columns(
        self, gradient: Float[Array, "n m"], recovery: Any, basis: Float[Array, "n r"]
    ) -> Float[Array, "n k"]:
        if self.history is None:
            return gradient
        past = self.history(recovery, basis)
        return jnp.concatenate([gradient.astype(past.dtype), past], axis=1)

    def _similarity(self, change: Sequence[tuple[Array, Array]], found: Array) -> Float[Array, ""]:
        if self.similarity is None:
            return jnp.zeros_like(found, jnp.float32)
        wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in change]
        return jnp.mean(jnp.array([self.similarity(a, b) for a, b in wide], jnp.float32))

    def _carried(
        self,
        gradient: Array,
        change: Sequence[tuple[Array, Array]],
        rounding: float,
        found: Array,
        moments: tuple[Any, ...],
    ) -> tuple[Any, ...]:
        carry_over = self.carry_over
        if carry_over is None:
            return moments

        def carry() -> tuple[Any, ...]:
            if carry_over.rule == "reset":
                small = projected(gradient, self.projection.modes, [new for _, new in change])
                small = sum_of_all(small, self.sum_over)
                return carry_over((), moments, small)
            turns = [transition(*pair, rounding) for pair in change]
            return carry_over(turns, moments)

        return jax.lax.cond(found, carry, lambda: moments)

    def _stacked(self, moments: Moments) -> tuple[Any, ...]:
        """The moments of all matrices, with the axes of the stack first."""
        if self.projection.together:
            return moments[0]
        shape = self.projection.view.batch_shape
        return jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*shape, *xs[0].shape), *moments)

    def _unstacked(self, moments: tuple[Any, ...], count: int) -> Moments:
        """The inverse of `_stacked`."""
        if self.projection.together or not moments:
            return (moments,) * count
        shape = self.projection.view.batch_shape
        return tuple(jax.tree.map(itemgetter(i), moments) for i in np.ndindex(*shape))


# Jitted, since outside of jit every conditional would be compiled again at every call.
@partial(jax.jit, static_argnums=0)
def refresh(
    how: Refresh, leaves: Sequence[Leaf], key: PRNGKeyArray, first: Int[Array, ""]
) -> list[Refreshed]:
    """Refreshes the matrices that are due, of leaves of equal shape; costs nothing on other steps.

    A matrix has a key of its own, from the step's, its leaf's path and its index. Indices start at
    `first`, which is not 0 if other layers are before.
    """
    leaves, none = varying_alike(leaves, how.sum_over), PartitionSpec()
    out = [Refreshed._make((specs(leaf.bases), specs(leaf.moments), none, none)) for leaf in leaves]
    return with_automatic_axes(how, lambda _: out, leaves, key, first)


def check_subspace(find: FindSubspace, plans: Plans) -> None:
    """Refuses a user's function that does not find bases of the right shape."""
    for plan in filter(None, plans):
        for mode, rank in zip(plan.modes, plan.ranks, strict=True):
            n = plan.view.sizes[mode]
            gradient = jax.ShapeDtypeStruct((n, math.prod(plan.view.sizes) // n), jnp.float32)
            basis = jax.ShapeDtypeStruct((n, rank), jnp.float32)
            checks.gives(find, "subspace", (gradient, basis, jax.random.key(0)), basis)


def _rounding(basis: Any) -> float:
    """How far the share of a direction that a stored basis covers may be off 1."""
    if is_quantized(basis):
        return 0.1 if basis.code.bits == 4 else ROUNDING
    return ROUNDING if basis.dtype.itemsize < 4 else 0.0


def _matrix_of(stack: Shaped[Array, "..."], i: Int[Array, ""], batch_shape: Any) -> Array:
    """Matrix `i` of a stack, as a gather: where the stack is sharded XLA sends that one matrix.

    A dynamic slice (`stack[i]`) would have it send all of them.
    """
    return stack[_place(jnp.asarray(i)[None], batch_shape)][0]


def _place(i: Int[Array, "*k"], batch_shape: tuple[int, ...]) -> tuple[Array, ...]:
    """As `jnp.unravel_index`, without its divisions for an index in range of a single axis."""
    return (i,) if len(batch_shape) == 1 else jnp.unravel_index(i, batch_shape)
