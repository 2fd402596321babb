"""When to look for a new subspace, and the exchange: every `update_proj_gap` steps (GaLore,
algorithm 2), the moments carried over to the new basis.

A refresh stays due until a finite, non-zero gradient performs it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from galore_optax.moments import CarryOver
from galore_optax.projection import Projection
from galore_optax.subspace import FindSubspace, refreshed

Bases = tuple[Array, ...]
Moments = tuple[tuple[Array, ...], ...]


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
    keys: PRNGKeyArray,
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
        keys: Randomness of this step for each matrix, `projection.keys(...)`.

    Returns:
        The bases, the moments, and the steps from which the next refreshes are due.
    """

    def matrix(
        gradient: Callable[[int], Float[Array, "n m"]],
        bases: Bases,
        due: Array,
        gap: Array,
        key: PRNGKeyArray,
    ) -> tuple[Bases, Array]:
        def search() -> tuple[Bases, Array]:
            pairs = [
                refreshed(find, gradient(mode), basis, jax.random.fold_in(key, mode), kept)
                for mode, basis in zip(projection.modes, bases, strict=True)
            ]
            found = jnp.all(jnp.array([ok for _, ok in pairs]))
            new = tuple(jnp.where(found, b, old) for (b, _), old in zip(pairs, bases, strict=True))
            return new, jnp.where(found, count + gap, due)

        return jax.lax.cond(count >= due, search, lambda: (bases, due))

    def carried(old: Bases, new: Bases, found: Array, moments: tuple[Array, ...]):
        if carry_over is None:
            return moments
        return jax.lax.cond(found, lambda: carry_over(old, new, moments), lambda: moments)

    def single() -> tuple[Bases, Moments, Array]:
        new, following = matrix(
            lambda mode: projection.unfolded(grad, mode), bases, due, gaps, keys[0]
        )
        return new, (carried(bases, new, following != due, moments[0]),), following

    def stack() -> tuple[Bases, Moments, Array]:
        def flat(x: Array) -> Array:
            return x.reshape(-1, *x.shape[len(projection.view.batch_axes) :])

        gradients = {mode: flat(projection.unfolded(grad, mode)) for mode in projection.modes}
        old, flat_due, flat_gaps = tuple(flat(basis) for basis in bases), flat(due), flat(gaps)

        def body(i: Array, state: tuple[Bases, Array]) -> tuple[Bases, Array]:
            present, dues = state
            new, following = matrix(
                lambda mode: gradients[mode][i],
                tuple(basis[i] for basis in present),
                dues[i],
                flat_gaps[i],
                keys[i],
            )
            pairs = zip(present, new, strict=True)
            return tuple(basis.at[i].set(b) for basis, b in pairs), dues.at[i].set(following)

        new, dues = jax.lax.fori_loop(0, projection.matrices, body, (old, flat_due))
        turned = tuple(
            carried(
                tuple(basis[i] for basis in old),
                tuple(basis[i] for basis in new),
                dues[i] != flat_due[i],
                own,
            )
            for i, own in enumerate(moments)
        )
        shaped = tuple(b.reshape(basis.shape) for b, basis in zip(new, bases, strict=True))
        return shaped, turned, dues.reshape(due.shape)

    change = stack if projection.view.batch_axes else single
    return jax.lax.cond(jnp.any(count >= due), change, lambda: (bases, moments, due))
