"""The stages of `galore`'s update: refresh what is due, project, run the inner, project back."""

import dataclasses
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from galore_optax import checks, keys
from galore_optax.inner import Inner, InnerCall, with_stacks
from galore_optax.params import for_init, with_updates, with_variables, without_variables
from galore_optax.projection import schedule
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers
from galore_optax.projection.factored import project_back, with_decay
from galore_optax.projection.leaf import Plans, Projection, Rank, projections, warn_of_left_out
from galore_optax.projection.moments import CarryOver, Moment, MomentsOf, reset
from galore_optax.projection.recover import (
    Recover,
    check_states,
    first_states,
    history,
    recovered,
    remembers,
)  # fmt: skip
from galore_optax.projection.refresh import Leaf, Refresh, Refreshed, check_subspace, refresh
from galore_optax.projection.subspace import SUBSPACES, FindSubspace
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.sharding import sharded_like, sum_of_all, varying_alike
from galore_optax.transformation import OBSERVER


class GaLoreState(NamedTuple):
    """State of `galore`.

    Attributes:
        count: Updates done so far.
        bases: Like the params: at a projected leaf its orthonormal basis P, `(*batch, in, r)` where
            the left side is projected, `(*batch, out, r)` where the right side is, in the leaf's
            dtype, a tuple of them where both sides (or a tensor's axes) are, `()` where none is
            longer than the rank, each a `QuantizedArray` with `projection_bits`; at others
            `optax.MaskedNode`.
        next_refresh: For each matrix the step from which a refresh is due, leaf by leaf in the
            order of `jax.tree.leaves`; one entry if none is projected.
        refreshes: How many refreshes each matrix has had, in the same order.
        adaptation: The `Adaptation` of `Adaptive`; `()` without it.
        recovery: Like the bases: what `recover` remembers of each matrix; `()` if it does not.
        inner: The inner transformation's state for the projected params.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import galore
        >>> state = galore(8, optax.adam(1e-3)).init({"w": jnp.ones((64, 256)), "b": jnp.ones(3)})
        >>> state.bases["w"].shape, state.inner[0].mu["w"].shape, state.inner[0].mu["b"].shape
        ((64, 8), (8, 256), (3,))
    """

    count: ArrayLike  # int32 scalar
    bases: optax.Params
    next_refresh: Int[Array, " matrices"]
    refreshes: Int[Array, " matrices"]
    adaptation: schedule.Adaptation | tuple[()]
    recovery: Any
    inner: optax.OptState


@dataclasses.dataclass(frozen=True, eq=False)
class GaLore:
    """`galore` with its arguments, see there."""

    rank: Rank
    inner: Inner
    gap: schedule.RefreshGap
    scale: Any
    subspace: str | FindSubspace
    recover: Recover | None  # None: P N
    side: str
    numbers: WeightDimensionNumbers
    bits: int | None
    seed: Any
    sum_over: tuple[str, ...] = ()
    whole: bool = False  # whether sides that are no longer than the rank have no basis

    def init(self, params: optax.Params) -> GaLoreState:
        """The first state: bases are random, and every refresh is due."""
        schedule.check_schedule(self.gap)
        params = dequantized(for_init(params))
        leaves, tree = jax.tree.flatten(params)
        plans = projections(params, self.numbers, self.rank, self.side, self.whole)
        if callable(self.subspace):
            check_subspace(self.subspace, plans)
        warn_of_left_out(leaves, plans, self.numbers)
        bases: list[Any] = [optax.MaskedNode()] * len(leaves)
        for i, plan in enumerate(plans):
            if plan is not None:
                bases[i] = plan.random_bases(leaves[i], keys.of_seed(self.seed), self.bits)

        def call(plans: Plans) -> InnerCall:
            small = partial(_project, tree, plans, bases, leaves)
            return InnerCall(self.inner, small, None, plans, {})

        inner = with_stacks(plans, call)
        inner_state = self.inner.tx.init(inner.project())
        recovery = first_states(self.recover, plans, leaves, inner_state)
        if any(plans):
            inner.check(needs_descent=getattr(self.recover, "needs_descent", False))
            inner.warn_of_masks(params)
        OBSERVER.get()(inner, params)
        timing = schedule.first_timing(self.gap, sum(plan.matrices for plan in filter(None, plans)))
        # As after a refresh, which happens where gradients allow it.
        bases, timing, recovery, _ = varying_alike((bases, timing, recovery, leaves))
        return GaLoreState(
            count=jnp.zeros([], jnp.int32),
            bases=tree.unflatten(map(_stored, bases)),
            **timing,
            recovery=tree.unflatten(recovery) if remembers(self.recover) else (),
            inner=inner_state,
        )

    def update(
        self, updates: Any, state: GaLoreState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, GaLoreState]:
        """All stages."""
        call, grads = _Call(self, updates, state, params, **extra_args), jax.tree.leaves(updates)
        state = call.refresh(grads, state, in_groups=True)
        small = sum_of_all(call.project(grads, state), self.sum_over)
        steps, state = call.finish(small, state, grads, grads)
        return with_variables(steps, updates), state

    # The same in parts: `galore_optax.transformation.SubspaceParts`.

    @property
    def needs_gradient(self) -> bool:
        """Whether the way back uses the gradient itself."""
        return self.recover is not None

    def is_due(self, state: GaLoreState) -> Bool[Array, ""]:
        """Whether a refresh is due."""
        if not jax.tree.leaves(state.bases):
            return jnp.array(False)
        return jnp.any(state.count >= state.next_refresh)

    def refresh(
        self, gradient: Any, state: GaLoreState, params: Any = None, **extra_args: Any
    ) -> GaLoreState:
        """The state with new bases where they are due."""
        call = _Call(self, gradient, state, params, **extra_args)
        return call.refresh(jax.tree.leaves(gradient), state)

    def project(self, gradient: optax.Updates, state: GaLoreState) -> optax.Updates:
        """The projected gradient."""
        return _Call(self, gradient, state).project(jax.tree.leaves(gradient), state)

    def update_projected(
        self,
        projected: Any,
        state: GaLoreState,
        params: Any,
        *,
        gradient: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        """Updates and the new state, from a projected gradient."""
        if self.needs_gradient and gradient is None:
            raise ValueError(
                f"recover={checks.said(self.recover)} needs the gradient itself, and a sum of "
                'projected gradients is not one: give gradient=, or choose recover="project"'
            )
        params = dequantized(params)
        call, like = _Call(self, params, state, params, **extra_args), jax.tree.leaves(params)
        steps, state = call.finish(projected, state, like, jax.tree.leaves(gradient))
        return with_variables(steps, params), state


class _Call:
    """One call of a method of `GaLore`, with what is worked out once about its arguments."""

    def __init__(
        self,
        galore: GaLore,
        updates: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None = None,
        *,
        layer: ArrayLike = 0,
        layers: int = 1,
        matrices: Sequence[dict[str, int]] = (),
        allowed: ArrayLike = True,
        factored: bool = False,
        **extra_args: Any,
    ):
        self.galore, self.layer, self.factored = galore, layer, factored
        self.of_model = {"whole": matrices, "layer": layer, "layers": layers}
        self.allowed = allowed  # whether a refresh that is due may be made
        like, self.tree = jax.tree.flatten(without_variables(updates))
        self.weights = None
        if params is not None:
            # Plans are made from the params, as in `init`: gradients may have other dtypes.
            self.weights = like = dequantized(
                self.tree.flatten_up_to(with_updates(params, updates))
            )
        tree = self.tree.unflatten(like)
        bases = self.tree.flatten_up_to(state.bases)
        plans = projections(tree, galore.numbers, galore.rank, galore.side, galore.whole, bases)

        def call(plans: Plans) -> InnerCall:
            small = partial(_project, self.tree, plans, self.bases(state), like)
            return InnerCall(galore.inner, small, state.inner, plans, extra_args)

        schedule.check_adaptation(galore.gap, state.adaptation)
        check_states(galore.recover, plans, self.tree, state.recovery)
        self.inner = with_stacks(plans, call)
        self.plans = self.inner.plans

    def bases(self, state: GaLoreState) -> list[Any]:
        """The bases of each leaf, in a tuple."""
        bases = self.tree.flatten_up_to(state.bases)
        return [b if isinstance(b, tuple) else (b,) for b in bases]

    def project(self, leaves: Sequence[Array], state: GaLoreState) -> optax.Params:
        """R of each projected leaf, and the other leaves as they are."""
        return _project(self.tree, self.plans, self.bases(state), leaves)

    def refresh(
        self, grads: Sequence[Array], state: GaLoreState, in_groups: bool = False
    ) -> GaLoreState:
        """The state with new bases, moments and times of refreshes where refreshes are due.

        With `in_groups`, leaves of equal shape whose paths differ in numbers only (layers of a
        list) share one compiled refresh. The gradients of a group are then in memory at once, which
        summing projected microbatches is to avoid.
        """
        projected = [(i, plan) for i, plan in enumerate(self.plans) if plan is not None]
        if not projected:
            return state
        rule, bases, count = self.galore.inner.rule, self.bases(state), jnp.asarray(state.count)
        inner_leaves, inner_tree = jax.tree.flatten(state.inner, is_leaf=is_quantized)
        places: MomentsOf = {} if rule == "keep" else self.inner.moments()
        matrices = [plan.matrices for _, plan in projected]
        due = (count >= state.next_refresh) & self.allowed
        due = jnp.split(due, np.cumsum(matrices)[:-1])
        key = jax.random.fold_in(keys.of_seed(self.galore.seed), count)
        carried: MomentsOf = {i: [[]] for i, _ in projected} if rule == "keep" else places
        groups: dict[Any, dict[int, Leaf]] = {}
        past, remembered = history(self.galore.recover), [()] * len(self.plans)
        if past is not None:
            remembered = self.tree.flatten_up_to(state.recovery)
        for (i, plan), now in zip(projected, due, strict=True):
            leaf = Leaf(
                grads[i],
                bases[i],
                tuple(tuple(inner_leaves[moment.position] for moment in own) for own in carried[i]),
                now.reshape(plan.view.batch_shape),
                jnp.uint32(keys.number_of(plan.path)),
                remembered[i],
            )
            # Automatic axes are not in a type. Those of one path but for numbers are sharded alike.
            name = re.sub(r"\d+", "", plan.path) if in_groups else plan.path
            types = jax.tree.structure(leaf), tuple(map(jax.typeof, jax.tree.leaves(leaf)))
            same = self._how(plan, carried[i][0]), name, types
            groups.setdefault(same, {})[i] = leaf
        first = jnp.asarray(self.layer, jnp.int32)
        made: dict[int, Refreshed] = {}
        for (how, _, _), leaves in groups.items():
            new = refresh(how, list(leaves.values()), key, first * how.projection.matrices)
            made |= zip(leaves, new, strict=True)
        for i, leaf in made.items():
            bases[i] = leaf.bases
            for own, values in zip(carried[i], leaf.moments, strict=True):
                for moment, value in zip(own, values, strict=True):
                    inner_leaves[moment.position] = value
        happened = [made[i].happened for i, _ in projected]
        similarities = [made[i].similarities for i, _ in projected]
        own = {plan.path: plan.matrices for _, plan in projected}
        phases = partial(schedule.staggered_phases, own, **self.of_model)
        timing = schedule.next_timing(self.galore.gap, state, happened, similarities, phases)
        state = state._replace(bases=self.tree.unflatten(map(_stored, bases)), **timing)
        if rule == "reset":
            weights = grads if self.weights is None else self.weights

            def init() -> optax.OptState:
                return self.galore.inner.tx.init(self.project(weights, state))

            remembers = self.inner.remembers
            inner_leaves = reset(init, inner_leaves, places, self.plans, remembers, happened)
        return state._replace(inner=inner_tree.unflatten(inner_leaves))

    def _how(self, plan: Projection, moments: list[Moment]) -> Refresh:
        """How a leaf is refreshed, with the moments of each of its matrices."""
        gap, find = self.galore.gap, self.galore.subspace
        adaptive = isinstance(gap, schedule.Adaptive)
        return Refresh(
            projection=plan,
            find=SUBSPACES[find] if isinstance(find, str) else find,
            carry_over=CarryOver(plan, self.galore.inner.rule, tuple(moments)) if moments else None,
            similarity=schedule.SIMILARITIES[gap.similarity] if adaptive else None,
            sum_over=self.galore.sum_over,
            history=history(self.galore.recover),
        )

    def finish(
        self, small: optax.Updates, state: GaLoreState, like: Sequence[Array], grads: Sequence[Any]
    ) -> tuple[optax.Updates, GaLoreState]:
        """The inner's update, back in arrays `like` these, and whole matrices' decay."""
        params = None if self.weights is None else self.project(self.weights, state)
        small_steps, inner_state, slopes = self.inner.update(small, state.inner, params)
        steps = self.tree.flatten_up_to(small_steps)
        decays = [None] * len(steps) if slopes is None else self.tree.flatten_up_to(slopes)
        given = self.plans, like if self.weights is None else self.weights, decays
        if self.galore.recover is None:
            bases = self.bases(state)
            steps = project_back(steps, bases, self.galore.scale, *given, factored=self.factored)
        else:
            state = self._recovered(steps, self.tree.flatten_up_to(small), state, grads)
            steps = list(map(with_decay, steps, *given))
        return self.tree.unflatten(steps), state._replace(
            count=optax.safe_increment(state.count),
            inner=sharded_like(inner_state, state.inner),
        )

    def _recovered(
        self, steps: list[Any], small: Sequence[Any], state: GaLoreState, grads: Sequence[Array]
    ) -> GaLoreState:
        """Replaces N by what `recover` makes of it; returns the state with the new one of that."""
        recover: Any = self.galore.recover
        bases, scalars = self.bases(state), (self.galore.scale, state.count)
        kept = remembers(recover)
        own = self.tree.flatten_up_to(state.recovery) if kept else [()] * len(steps)
        for i, plan in enumerate(self.plans):
            if plan is not None:
                given = bases[i], grads[i], (small[i], steps[i]), own[i], scalars
                steps[i], own[i] = recovered(recover, plan, *given)
        return state._replace(recovery=self.tree.unflatten(own)) if kept else state


def _project(tree: Any, plans: Plans, bases: Sequence[Any], leaves: Sequence[Any]) -> optax.Params:
    """R of each projected leaf, and the other leaves as they are."""
    triples = zip(plans, bases, leaves, strict=True)
    return tree.unflatten([x if p is None else p.into(b, x) for p, b, x in triples])


def _stored(bases: Any) -> Any:
    """One basis is stored as itself, several as a tuple."""
    return bases[0] if isinstance(bases, tuple) and len(bases) == 1 else bases
