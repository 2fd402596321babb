"""An optax transformation whose update can be made in parts, for microbatches.

A projection is linear: Σ PᵀGᵢ = Pᵀ ΣGᵢ. A sum of projected gradients takes rank / min(in, out) of
the memory of a gradient.
"""

from typing import Any, Protocol, runtime_checkable

import optax


@runtime_checkable
class SubspaceParts(Protocol):
    """The parts of an update in a subspace.

    `updates, state = tx.update(gradient, state, params)` is the same as

        parts = subspace_parts(tx)
        state = parts.refresh(gradient, state, params)
        projected = parts.project(gradient, state)
        updates, state = parts.update_projected(projected, state, params)

    A step counts where it is finished, in the third part. A refresh that is due is made by the
    first gradient that can make it, and is not due any more then: the first two parts may be called
    for one microbatch after the other.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import galore, subspace_parts
        >>> params = {"w": jnp.ones((64, 256)), "b": jnp.zeros(256)}
        >>> tx = galore(8, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
        >>> state, total, parts = tx.init(params), None, subspace_parts(tx)
        >>> for x in jax.random.normal(jax.random.key(0), (4, 16, 64)):  # four microbatches
        ...     grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2) / 4)(params)
        ...     state = parts.refresh(grads, state)
        ...     projected = parts.project(grads, state)
        ...     total = projected if total is None else jax.tree.map(jnp.add, total, projected)
        >>> total["w"].shape, total["b"].shape
        ((8, 256), (256,))
        >>> updates, state = parts.update_projected(total, state, params)
        >>> params = optax.apply_updates(params, updates)
    """

    def refresh(
        self, gradient: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        """The state with new bases where they are due; needs params only if moments are reset."""
        ...

    def project(self, gradient: optax.Updates, state: Any) -> optax.Updates:
        """The projected gradient: R at a projected leaf, a tuple of them for a stack."""
        ...

    def update_projected(
        self, projected: optax.Updates, state: Any, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        """Updates and the new state, from a projected gradient or a sum of such."""
        ...


def transformation(owner: Any) -> optax.GradientTransformationExtraArgs:
    """A plain optax transformation of an object's methods `init` and `update`."""
    return optax.GradientTransformationExtraArgs(owner.init, owner.update)


def subspace_parts(tx: optax.GradientTransformation) -> SubspaceParts | None:
    """The parts of the update of `galore` or one of its recipes; None if `tx` has no subspace.

    A transformation around it, such as `optax.chain`, has no parts; `unstacked` hands them on.
    """
    owner = getattr(tx.update, "__self__", None)
    return owner if isinstance(owner, SubspaceParts) else None
