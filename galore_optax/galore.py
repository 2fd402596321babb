"""`galore`: any optax transformation, run in a small subspace of each weight matrix.

GaLore (arXiv:2403.03507, algorithm 2), for a weight W with gradient G and every step:

    every `update_proj_gap` steps:  P = leading directions of G
    R = Pᵀ G                        the gradient in the subspace
    N = inner(R)                    its state has the shape of R
    W ← W + scale · P N             learning rate and sign are the inner's
"""

from collections.abc import Sequence

import jax
import optax
from jaxtyping import PRNGKeyArray

from galore_optax import checks, keys
from galore_optax.inner import Inner
from galore_optax.projection.alice import Alice
from galore_optax.projection.apollo import Apollo
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers
from galore_optax.projection.fira import Fira
from galore_optax.projection.leaf import SIDES, Rank, checked_rank
from galore_optax.projection.moments import RULES, MomentsFunction
from galore_optax.projection.recover import Recover
from galore_optax.projection.schedule import Adaptive, RefreshGap, Staggered, check_gap
from galore_optax.projection.subspace import (
    BY_PRODUCTS,
    SUBSPACES,
    FindSubspace,
    any_basis,
    gaussian,
)
from galore_optax.sharding import explain_sharding_errors
from galore_optax.stages import GaLore
from galore_optax.transformation import transformation

# A new way back needs a name here, or is given as a function.
RECOVERS = {
    "project": None,
    "fira": Fira(),
    "apollo": Apollo(),
    "apollo-mini": Apollo(per="matrix"),
}


def galore(
    rank: Rank,
    inner: optax.GradientTransformation,
    *,
    update_proj_gap: RefreshGap = 200,
    scale: float = 0.25,
    subspace: str | FindSubspace = "randomized",
    recover: str | Recover = "project",
    side: str = "smaller",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moments: str | MomentsFunction | None = None,
    projection_bits: int | None = None,
    decoupled_decay: bool | None = None,
    seed: int | PRNGKeyArray = 0,
    sum_over: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Runs `inner` on the gradient of each weight matrix, projected into `rank` dimensions.

    .. math::
        R_t = P^\top G_t, \quad N_t = \text{inner}(R_t), \quad \Delta W_t = \text{scale} \cdot P N_t

    The state of `inner` has the shape of R, `rank / min(in, out)` of the weight's. Leaves that are
    not projected go to `inner` as they are, at full size and without the scale.

    `inner` may be any transformation, with its learning rate in it. It is given R as the gradient
    and the projected weights PᵀW as params. A stack of matrices is one array to an `inner` that is
    elementwise (Adam); to any other (Adafactor, LAMB) its matrices are separate leaves.

    Decoupled weight decay nevertheless reaches the whole matrix, at learning rate times decay and
    without the scale. A use of params *is* decoupled decay if the state of `inner` does not depend
    on the params' values, and the derivative of its update with respect to them depends on nothing
    but scalars: `inner` is then evaluated at params zero, and the derivative times W is added. Any
    other elementwise use (decay within a trust ratio, decay masked by the sign of the update) acts
    within the subspace only, with a warning.

    To update one layer of a stack at a time (`Layerwise`), give the extra arguments `layer`, its
    index, and `layers`, their number: random numbers and refreshes are then those of the stack.

    Args:
        rank: Dimensions of the subspace: an integer of at least 1, a float up to 1 for a fraction
            of the smaller side (rounded, at least 1), or a function from a leaf's path and shape
            to either. A side that is no longer than the rank has no basis, as if P were the
            identity; with subspace="svd", "sampled" or a function it has one of all its
            directions, as published.
        inner: The transformation to run in the subspace, e.g. `optax.adamw(1e-2)`.
        update_proj_gap: When subspaces are refreshed: an integer, the steps from one refresh to the
            next; a function from the step of a refresh to that number; `Staggered(gap)`, which
            spreads the matrices' refreshes over the steps; or `Adaptive(gap)`, which makes them
            rarer for matrices whose subspace has stopped turning (Q-GaLore).
        scale: Factor on the update of projected leaves (the paper's α).
        subspace: How to find it: "randomized" (range finder with one power step), "svd" (exact, as
            published), "power" (one step of subspace iteration from the present basis), "random",
            "switched" (leading directions and random ones, as Alice), "sampled" (singular vectors,
            drawn by their values, as SARA), "gaussian" (not orthonormal, as APOLLO), or a function
            from a gradient `(n, m)`, the present basis `(n, r)` and a key to a basis. For "svd" and
            "sampled" a sharded matrix is gathered.
        recover: The way back to a whole matrix: "project" is scale · P N; "fira" adds the gradient
            outside the subspace; "apollo" scales each column of the gradient as `inner` scaled that
            column of R; "apollo-mini" scales the whole gradient as `inner` scaled R. The last three
            limit how fast updates grow: if the learning rate is a schedule, give `Fira(schedule)`
            or `Apollo(schedule)` instead of the name. `Alice(learning_rate)` and any function from
            a `Matrix` and a state to an update and the new state are accepted, too. All but
            "project" need one projected side, the gradient itself instead of a sum of projected
            ones (`optax.MultiSteps` and `optax.apply_if_finite` go around `galore`, not into it),
            and (those named here) an `inner` that descends.
        side: Which side of a matrix `(in, out)` is projected: "smaller" (as published), "larger"
            (least memory with one side; as in `optax.contrib.galore`), "left" (input), "right"
            (output) or "both", where R = PᵀGQ is rank by rank (and with subspace="svd" diagonal at
            a refresh but for rounding errors, which Adam scales up). Ties go to the input.
        weight_dimension_numbers: Which leaves are matrices, or stacks of them: a
            `GaLoreDimensionNumbers` (or a `TuckerDimensionNumbers`, for tensors) for every leaf
            that has its axes, a tree of them (or a prefix of one) with None for leaves to leave
            out, or a function from params to such a tree. None projects every leaf with two axes,
            other than stacks of vectors: biases `(layers, out)` beside kernels `(layers, in, out)`.
        moments: What becomes of the inner's moments at a refresh: "rotate" carries them over to the
            new basis, "keep" leaves their numbers, as published, "reset" leaves their sizes and
            takes directions from the present gradient (it does not set them to zero, since Adam's
            step count goes on); or a function from a moment's name, the moment and
            `turn(x, squared=False)` to the new moment. None is "rotate" ("keep" with
            subspace="gaussian"), but refuses an inner whose
            state remembers the params, which belong to the old basis.
        projection_bits: Stores the bases in 4 or 8 bits, in groups of 256 elements (Q-GaLore); None
            stores them in the dtype of the leaf.
        decoupled_decay: Overrides the rule above: True takes the use of params for decoupled decay,
            False for something else. None decides by the rule.
        seed: An integer, or a key of JAX (typed or raw). Random keys are folded from it, the
            step, the leaf's path and the matrix's index.
        sum_over: Mesh axes of `jax.shard_map` over which to sum the gradients: each device gives
            the gradient of its part of a batch, and all get the updates and the state of the sum. R
            is all-reduced instead of G; a refresh all-reduces products of G with `rank` columns.

    Returns:
        The transformation; its state is a `GaLoreState`. `subspace_parts` gives the parts of its
        update, for microbatches.

    Raises:
        ValueError: If an argument is out of range, or at `init` does not fit the params.

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, algorithm 2.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import galore
        >>> params = grads = {"w": jnp.ones((64, 256)), "b": jnp.zeros(256)}
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), galore(8, inner=optax.adamw(1e-2)))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> state[1].bases["w"].shape
        (64, 8)
    """
    if not callable(rank):
        checks.static(rank, "rank")
        rank = checked_rank(rank)
    if not callable(subspace):
        checks.choice(subspace, "subspace", tuple(SUBSPACES))
    if not callable(recover):
        checks.choice(recover, "recover", tuple(RECOVERS))
    checks.choice(side, "side", SIDES)
    if not (moments is None or callable(moments)):
        checks.choice(moments, "moments", RULES)
    checks.choice(projection_bits, "projection_bits", (None, 4, 8))
    checks.choice(decoupled_decay, "decoupled_decay", (None, False, True))
    if isinstance(seed, jax.Array):  # as it is under optax.inject_hyperparams, too
        if seed.ndim and not keys.is_key(seed):
            raise ValueError(
                f"seed of shape {seed.shape} and dtype {seed.dtype} is no key; give one, such as "
                "jax.random.key(0), or an integer"
            )
    else:
        seed = checks.whole(seed, "seed", least=0, below=2**32)
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner={checks.said(inner)} is not an optax.GradientTransformation; give one with "
            "its learning "
            "rate, such as optax.adamw(1e-2)"
        )
    sum_over = (sum_over,) if isinstance(sum_over, str) else tuple(sum_over)
    for axis in sum_over:
        checks.instance(axis, "sum_over", str)
    if sum_over and not callable(subspace) and subspace not in BY_PRODUCTS:
        raise ValueError(
            f"subspace={subspace!r} needs the gradient itself, which sum_over={sum_over} avoids: "
            f"choose one of {', '.join(BY_PRODUCTS)}, or leave sum_over out"
        )
    way_back = recover if callable(recover) else RECOVERS[recover]
    if subspace in ("gaussian", gaussian):
        if isinstance(way_back, Fira | Alice):
            raise ValueError(
                'subspace="gaussian" is not orthonormal, but '
                f"recover={checks.said(recover)} needs that: choose another subspace or way back"
            )
        if moments == "rotate":
            raise ValueError(
                'moments="rotate" needs orthonormal bases, unlike subspace="gaussian", with which '
                'moments would grow at each refresh: choose "keep", or leave moments out'
            )
        moments = "keep" if moments is None else moments
    if sum_over and recover != "project":
        raise ValueError(
            f"recover={checks.said(recover)} needs the gradient itself, which sum_over={sum_over} "
            'avoids: choose recover="project", or leave sum_over out'
        )
    check_gap(update_proj_gap, Staggered, Adaptive)
    tx = explain_sharding_errors(optax.with_extra_args_support(inner))
    return transformation(
        GaLore(
            rank=rank,
            inner=Inner(tx, moments, decoupled_decay),
            gap=update_proj_gap,
            scale=checks.number(scale, "scale", such_as=0.25),
            subspace=subspace,
            recover=way_back,
            side=side,
            numbers=weight_dimension_numbers,
            bits=projection_bits,
            seed=seed,
            sum_over=sum_over,
            whole=any_basis(subspace),
        )
    )
