"""An optax transformation whose update can be made in parts, for microbatches.

A projection is linear: Σ PᵀGᵢ = Pᵀ ΣGᵢ. A sum of projected gradients takes rank / min(in, out) of
the memory of a gradient.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import optax

from galore_optax import checks
from galore_optax.params import with_updates, with_variables
from galore_optax.sharding import sum_of_all

OBSERVER: ContextVar[Callable[[Any, optax.Params], None]]
"""Is told in `init` what a `galore` decided (an `InnerCall`) for the params."""
OBSERVER = ContextVar("observer", default=lambda call, params: None)
_NOBODY = OBSERVER.get()


@contextlib.contextmanager
def observed(observer: Callable[[Any, optax.Params], None]) -> Iterator[None]:
    """Sets the observer of every `init` within it."""
    token = OBSERVER.set(observer)
    try:
        yield
    finally:
        OBSERVER.reset(token)


def is_observed() -> bool:
    """Whether there is an observer, for which warnings are repeated that were given before."""
    return OBSERVER.get() is not _NOBODY


@runtime_checkable
class SubspaceParts(Protocol):
    """The parts of an update in a subspace.

    `updates, state = tx.update(gradient, state, params)` is the same as

        parts = subspace_parts(tx)
        state = parts.refresh(gradient, state, params)
        projected = parts.project(gradient, state)
        updates, state = parts.update_projected(projected, state, params)

    The first two parts may be called for one microbatch after the other: a refresh that is due is
    made by the first gradient that can make it. A step counts where it is finished, in the third.

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

    @property
    def sum_over(self) -> tuple[str, ...]:
        """Mesh axes over which to sum what `project` gives, which is this device's summand."""
        ...

    @property
    def needs_gradient(self) -> bool:
        """Whether an update from a projected gradient needs the gradient, too."""

    def is_due(self, state: Any) -> Any:
        """Whether a refresh of any matrix is due, a boolean scalar."""

    def refresh(
        self, gradient: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        """The state with new bases where they are due; needs params only if moments are reset.

        With the extra argument `allowed`, a boolean scalar that is false, nothing is refreshed.
        """

    def project(self, gradient: optax.Updates, state: Any) -> optax.Updates:
        """The projected gradient: R at a projected leaf, a tuple of them for a stack."""

    def update_projected(
        self,
        projected: optax.Updates,
        state: Any,
        params: optax.Params,
        *,
        gradient: optax.Updates | None = None,
        factored: bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        """Updates and the new state, from a projected gradient or a sum of such.

        Those that are `factored` (`tx.update` has the same extra argument) may be no arrays, but
        objects that only `galore_optax.apply_updates` takes, to apply them to these params in the
        same trace: a GPU then adds P N to weights of 8 or 16 bits while it makes it. With
        `needs_gradient` a ValueError if the gradient is not given.
        """


def transformation(owner: Any) -> optax.GradientTransformationExtraArgs:
    """A plain optax transformation of an object's methods `init` and `update`."""
    return optax.GradientTransformationExtraArgs(owner.init, owner.update)


def without_refresh(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`galore` or a recipe of it, for steps in which no refresh is due, with the same state.

    A program for such steps has no conditionals, and a GPU overwrites the state without copying it.
    A refresh that is due stays due.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import galore, subspace_parts, without_refresh
        >>> params = grads = {"w": jnp.ones((64, 256))}
        >>> tx = galore(8, inner=optax.adamw(1e-2), update_proj_gap=200)
        >>> state = tx.init(params)
        >>> bool(subspace_parts(tx).is_due(state))
        True
        >>> updates, state = tx.update(grads, state, params)
        >>> bool(subspace_parts(tx).is_due(state))
        False
        >>> updates, state = without_refresh(tx).update(grads, state, params)
    """
    parts = subspace_parts(tx)
    if parts is None:
        raise ValueError(
            f"tx={checks.said(tx)} has no subspace: give galore(...), or a recipe such as "
            "galore_adamw(...)"
        )
    return transformation(_WithoutRefresh(tx, parts))


class _WithoutRefresh:
    """The transformation, with `SubspaceParts`."""

    def __init__(self, tx: optax.GradientTransformation, parts: SubspaceParts):
        self.init, self._parts = tx.init, parts
        self.project, self.update_projected = parts.project, parts.update_projected
        self.needs_gradient, self.sum_over = parts.needs_gradient, parts.sum_over

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        """The update of the parts."""
        if params is None:
            raise ValueError("params: they are needed for an update without a refresh; give them")
        own = with_updates(params, updates)
        projected = sum_of_all(self.project(updates, state), self.sum_over)
        new, state = self.update_projected(projected, state, own, gradient=updates, **extra_args)
        return with_variables(new, updates), state

    def is_due(self, state: Any) -> Any:
        """Whether a refresh is due, which is not made here."""
        return self._parts.is_due(state)

    def refresh(self, gradient: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        """The state as it is."""
        return state


def refreshes(tx: optax.GradientTransformation) -> bool:
    """Whether `tx` has a subspace, and refreshes it."""
    parts = subspace_parts(tx)
    return parts is not None and not isinstance(parts, _WithoutRefresh)


def subspace_parts(tx: optax.GradientTransformation) -> SubspaceParts | None:
    """The parts of the update of `galore` or one of its recipes; None if `tx` has no subspace.

    A transformation around it, such as `optax.chain`, has no parts; `unstacked` hands them on.
    """
    checks.instance(tx, "tx", optax.GradientTransformation)
    owner = getattr(tx.update, "__self__", None)
    return owner if isinstance(owner, SubspaceParts) else None
