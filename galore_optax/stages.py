"""The stages of `galore`'s update: refresh what is due, project, run the inner, project back."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from galore_optax import keys, ordering
from galore_optax.inner import Inner, decay
from galore_optax.nnx_variables import without_variables
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers
from galore_optax.projection.leaf import Projection, Rank, projections
from galore_optax.projection.moments import CarryOver, MomentsOf, reset
from galore_optax.projection.refresh import Leaf, Refresh, check_subspace, refresh
from galore_optax.projection.schedule import (
    SIMILARITIES,
    Adaptation,
    Adaptive,
    Layer,
    RefreshGap,
    Timing,
    check_schedule,
    first_timing,
    next_timing,
)
from galore_optax.projection.subspace import SUBSPACES, FindSubspace
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.sharding import sharded_like
from galore_optax.trace.traced import Traced


class GaLoreState(NamedTuple):
    """State of `galore`.

    Attributes:
        count: Updates done so far.
        bases: Like the params: at a projected leaf its orthonormal basis P, `(*batch, in, r)` where
            the left side is projected, `(*batch, out, r)` where the right side is, in the leaf's
            dtype, a tuple of them where both sides (or a tensor's axes) are, a `QuantizedArray`
            each with `projection_bits`; `optax.MaskedNode` at others.
        next_refresh: For each matrix the step from which a refresh is due, leaf by leaf in the
            order of `jax.tree.leaves`; one entry if none is projected.
        refreshes: How many refreshes each matrix has had, in the same order.
        adaptation: The `Adaptation` of `Adaptive`; `()` without it.
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
    adaptation: Adaptation | tuple[()]
    inner: optax.OptState


class _Plans(NamedTuple):
    """What a call works out once about the params.

    Attributes:
        tree: Their structure.
        leaves: How each leaf is projected; None where it is not.
        traced: Returns the inner's traced functions.
    """

    tree: Any
    leaves: list[Projection | None]
    traced: Callable[[], Traced]

    def projected(self, bases: Sequence[Any], leaves: Sequence[Array]) -> optax.Params:
        """R of each projected leaf, and the other leaves as they are."""
        triples = zip(self.leaves, bases, leaves, strict=True)
        return self.tree.unflatten([x if p is None else p.into(b, x) for p, b, x in triples])

    @property
    def matrices(self) -> list[int]:
        """How many matrices each projected leaf holds."""
        return [plan.matrices for plan in self.leaves if plan is not None]


@dataclasses.dataclass(frozen=True, eq=False)
class GaLore:
    """`galore` with its arguments, see there: a method for each stage."""

    rank: Rank
    inner: Inner
    gap: RefreshGap
    scale: Any
    subspace: str | FindSubspace
    side: str
    numbers: WeightDimensionNumbers
    bits: int | None
    seed: Any

    def init(self, params: optax.Params) -> GaLoreState:
        """The first state: bases are random, and every refresh is due."""
        check_schedule(self.gap)
        params = dequantized(without_variables(params))
        leaves, tree = jax.tree.flatten(params)
        plans = projections(params, self.numbers, self.rank, self.side)
        if callable(self.subspace):
            check_subspace(self.subspace, plans)
        _warn_of_left_out(leaves, plans, self.numbers)
        key = jax.random.key(self.seed)
        bases: list[Any] = [optax.MaskedNode()] * len(leaves)
        for i, plan in enumerate(plans):
            if isinstance(leaves[i], jax.ShapeDtypeStruct):
                leaves[i] = jnp.zeros(leaves[i].shape, leaves[i].dtype)
            if plan is not None:
                found = plan.random_bases(leaves[i], key, self.bits)
                bases[i] = found[0] if len(found) == 1 else found
                leaves[i] = plan.into(found, leaves[i])
        small = tree.unflatten(leaves)
        inner_state = self.inner.tx.init(small)
        if any(plans):
            self.inner.check(small, inner_state, plans)
        matrices = sum(plan.matrices for plan in plans if plan is not None)
        return GaLoreState(
            count=jnp.zeros([], jnp.int32),
            bases=tree.unflatten(bases),
            **first_timing(self.gap, matrices)._asdict(),
            inner=inner_state,
        )

    def update(
        self,
        updates: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None = None,
        *,
        layer: ArrayLike | None = None,
        layers: int = 1,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        """All stages."""
        plans = self._plans(updates, state, params, extra_args)
        state = self._refreshed(plans, updates, state, params, _layer(layer, layers))
        grads = jax.tree.leaves(updates)
        small = plans.projected(_bases(plans, state), grads)
        return self._finished(plans, small, state, params, grads, extra_args)

    # The same in parts: `galore_optax.transformation.SubspaceParts`.

    def refresh(
        self,
        gradient: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None = None,
        *,
        layer: ArrayLike | None = None,
        layers: int = 1,
        **extra_args: Any,
    ) -> GaLoreState:
        """The state with new bases where they are due."""
        plans = self._plans(gradient, state, params, extra_args)
        return self._refreshed(plans, gradient, state, params, _layer(layer, layers))

    def project(self, gradient: optax.Updates, state: GaLoreState) -> optax.Updates:
        """The projected gradient."""
        plans = self._plans(gradient, state, None, {})
        return plans.projected(_bases(plans, state), jax.tree.leaves(gradient))

    def update_projected(
        self,
        projected: optax.Updates,
        state: GaLoreState,
        params: optax.Params,
        *,
        layer: ArrayLike | None = None,
        layers: int = 1,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        """Updates and the new state, from a projected gradient."""
        del layer, layers
        params = dequantized(without_variables(params))
        plans = self._plans(params, state, params, extra_args)
        like = jax.tree.leaves(params)
        return self._finished(plans, projected, state, params, like, extra_args)

    def _plans(
        self,
        like: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None,
        extra_args: dict[str, Any],
    ) -> _Plans:
        tree = jax.tree.structure(like)
        if params is not None:
            # As `init` made them of the params, whose dtypes may be others than the gradients'.
            like = tree.unflatten(dequantized(tree.flatten_up_to(params)))
        plans = projections(like, self.numbers, self.rank, self.side)
        left_out = [isinstance(b, optax.MaskedNode) for b in tree.flatten_up_to(state.bases)]
        plans = [None if out else plan for out, plan in zip(left_out, plans, strict=True)]

        def small() -> optax.Params:
            made = _Plans(tree, plans, traced)
            return made.projected(_bases(made, state), jax.tree.leaves(like))

        traced = self.inner.traced(small, state.inner, extra_args)
        return _Plans(tree, plans, traced)

    def _refreshed(
        self,
        plans: _Plans,
        gradient: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None,
        layer: Layer,
    ) -> GaLoreState:
        """The state with new bases, moments and times of refreshes where refreshes are due."""
        if not plans.matrices:
            return state
        grads, bases = jax.tree.leaves(gradient), _bases(plans, state)
        inner_leaves, inner_tree = jax.tree.flatten(state.inner, is_leaf=is_quantized)
        places: MomentsOf = [[[]] * (plan.matrices if plan else 0) for plan in plans.leaves]
        if self.inner.rule != "keep":
            small = jax.eval_shape(plans.projected, bases, grads)
            places = self.inner.moments_of(small, state.inner, plans.leaves, plans.traced)
        count = jnp.asarray(state.count)
        due, at = count >= state.next_refresh, 0
        happened: list[Bool[Array, " matrices"]] = []
        similarities: list[Float[Array, " matrices"]] = []
        for i, plan in enumerate(plans.leaves):
            happened.append(jnp.zeros(plan.matrices if plan else 0, bool))
            similarities.append(jnp.zeros(happened[i].shape, jnp.float32))
            if plan is None or not plan.modes:
                at += happened[i].size
                continue
            moments = tuple(tuple(inner_leaves[p.position] for p in ps) for ps in places[i])
            how = self._how(plan, places[i])
            made = refresh(
                how,
                Leaf(
                    gradient=grads[i],
                    bases=bases[i],
                    moments=moments if how.carry_over else ((),) * plan.matrices,
                    due=due[at : at + plan.matrices].reshape(plan.view.batch_shape),
                ),
                self._key(count, plan),
                jnp.asarray(layer.index, jnp.int32) * plan.matrices,
            )
            at += plan.matrices
            bases[i], happened[i], similarities[i] = made.bases, made.happened, made.similarities
            for matrix, values in zip(places[i], made.moments, strict=True):
                for place, value in zip(matrix, values, strict=False):
                    inner_leaves[place.position] = value
        if self.inner.rule == "reset":
            weights = grads if params is None else dequantized(plans.tree.flatten_up_to(params))
            inner_leaves = reset(
                lambda: self.inner.tx.init(plans.projected(bases, weights)),
                inner_leaves, places, happened,
            )  # fmt: skip
        timing = next_timing(
            self.gap,
            Timing(state.next_refresh, state.refreshes, state.adaptation),
            count,
            jnp.concatenate(happened),
            jnp.concatenate(similarities),
            plans.matrices,
            layer,
        )
        return GaLoreState(
            count=state.count,
            bases=plans.tree.unflatten([b[0] if len(b) == 1 else b for b in bases]),
            **timing._asdict(),
            inner=inner_tree.unflatten(inner_leaves),
        )

    def _how(self, plan: Projection, places: Sequence[Sequence[Any]]) -> Refresh:
        """How a leaf is refreshed, whose matrices have their moments in these places."""
        moments = tuple(place.moment for place in places[0])
        carries = moments and self.inner.rule not in ("reset", "keep")
        return Refresh(
            projection=plan,
            find=SUBSPACES[self.subspace] if isinstance(self.subspace, str) else self.subspace,
            carry_over=CarryOver(plan, self.inner.rule, moments) if carries else None,
            similarity=SIMILARITIES[self.gap.similarity]
            if isinstance(self.gap, Adaptive)
            else None,
        )

    def _key(self, count: Int[Array, ""], plan: Projection) -> Array:
        """The key of a leaf's random numbers in a step."""
        return keys.for_path(jax.random.fold_in(jax.random.key(self.seed), count), plan.path)

    def _finished(
        self,
        plans: _Plans,
        small: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None,
        like: Sequence[Array],
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, GaLoreState]:
        """The inner's update, projected back, and the decay of whole matrices."""
        bases, weights, small_params = _bases(plans, state), [], None
        if params is not None:
            weights = dequantized(plans.tree.flatten_up_to(params))
            small_params = plans.projected(bases, weights)
        small_steps, inner_state, slopes = self.inner.update(
            small, state.inner, small_params, plans.traced, extra_args
        )
        steps = plans.tree.flatten_up_to(small_steps)
        previous = None
        for i, plan in enumerate(plans.leaves):
            if plan is not None:
                scaled = jax.tree.map(lambda n: self.scale * n, steps[i])
                if previous is not None:  # one product after the other
                    scaled = ordering.after_on_cpu(previous, scaled)
                steps[i] = plan.out_of(bases[i], scaled, like[i])
                previous = steps[i] if steps[i].size else previous
        if slopes is not None:
            for i, slope in enumerate(plans.tree.flatten_up_to(slopes)):
                if (whole := decay(slope, plans.leaves[i], weights[i])) is not None:
                    steps[i] = steps[i] + whole.astype(steps[i].dtype)
        return plans.tree.unflatten(steps), state._replace(
            count=optax.safe_increment(state.count),
            inner=sharded_like(inner_state, state.inner),
        )


def _layer(layer: ArrayLike | None, layers: int) -> Layer:
    return Layer() if layer is None else Layer(layer, layers)


def _bases(plans: _Plans, state: GaLoreState) -> list[Any]:
    """The bases of each leaf, in a tuple."""
    bases = plans.tree.flatten_up_to(state.bases)
    return [b if isinstance(b, tuple) else (b,) for b in bases]


def _warn_of_left_out(
    leaves: Sequence[Any], plans: Sequence[Projection | None], numbers: WeightDimensionNumbers
) -> None:
    if leaves and not any(plans):
        warnings.warn(
            "galore projects nothing: none of the params is a matrix; say with "
            "weight_dimension_numbers which axes of which leaves are matrices",
            stacklevel=3,
        )
    several = [leaf.shape for leaf in leaves if len(leaf.shape) > 2]
    if several and numbers is None:
        warnings.warn(
            f"galore leaves {len(several)} params with three or more axes unprojected, the first "
            f"of shape {several[0]}; say with weight_dimension_numbers which axes are matrices, or "
            "None to leave a leaf out knowingly",
            stacklevel=3,
        )
