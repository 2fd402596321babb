"""`galore`: any optax transformation, run in a small subspace of each weight matrix.

GaLore (arXiv:2403.03507, algorithm 2), for a weight W with gradient G and every step:

    every `update_proj_gap` steps:  P = leading directions of G
    R = Pᵀ G                        the gradient in the subspace
    N = inner(R)                    its state has the shape of R
    W ← W + scale · P N             learning rate and sign are the inner's
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from galore_optax import checks
from galore_optax.nnx_variables import without_variables
from galore_optax.ordering import after
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers
from galore_optax.projection.leaf import SIDES, Projection, Rank, checked_rank, projections
from galore_optax.projection.moments import (
    RULES,
    CarryOver,
    MomentsFunction,
    check_rule,
    places,
    reset,
)
from galore_optax.projection.refresh import (
    by_leaf,
    check_subspace,
    flat,
    later,
    matrices,
    multiplied,
    refresh,
    steps_to_next,
)
from galore_optax.projection.schedule import SIMILARITIES, AdaptiveRefresh
from galore_optax.projection.subspace import SUBSPACES, FindSubspace
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.sharding import explain_sharding_errors, sharded_like
from galore_optax.trace.decoupled_decay import decay, update_and_slopes
from galore_optax.trace.remembered_params import remembers_params
from galore_optax.transformation import SubspaceTransformation

DEFAULT_MOMENTS = "rotate"


class GaLoreState(NamedTuple):
    """State of `galore`.

    Attributes:
        count: Updates done so far.
        bases: Like the params: at a projected leaf its orthonormal basis P, `(*batch, in, r)` where
            the left side is projected, `(*batch, out, r)` where the right side is, in the leaf's
            dtype, a tuple of them where both sides (or a tensor's axes) are, a `QuantizedArray`
            each with `projection_bits`; `optax.MaskedNode` at others.
        next_refresh: The step from which a refresh is due, of every matrix, leaf by leaf in the
            order of `jax.tree.leaves`, of shape `(matrices,)`; `(1,)` where none is projected,
            since Orbax saves no array without elements.
        refreshes: How many refreshes each matrix has had, in the same order.
        adaptation: The `Adaptation` of `adaptive_refresh`; `()` without it.
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
    adaptation: Any
    inner: optax.OptState


def galore(
    rank: Rank,
    inner: optax.GradientTransformation,
    *,
    update_proj_gap: int | optax.Schedule = 200,
    scale: float = 0.25,
    subspace: str | FindSubspace = "randomized",
    side: str = "smaller",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moments: str | MomentsFunction | None = None,
    stagger: bool = False,
    adaptive_refresh: AdaptiveRefresh | None = None,
    rank_schedule: optax.Schedule | None = None,
    projection_bits: int | None = None,
    decoupled_decay: bool | None = None,
    seed: int = 0,
) -> SubspaceTransformation:
    r"""Runs `inner` on the gradient of each weight matrix, projected into `rank` dimensions.

    .. math::
        R_t = P^\top G_t, \quad N_t = \text{inner}(R_t), \quad \Delta W_t = \text{scale} \cdot P N_t

    The state of `inner` has the shape of R, `rank / min(in, out)` of the weight's. Leaves that are
    not projected go to `inner` as they are, at full size and without the scale.

    `inner` may be any transformation, with its learning rate in it. It is given R as the gradient
    and the projected weights PᵀW as params. Decoupled weight decay nevertheless reaches the whole
    matrix, at learning rate times decay and without the scale: where neither the state of `inner`
    depends on the params' values, nor the slope of its update with respect to them on anything but
    scalars, its use of params *is* decoupled decay: then it is evaluated at params zero, and slope
    times W is added. The matrices of a stacked leaf are separate leaves to `inner`.

    Its update takes the extra arguments `layer` and `layers`, where it is called for one layer of a
    stack at a time (`galore_optax.layerwise.step`): which layer of how many. Random numbers and the
    steps of refreshes are then what they are where it is called for the whole stack.

    Args:
        rank: Dimensions of the subspace: a whole number from 1 (a matrix whose smaller side is less
            is projected at full rank), a float up to 1 for a fraction of the smaller side, or a
            function from a leaf's path and shape to either.
        inner: The transformation to run in the subspace, e.g. `optax.adamw(1e-2)`.
        update_proj_gap: Steps from one refresh of the subspace to the next, at least 1, or a
            function of the step of a refresh to the steps until the next.
        scale: Factor on the update of projected leaves (the paper's α).
        subspace: How to find it: "randomized" (range finder with one power step), "svd" (exact, as
            published; a sharded matrix is gathered for it, which no other choice does), "power"
            (one step of subspace iteration from the present basis), "random", or a function from a
            gradient `(n, m)`, the present basis `(n, r)` and a key to a basis, such as
            `functools.partial(galore_optax.projection.subspace.randomized, power_steps=2)`.
        side: Which side of a matrix `(in, out)` is projected: "smaller" (as published), "larger"
            (least memory with one side; as in `optax.contrib.galore`), "left" (input), "right"
            (output) or "both", where R = PᵀGQ is rank by rank. Ties go to the input.
        weight_dimension_numbers: Which leaves are matrices, or stacks of them: a
            `GaLoreDimensionNumbers` (or a `TuckerDimensionNumbers`, for tensors) for every leaf
            that has its axes, a tree of them (or a prefix of one) with None for leaves to leave
            out, or a function from params to such a tree. None projects every leaf with two axes.
        moments: What becomes of the inner's moments at a refresh: "rotate" carries them over to the
            new basis (`galore_optax.projection.moments`), "keep" leaves their numbers, as published, "reset"
            makes them anew as `inner.init` does; or a function from a moment's name, the moment and
            `turn(x, squared=False)` to the new moment. None is "rotate", but refuses an inner whose
            state remembers the params, which live in the old basis.
        stagger: Spreads the second and all later refreshes over the steps of a gap, so that no step
            carries all of them; the first refresh is every matrix's at once.
        adaptive_refresh: Doubles the gap of a matrix whose subspace has stopped turning, as
            Q-GaLore does; `AdaptiveRefresh()` has the paper's numbers.
        rank_schedule: From the step of a refresh to the fraction of the rank that the new bases
            use, the directions of most energy; the others are zero. Shapes stay.
        projection_bits: Stores the bases in 4 or 8 bits, in groups of 256 elements (Q-GaLore); None
            stores them in the dtype of the leaf.
        decoupled_decay: Overrides the rule above: True takes the use of params for decoupled decay,
            False for something else. None decides by the rule.
        seed: Of the random numbers, which are folded from it, the step, the leaf's path and the
            matrix's index.

    Returns:
        The transformation, whose update can also be made in parts, for microbatches; its state is a
        `GaLoreState`.

    Raises:
        ValueError: If an argument is out of range, at construction; if the dimension numbers do not
            fit the params, at `init`; if `inner` cannot run under explicit mesh axes, where the
            params have them.

    References:
        Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
        <https://arxiv.org/abs/2403.03507>`_, 2024, algorithm 2.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import galore
        >>> params = {"w": jnp.ones((64, 256)), "b": jnp.zeros(256)}
        >>> tx = optax.chain(
        ...     optax.clip_by_global_norm(1.0), galore(rank=8, inner=optax.adamw(1e-2))
        ... )
        >>> state = tx.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> state[1].bases["w"].shape
        (64, 8)
    """
    if not callable(rank):
        checks.static(rank, "rank")
        rank = checked_rank(rank)
    if not callable(update_proj_gap):
        update_proj_gap = checks.whole(update_proj_gap, "update_proj_gap")
    if not callable(subspace):
        checks.choice(subspace, "subspace", tuple(SUBSPACES))
    checks.choice(side, "side", SIDES)
    if not (moments is None or callable(moments)):
        checks.choice(moments, "moments", RULES)
    scale = checks.number(scale, "scale", such_as=0.25)
    checks.choice(stagger, "stagger", (False, True))
    checks.choice(projection_bits, "projection_bits", (None, 4, 8))
    checks.choice(decoupled_decay, "decoupled_decay", (None, False, True))
    if rank_schedule is not None:
        checks.function(rank_schedule, "rank_schedule")
    if not isinstance(seed, jax.Array):  # which it is under optax.inject_hyperparams
        seed = checks.whole(seed, "seed", least=0, below=2**32)
    if not (adaptive_refresh is None or isinstance(adaptive_refresh, AdaptiveRefresh)):
        raise ValueError(
            f"adaptive_refresh={adaptive_refresh!r} is no AdaptiveRefresh; give AdaptiveRefresh() "
            "for the paper's numbers, or None"
        )
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner={inner!r} is no optax.GradientTransformation; give one with its learning rate, "
            "such as optax.adamw(1e-2)"
        )
    inner = explain_sharding_errors(optax.with_extra_args_support(inner))
    find = SUBSPACES[subspace] if isinstance(subspace, str) else subspace
    rule = DEFAULT_MOMENTS if moments is None else moments
    similarity = SIMILARITIES[adaptive_refresh.similarity] if adaptive_refresh else None

    def init(params: optax.Params) -> GaLoreState:
        if callable(update_proj_gap):
            checks.schedule(update_proj_gap, "update_proj_gap", above=0)
        if rank_schedule is not None:
            checks.schedule(rank_schedule, "rank_schedule", above=0, most=1)
        params = dequantized(without_variables(params))
        leaves, tree = jax.tree.flatten(params)
        plans = projections(params, weight_dimension_numbers, rank, side)
        if callable(subspace):
            check_subspace(subspace, plans)
        _warn_of_left_out(leaves, plans, weight_dimension_numbers)
        key = jax.random.key(seed)
        bases: list[Any] = [optax.MaskedNode()] * len(leaves)
        for i, plan in enumerate(plans):
            if isinstance(leaves[i], jax.ShapeDtypeStruct):
                leaves[i] = jnp.zeros(leaves[i].shape, leaves[i].dtype)
            if plan is None:
                continue
            found = plan.random_bases(leaves[i], key, projection_bits, rank_schedule is not None)
            bases[i] = found[0] if len(found) == 1 else found
            leaves[i] = plan.into(found, leaves[i])
        small = tree.unflatten(leaves)
        projected = tree.unflatten([plan is not None for plan in plans])
        if moments is None and remembers_params(inner, small, projected):
            raise ValueError(
                "inner: its state remembers the params, projected into the present subspace, which "
                "mean nothing in the next one; choose with moments= what is to become of it: "
                '"reset" makes it anew at every refresh, "keep" leaves it as it is'
            )
        inner_state = inner.init(small)
        if rule != "keep" and any(plans):
            # Raises here, not in the first update.
            moments_of = places(inner, inner_state, params, plans)
            if callable(rule):
                inner_leaves = jax.tree.leaves(inner_state, is_leaf=is_quantized)
                check_rule(rule, inner_leaves, moments_of, plans)
        several = max(1, matrices(plans))
        return GaLoreState(
            count=jnp.zeros([], jnp.int32),
            bases=tree.unflatten(bases),
            next_refresh=jnp.zeros(several, jnp.int32),
            refreshes=jnp.zeros(several, jnp.int32),
            adaptation=adaptive_refresh.init(several) if adaptive_refresh else (),
            inner=inner_state,
        )

    def plans_of(
        like: optax.Updates, state: GaLoreState, params: optax.Params | None
    ) -> list[Projection | None]:
        # As `init` made them of the params, whose dtypes may be others than the gradients'.
        tree = jax.tree.structure(like)
        if params is not None:
            like = tree.unflatten(dequantized(tree.flatten_up_to(params)))
        plans = projections(like, weight_dimension_numbers, rank, side)
        left_out = [isinstance(b, optax.MaskedNode) for b in tree.flatten_up_to(state.bases)]
        return [None if out else plan for out, plan in zip(left_out, plans, strict=True)]

    def refresh_due(
        gradient: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None = None,
        *,
        layer: ArrayLike | None = None,
        layers: int = 1,
    ) -> GaLoreState:
        grads, tree = jax.tree.flatten(gradient)
        plans = plans_of(gradient, state, params)
        if not any(plans):
            return state
        count = jnp.asarray(state.count)
        key = jax.random.key(seed)
        bases = _bases(tree, state)
        due = by_leaf(plans, state.next_refresh)
        which = (0, 1) if layer is None else (layer, layers)
        gaps = steps_to_next(plans, due, count, update_proj_gap, stagger, *which)
        if adaptive_refresh:
            factors = by_leaf(plans, state.adaptation.factor)
            gaps = list(map(multiplied, gaps, factors))
        kept = None if rank_schedule is None else jnp.asarray(rank_schedule(count), jnp.float32)
        inner_leaves, inner_tree = jax.tree.flatten(state.inner, is_leaf=is_quantized)
        moments_of = [[[] for _ in range(plan.matrices)] if plan else [] for plan in plans]
        if rule != "keep":
            moments_of = places(inner, state.inner, gradient, plans)
        refreshed = [jnp.zeros(plan.matrices if plan else 0, bool) for plan in plans]
        similarities = [jnp.zeros(x.shape, jnp.float32) for x in refreshed]
        for i, plan in enumerate(plans):
            if plan is None or not plan.modes:
                continue
            names = tuple((place.name, place.container) for place in moments_of[i][0])
            carry_over = CarryOver(plan, rule, names) if names and rule != "reset" else None
            own = tuple(tuple(inner_leaves[p.position] for p in ps) for ps in moments_of[i])
            new, turned, following, similarities[i] = refresh(
                plan, find, carry_over, similarity, grads[i], bases[i],
                own if carry_over else ((),) * len(own),
                due[i], count, gaps[i], kept, key, jnp.uint32(plan.path_hash),
                jnp.asarray(which[0], jnp.int32) * plan.matrices,
            )  # fmt: skip
            refreshed[i] = (following != due[i]).reshape(-1)
            bases[i], due[i] = new, following
            for matrix, values in zip(moments_of[i], turned, strict=True):
                for place, value in zip(matrix, values, strict=False):
                    inner_leaves[place.position] = value
        if rule == "reset":
            weights = grads if params is None else dequantized(tree.flatten_up_to(params))
            inner_leaves = reset(
                lambda: inner.init(_projected(tree, plans, bases, weights)),
                inner_leaves, moments_of, refreshed,
            )  # fmt: skip
        happened, next_refresh = flat(refreshed, bool), flat(due, jnp.int32)
        adaptation = state.adaptation
        if adaptive_refresh:
            # The first basis took the place of a random one.
            comparable = happened & (state.refreshes > 0)
            adaptation = adaptive_refresh.update(
                adaptation, comparable, flat(similarities, jnp.float32)
            )
            longer = adaptation.factor // state.adaptation.factor - 1
            next_refresh = later(next_refresh, longer * flat(gaps, jnp.int32))
        return GaLoreState(
            count=state.count,
            bases=tree.unflatten([b[0] if len(b) == 1 else b for b in bases]),
            next_refresh=next_refresh,
            refreshes=state.refreshes + happened,
            adaptation=adaptation,
            inner=inner_tree.unflatten(inner_leaves),
        )

    def project(
        gradient: optax.Updates, state: GaLoreState, params: optax.Params | None = None
    ) -> optax.Updates:
        grads, tree = jax.tree.flatten(gradient)
        plans = plans_of(gradient, state, params)
        return _projected(tree, plans, _bases(tree, state), grads)

    def finish(
        small: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None,
        like: optax.Updates,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        leaves, tree = jax.tree.flatten(like)
        plans = plans_of(like, state, params)
        bases = _bases(tree, state)
        weights = None if params is None else dequantized(tree.flatten_up_to(params))

        def inner_update(
            updates: optax.Updates, state: optax.OptState, params: optax.Params | None
        ) -> tuple[optax.Updates, optax.OptState]:
            return inner.update(updates, state, params, **extra_args)

        small_steps, inner_state, slopes = update_and_slopes(
            inner.init,
            inner_update,
            small,
            state.inner,
            None if weights is None else _projected(tree, plans, bases, weights),
            decoupled_decay,
        )
        steps = tree.flatten_up_to(small_steps)
        previous = None
        for i, plan in enumerate(plans):
            if plan is not None:
                scaled = jax.tree.map(lambda n: scale * n, steps[i])
                # A CPU runs large products side by side otherwise, each on some of its cores, which
                # takes longer than one after the other.
                steps[i] = plan.out_of(bases[i], after(previous, scaled), leaves[i])
                previous = steps[i] if steps[i].size else previous
        if weights is not None and slopes is not None:
            for i, slope in enumerate(tree.flatten_up_to(slopes)):
                if (whole := decay(slope, plans[i], weights[i])) is not None:
                    steps[i] = steps[i] + whole.astype(steps[i].dtype)
        return tree.unflatten(steps), state._replace(
            count=optax.safe_increment(state.count),
            inner=sharded_like(inner_state, state.inner),
        )

    def update(
        updates: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None = None,
        *,
        layer: ArrayLike | None = None,
        layers: int = 1,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        if layer is not None:
            extra_args |= {"layer": layer, "layers": layers}
        state = refresh_due(updates, state, params, layer=layer, layers=layers)
        return finish(project(updates, state, params), state, params, updates, **extra_args)

    def update_projected(
        small: optax.Updates, state: GaLoreState, params: optax.Params, **extra_args: Any
    ) -> tuple[optax.Updates, GaLoreState]:
        like = dequantized(without_variables(params))
        return finish(small, state, like, like, **extra_args)

    return SubspaceTransformation(init, update, refresh_due, project, update_projected)


def _bases(tree: Any, state: GaLoreState) -> list[Any]:
    """The bases of every leaf."""
    return [b if isinstance(b, tuple) else (b,) for b in tree.flatten_up_to(state.bases)]


def _projected(
    tree: Any, plans: Sequence[Projection | None], bases: Sequence[Any], leaves: Sequence[Array]
) -> optax.Params:
    triples = zip(plans, bases, leaves, strict=True)
    return tree.unflatten([x if p is None else p.into(b, x) for p, b, x in triples])


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
