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
from galore_optax.projection.leaf import Bases, Plans, Projection, unfold
from galore_optax.projection.moments import CarryOver, transition
from galore_optax.projection.schedule import Similarity
from galore_optax.projection.subspace import FindSubspace, refreshed
from galore_optax.quantization.array import dequantized, stored_like
from galore_optax.sharding import specs, with_automatic_axes

Moments = tuple[tuple[Any, ...], ...]
"""For each matrix its moments in the inner's state."""
Change = tuple[tuple[Float[Array, "r r"], ...], Float[Array, ""]]
"""The transitions from old bases to new ones, if moments are carried over, and their similarity."""


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
    """

    projection: Projection
    find: FindSubspace
    carry_over: CarryOver | None
    similarity: Similarity | None

    def __call__(
        self, gradient: Array, bases: Bases, moments: Moments, due: Array, key: Array, first: Array
    ) -> Refreshed:
        """Of a leaf; see `refresh`."""
        view, number = self.projection.view, self.projection.matrices

        def single() -> Refreshed:
            matrix = view.to_stack(gradient)
            new, (turns, similar), found = self._matrix(matrix, bases, due, key, first)
            carried = self._carried(turns, found, moments[0])
            return Refreshed(new, (carried,), found[None], similar[None])

        def stack() -> Refreshed:
            gradients, shape = view.to_stack(gradient), view.batch_shape

            def body(i: Array, state: Any) -> Any:
                # Transitions are kept, not the old bases, so that new ones can take their place.
                own = partial(_matrix_of, i=i, batch_shape=shape)
                stacks, changes, found = state
                # The gradient is read beside the condition: with the collectives that send a matrix
                # of a sharded stack in it, devices waited forever (jaxlib 0.10, CPU).
                mine = own(gradients), jax.tree.map(own, stacks), own(due)
                new, change, happened = self._matrix(*mine, key, first + i)
                at = jnp.unravel_index(i, shape)
                stacks = jax.tree.map(lambda b, x: b.at[at].set(x), stacks, new)
                changes = jax.tree.map(lambda c, x: c.at[i].set(x), changes, change)
                return stacks, changes, found.at[i].set(happened)

            none = self._no_change(jax.tree.map(lambda b: b[(0,) * len(shape)], bases))
            changes = jax.tree.map(lambda c: jnp.zeros((number, *c.shape), c.dtype), none)
            start = bases, changes, jnp.zeros(number, bool)
            new, (turns, similar), found = jax.lax.fori_loop(0, number, body, start)
            carried = (
                self._carried(tuple(turn[i] for turn in turns), found[i], own)
                for i, own in enumerate(moments)
            )
            return Refreshed(new, tuple(carried), found, similar)

        def stay() -> Refreshed:
            none = jnp.zeros(number, jnp.float32)
            return Refreshed(bases, moments, none > 0, none)

        return jax.lax.cond(jnp.any(due), stack if view.batch_axes else single, stay)

    def _matrix(
        self, gradient: Float[Array, "*sizes"], bases: Bases, due: Array, key: Array, index: Array
    ) -> tuple[Bases, Change, Array]:
        """Of one matrix the new bases, what they are to the old, and whether they are new."""

        def search() -> tuple[Bases, Change, Array]:
            own, old = jax.random.fold_in(key, index), dequantized(bases)
            pairs = [
                refreshed(self.find, unfold(gradient, mode), basis, jax.random.fold_in(own, mode))
                for mode, basis in zip(self.projection.modes, old, strict=True)
            ]
            found = jnp.all(jnp.array([ok for _, ok in pairs]))
            new = tuple(stored_like(p[0], basis) for p, basis in zip(pairs, bases, strict=True))
            new = jax.tree.map(partial(jnp.where, found), new, bases)
            return new, self._change(old, dequantized(new)), found

        def stay() -> tuple[Bases, Change, Array]:
            return bases, self._no_change(bases), jnp.array(False)

        # Not under `vmap`, which would make it a select, and compute every basis at every step.
        return jax.lax.cond(due, search, stay)

    def _change(self, old: Sequence[Any], new: Sequence[Any]) -> Change:
        pairs = list(zip(old, new, strict=True))
        turns = () if self.carry_over is None else tuple(transition(a, b) for a, b in pairs)
        if self.similarity is None:
            return turns, jnp.zeros((), jnp.float32)
        wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
        return turns, jnp.mean(jnp.array([self.similarity(a, b) for a, b in wide], jnp.float32))

    def _no_change(self, bases: Bases) -> Change:
        floats = jax.eval_shape(dequantized, bases)
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(self._change, floats, floats))

    def _carried(self, turns: Any, found: Array, moments: tuple[Any, ...]) -> tuple[Any, ...]:
        carry_over = self.carry_over
        if carry_over is None:
            return moments
        return jax.lax.cond(found, lambda: carry_over(turns, moments), lambda: moments)


# Compiled on its own, since outside of jit every conditional would be compiled anew at every call.
@partial(jax.jit, static_argnums=0)
def refresh(
    how: Refresh,
    gradient: Float[Array, "*shape"],
    bases: Bases,
    moments: Moments,
    due: Bool[Array, "*batch"],
    key: PRNGKeyArray,
    first: Int[Array, ""],
) -> Refreshed:
    """Refreshes the matrices of a leaf that are due; costs nothing on other steps.

    Moments that are not carried over are `()` for each matrix. Into the key of leaf and step, each
    matrix's index is folded, from `first` on: not 0 if other layers are before.
    """
    none = PartitionSpec()
    out = Refreshed._make((specs(bases), specs(moments), none, none))
    return with_automatic_axes(how, lambda _: out, gradient, bases, moments, due, key, first)


def check_subspace(find: FindSubspace, plans: Plans) -> None:
    """Refuses a user's function that does not find bases of the right shape."""
    for plan in filter(None, plans):
        for mode, rank in zip(plan.modes, plan.ranks, strict=True):
            n = plan.view.sizes[mode]
            gradient = jax.ShapeDtypeStruct((n, math.prod(plan.view.sizes) // n), jnp.float32)
            basis = jax.ShapeDtypeStruct((n, rank), jnp.float32)
            checks.gives(find, "subspace", (gradient, basis, jax.random.key(0)), basis)


def _matrix_of(stack: Shaped[Array, "..."], i: Int[Array, ""], batch_shape: Any) -> Array:
    """Matrix `i` of a stack, as a gather: where the stack is sharded XLA sends that one matrix.

    A dynamic slice (`stack[i]`) would have it send all of them.
    """
    return stack[jnp.unravel_index(i[None], batch_shape)][0]
