"""A transformation in a subspace, whose update can be made in parts."""

from collections.abc import Callable
from typing import Any

import optax


class SubspaceTransformation(optax.GradientTransformationExtraArgs):
    """A transformation in a subspace, whose update can be made in parts.

    `updates, state = tx.update(gradient, state, params)` is the same as

        state = tx.refresh(gradient, state, params)
        projected = tx.project(gradient, state)
        updates, state = tx.update_projected(projected, state, params)

    A step counts where it is finished, in the third part. A refresh that is due is made by the
    first gradient that can make it, and is not due any more then: the first two parts may be called
    for one microbatch after the other.

    Attributes:
        refresh: From a gradient, the state and params (None will do where no moments are reset) to
            the state with new bases where they are due. Extra arguments: `layer` and `layers`, as
            the update's.
        project: From a gradient and the state to the projected gradient, of which sums can be
            taken: R at a projected leaf, of a stack of matrices a tuple of them, and other leaves
            as they are.
        update_projected: From the projected gradient, the state, the params and the update's extra
            arguments to updates and new state.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import galore
        >>> params = {"w": jnp.ones((64, 256)), "b": jnp.zeros(256)}
        >>> tx = galore(8, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
        >>> state, total = tx.init(params), None
        >>> for x in jax.random.normal(jax.random.key(0), (4, 16, 64)):  # four microbatches
        ...     grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2) / 4)(params)
        ...     state = tx.refresh(grads, state)
        ...     projected = tx.project(grads, state)
        ...     total = projected if total is None else jax.tree.map(jnp.add, total, projected)
        >>> total["w"].shape, total["b"].shape
        ((8, 256), (256,))
        >>> updates, state = tx.update_projected(total, state, params)
        >>> params = optax.apply_updates(params, updates)
    """

    refresh: Callable[..., Any]
    project: Callable[..., Any]
    update_projected: Callable[..., Any]

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        refresh: Callable[..., Any],
        project: Callable[..., Any],
        update_projected: Callable[..., Any],
    ) -> "SubspaceTransformation":
        """From a transformation's two functions and the three parts of its update."""
        self = super().__new__(cls, init, update)
        self.refresh, self.project, self.update_projected = refresh, project, update_projected
        return self
