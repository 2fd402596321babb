"""What `galore` needs to know about its inner transformation, and the inner's update.

The inner runs on projected gradients and is given projected weights PᵀW as its params. Which leaves
of its state are moments, and what it does with params, is read from its traced functions
(`galore_optax.trace`).
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax.projection.leaf import Projection
from galore_optax.projection.moments import (
    MomentsFunction,
    MomentsOf,
    check_rule,
    moments_of,
    moving_axes,
    small_leaves,
)
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.sharding import first_element
from galore_optax.trace.params_use import (
    acts_within_subspace,
    decoupled_decay,
    remembers_params,
)
from galore_optax.trace.roles import Role, state_roles
from galore_optax.trace.traced import Traced, trace

DEFAULT_MOMENTS = "rotate"

Plans = Sequence[Projection | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Inner:
    """An inner transformation, and how `galore` is to treat it.

    Attributes:
        tx: The transformation.
        moments: What becomes of its moments at a refresh: galore's argument of that name.
        decay: Whether its use of params is decoupled weight decay; None finds out.
    """

    tx: optax.GradientTransformationExtraArgs
    moments: str | MomentsFunction | None
    decay: bool | None
    # A pure function of the shapes, kept from call to call.
    _roles: dict[Any, list[Role]] = dataclasses.field(default_factory=dict)

    @property
    def rule(self) -> str | MomentsFunction:
        """What becomes of moments at a refresh."""
        return DEFAULT_MOMENTS if self.moments is None else self.moments

    def traced(
        self, small: Callable[[], optax.Params], state: optax.OptState, extra_args: dict[str, Any]
    ) -> Callable[[], Traced]:
        """The traced functions, when they are first asked for; a quantized state counts as floats.

        Args:
            small: Returns the projected params, or what has their shapes.
            state: The inner's state.
            extra_args: Those of the update.
        """

        def trace_once() -> Traced:
            floats = jax.eval_shape(dequantized, state)
            return trace(self.tx, jax.eval_shape(small), floats, **extra_args)

        return functools.cache(trace_once)

    def moments_of(
        self,
        small: optax.Params,
        state: optax.OptState,
        plans: Plans,
        traced: Callable[[], Traced],
    ) -> MomentsOf:
        """Where the moments of each matrix lie in the state.

        Raises:
            ValueError: If the update cannot be traced, since it needs extra arguments.
        """
        return moments_of(self._state_roles(small, state, plans, traced), state, small, plans)

    def _state_roles(
        self,
        small: optax.Params,
        state: optax.OptState,
        plans: Plans,
        traced: Callable[[], Traced],
    ) -> list[Role]:
        leaves, tree = jax.tree.flatten((small, state))
        known = tree, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if known not in self._roles:
            if traced().update is None:
                raise ValueError(
                    "inner: its update needs extra arguments, without which it is not known how "
                    'its moments are carried over; pass them, or choose moments="keep"'
                )
            self._roles[known] = state_roles(traced(), moving_axes(plans))
        return self._roles[known]

    def update(
        self,
        small: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None,
        traced: Callable[[], Traced],
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, optax.OptState, optax.Params | None]:
        """The inner's update, with its decoupled weight decay taken out of it.

        Args:
            small: The projected gradient.
            state: The state.
            params: The projected params; None if they are not known.
            traced: From `traced`.
            extra_args: Those of the update.

        Returns:
            The projected updates, the new state, and for each leaf minus the learning rate times
            the decay (None where there is none); None in all if there is no decoupled decay.
        """
        slopes = None
        if params is not None and self.decay is not False:
            found = decoupled_decay(traced(), check=self.decay is None)
            if found is not None:
                leaves, tree = jax.tree.flatten(params)
                states = jax.tree.leaves(dequantized(state))
                made = found.at(jax.tree.leaves(small), states, leaves)
                slopes = tree.unflatten([None if s is None else first_element(s) for s in made])
                params = optax.tree.zeros_like(params)
        return *self.tx.update(small, state, params, **extra_args), slopes

    def check(self, small: optax.Params, state: optax.OptState, plans: Plans) -> None:
        """Refuses what cannot run in a subspace, and warns of what acts otherwise than outside.

        Raises:
            ValueError: If the state remembers params and `moments` does not say what to do, or its
                moments cannot be told apart.
        """
        if self.rule == "keep" and self.decay is not None:
            return
        traced = self.traced(lambda: small, state, {})
        counts = [plans[i] is not None for i, _ in small_leaves(plans)]
        remembers = remembers_params(traced(), counts)
        if self.moments is None and remembers:
            raise ValueError(
                "inner: its state remembers the params, projected into the present subspace, which "
                "mean nothing in the next one; choose with moments= what becomes of them: "
                '"reset" starts again from the present params at every refresh, "keep" leaves them '
                "as they are"
            )
        undecided = not remembers and self.decay is None and decoupled_decay(traced()) is None
        if undecided and acts_within_subspace(traced(), counts):
            _warn(
                "galore: inner uses params elementwise, and not as decoupled weight decay: this "
                "acts on the projected weights only, so that weight decay does not reach the whole "
                "matrix; decoupled_decay=True takes it for decoupled decay, decoupled_decay=False "
                "says that it is meant"
            )
        if self.rule == "keep" or traced().update is None:
            return
        roles = self._state_roles(small, state, plans, traced)
        pairs = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
        for (path, _), role in zip(pairs, roles, strict=True):
            name = jax.tree_util.keystr(path)
            if role.shared:
                raise ValueError(
                    f"inner: its state {name} merges the moments of several params, which cannot "
                    'be told apart when a basis changes; choose moments="keep"'
                )
            if role.unclear and self.rule != "reset":
                _warn(
                    f"galore: it is not known how the inner's state {name} follows the gradient's "
                    "coordinates; it stays as it is when a basis changes; choose with moments= "
                    "what becomes of it"
                )
        if callable(self.rule):
            leaves = jax.tree.leaves(state, is_leaf=is_quantized)
            check_rule(self.rule, leaves, moments_of(roles, state, small, plans), plans)


def decay(
    slope: Any, projection: Projection | None, leaf: Float[Array, "*shape"]
) -> Float[Array, "*shape"] | None:
    """Slope · W for one leaf; `slope` is one number or, for a stack, one for each matrix."""
    slopes = jax.tree.leaves(slope, is_leaf=lambda x: x is None)
    if all(s is None for s in slopes):
        return None
    if projection is None or not projection.view.batch_axes:
        return slope * leaf
    view = projection.view
    factors = jnp.stack([jnp.zeros([], leaf.dtype) if s is None else s for s in slopes])
    others = [axis for axis in range(leaf.ndim) if axis not in view.batch_axes]
    return jnp.expand_dims(factors.reshape(view.batch_shape), others) * leaf


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)
