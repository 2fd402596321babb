"""When to look for a new subspace: every `update_proj_gap` steps (GaLore, algorithm 2).

A refresh stays due until a finite, non-zero gradient performs it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from galore_optax.projection import Projection
from galore_optax.subspace import FindSubspace, refreshed


# Compiled on its own, since outside of jit every conditional would be compiled anew at every call.
@partial(jax.jit, static_argnums=(0, 1, 2))
def refresh(
    projection: Projection,
    find: FindSubspace,
    gap: int,
    grad: Float[Array, "..."],
    basis: Float[Array, "*batch n r"],
    due: Int[Array, "*batch"],
    count: Int[Array, ""],
    keys: PRNGKeyArray,
) -> tuple[Float[Array, "*batch n r"], Int[Array, "*batch"]]:
    """New bases for the matrices of a leaf that are due one; costs nothing on other steps.

    A conditional inside a loop over the stack: under `vmap` it would become a select, which
    computes every basis at every step.

    Args:
        projection: How the leaf is projected.
        find: Finds a basis of one gradient `(n, m)`, the projected side first.
        gap: Steps between refreshes.
        grad: The leaf's gradient.
        basis: The present bases.
        due: The step from which each matrix's refresh is due.
        count: The present step.
        keys: Randomness of this step for each matrix, `projection.keys(...)`.

    Returns:
        The bases, and the steps from which the next refreshes are due.
    """
    following = (count // gap + 1) * gap

    def matrix(
        gradient: Callable[[], Float[Array, "n m"]], basis: Array, due: Array, key: PRNGKeyArray
    ) -> tuple[Array, Array]:
        def search() -> tuple[Array, Array]:
            new, found = refreshed(find, gradient(), basis, key)
            return new, jnp.where(found, following, due)

        return jax.lax.cond(count >= due, search, lambda: (basis, due))

    if not projection.view.batch_axes:
        return matrix(lambda: projection.oriented(grad), basis, due, keys[0])

    def stack() -> tuple[Array, Array]:
        gradients = projection.oriented(grad)
        gradients = gradients.reshape(-1, *gradients.shape[-2:])

        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            bases, dues = carry
            new, new_due = matrix(lambda: gradients[i], bases[i], dues[i], keys[i])
            return bases.at[i].set(new), dues.at[i].set(new_due)

        carry = basis.reshape(-1, *basis.shape[-2:]), due.reshape(-1)
        bases, dues = jax.lax.fori_loop(0, keys.shape[0], body, carry)
        return bases.reshape(basis.shape), dues.reshape(due.shape)

    return jax.lax.cond(jnp.any(count >= due), stack, lambda: (basis, due))
