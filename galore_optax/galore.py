"""`galore`: any optax transformation, run in a small subspace of each weight matrix.

GaLore (arXiv:2403.03507, algorithm 2), for a weight W with gradient G and every step:

    every `update_proj_gap` steps:  P = leading directions of G
    R = Pᵀ G                        the gradient in the subspace
    N = inner(R)                    its state has the shape of R
    W ← W + scale · P N             (the learning rate and its sign are the inner's)
"""

import dataclasses
import math
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from galore_optax import subspace as subspaces
from galore_optax.decoupled_decay import decay_slopes
from galore_optax.matrices import MatrixView, WeightDimensionNumbers, matrix_views
from galore_optax.sharding import matmul, sharded_like

SIDES = ("smaller", "larger", "left", "right")


class GaLoreState(NamedTuple):
    """State of `galore`.

    Attributes:
        count: Updates done so far.
        bases: Like the params: at a projected leaf its orthonormal basis P, `(*batch, in, r)` where
            the left side is projected, `(*batch, out, r)` where the right side is, in the leaf's
            dtype; `optax.MaskedNode` at others.
        next_refresh: Like the params: the step from which a refresh is due, of each matrix of a
            projected leaf, of shape `(*batch,)`.
        inner: The inner transformation's state for the projected params.
    """

    count: Int[Array, ""]
    bases: optax.Params
    next_refresh: optax.Params
    inner: optax.OptState


@dataclasses.dataclass(frozen=True)
class _Projection:
    """How the matrices of one leaf are projected, fixed by its shape."""

    view: MatrixView
    left: bool
    rank: int
    path: str

    def oriented(self, leaf: Float[Array, "..."]) -> Float[Array, "*batch n m"]:
        """The leaf's matrices with the projected side first."""
        matrices = self.view.to_matrices(leaf)
        return matrices if self.left else matrices.mT

    def into(self, basis: Float[Array, "*batch n r"], leaf: Float[Array, "..."]) -> Any:
        """R = PᵀG `(r, out)` or GP `(in, r)`; of stacked matrices a tuple, one leaf for each.

        An inner transformation keeps statistics by leaf (Adafactor's clipping, LAMB's trust ratio,
        a threshold on size): they are to be those of a matrix, never of a stack.
        """
        matrices = self.view.to_matrices(leaf)
        basis = basis.astype(leaf.dtype)
        small = matmul(basis.mT, matrices) if self.left else matmul(matrices, basis)
        if not self.view.batch_axes:
            return small
        flat = small.reshape(-1, *small.shape[-2:])
        return tuple(flat[i] for i in range(flat.shape[0]))

    def out_of(self, basis: Float[Array, "*batch n r"], small: Any) -> Float[Array, "..."]:
        """P N or N Pᵀ in the shape of the leaf."""
        if self.view.batch_axes:
            small = jnp.stack(small).reshape(*self.view.batch_shape, *small[0].shape)
        basis = basis.astype(small.dtype)
        matrices = matmul(basis, small) if self.left else matmul(small, basis.mT)
        return self.view.to_leaf(matrices)

    def decay(self, slope: Any, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        """slope · W, with a slope for each matrix of a stack."""
        if not self.view.batch_axes:
            return slope * leaf
        slopes = jnp.stack([jnp.zeros([]) if s is None else s for s in slope])
        slopes = slopes.astype(leaf.dtype).reshape(*self.view.batch_shape, 1, 1)
        return self.view.to_leaf(slopes * self.view.to_matrices(leaf))

    def keys(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """One key for each matrix of the stack, flat, told apart by the leaf's path and its index."""
        own = jax.random.fold_in(key, zlib.crc32(self.path.encode()))
        count = math.prod(self.view.batch_shape)
        return jax.vmap(lambda i: jax.random.fold_in(own, i))(jnp.arange(count))


def galore(
    rank: int,
    inner: optax.GradientTransformation,
    *,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    subspace: str = "randomized",
    side: str = "smaller",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    decoupled_decay: bool | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs `inner` on each weight matrix's gradient projected into a subspace of `rank` dimensions.

    .. math::
        R_t = P^\top G_t, \quad N_t = \text{inner}(R_t), \quad \Delta W_t = \text{scale} \cdot P N_t

    The state of `inner` has the shape of R, `rank / min(in, out)` of the weight's. Leaves that are
    not projected go to `inner` as they are, at full size and without the scale.

    `inner` may be any transformation, with its learning rate in it. It is given R as the gradient and
    the projected weights PᵀW as params. Decoupled weight decay nevertheless reaches the whole matrix,
    at learning rate times decay and without the scale: where neither the state of `inner` depends on
    the params' values, nor the slope of its update with respect to them on anything but scalars, its
    use of params *is* decoupled decay; then it is evaluated at params zero, and slope · W is added.
    The matrices of a stacked leaf are separate leaves to `inner`.

    Args:
        rank: Dimensions of the subspace, at least 1; a matrix whose smaller side is less is projected
            at full rank.
        inner: The transformation to run in the subspace, e.g. `optax.adamw(1e-2)`.
        update_proj_gap: Steps from one refresh of the subspace to the next, at least 1.
        scale: Factor on the update of projected leaves (the paper's α).
        subspace: How to find it: "randomized" (range finder with one power step) or "svd" (exact, as
            published).
        side: Which side of a matrix `(in, out)` is projected: "smaller" (as published; ties to the
            input), "larger" (least memory; as in `optax.contrib.galore`), "left" (input) or "right"
            (output).
        weight_dimension_numbers: Which leaves are matrices, or stacks of them: a
            `GaLoreDimensionNumbers`, a tree of them (or prefix of one) with None for leaves to leave
            out, or a function from params to such a tree. None projects every leaf with two axes.
        decoupled_decay: Overrides the rule above: True takes the use of params for decoupled decay,
            False for something else. None decides by the rule.
        seed: Of the random numbers, which are folded from it, the step, the leaf's path and the
            matrix's index.

    Returns:
        The transformation; its state is a `GaLoreState`.

    Raises:
        ValueError: If an argument is out of range, at construction; if the dimension numbers do not
            fit the params, at `init`.

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
    _check_whole(rank, "rank")
    _check_whole(update_proj_gap, "update_proj_gap")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} is not finite; the papers use 0.25")
    find = _choice(subspace, "subspace", subspaces.SUBSPACES)
    _choice(side, "side", dict.fromkeys(SIDES))
    if not hasattr(inner, "init") or not hasattr(inner, "update"):
        raise ValueError(
            f"inner={inner!r} is no optax.GradientTransformation; give one such as "
            "optax.adamw(1e-2), with its learning rate"
        )
    inner = optax.with_extra_args_support(inner)

    def projections(params: optax.Params) -> list[_Projection | None]:
        def projection(path: str, view: MatrixView | None) -> _Projection | None:
            if view is None:
                return None
            smaller_is_left = view.rows <= view.columns
            left = {"smaller": smaller_is_left, "larger": not smaller_is_left}.get(
                side, side == "left"
            )
            return _Projection(view, left, min(rank, view.rows, view.columns), path)

        return [projection(*pair) for pair in matrix_views(params, weight_dimension_numbers)]

    def init(params: optax.Params) -> GaLoreState:
        leaves, tree = jax.tree.flatten(params)
        plans = projections(params)
        if weight_dimension_numbers is None:
            _warn_of_left_out(leaves, plans)
        key = jax.random.key(seed)
        bases, due, small = [], [], []
        for plan, leaf in zip(plans, leaves, strict=True):
            if plan is None:
                bases.append(optax.MaskedNode())
                due.append(optax.MaskedNode())
                small.append(leaf)
                continue
            if isinstance(leaf, jax.ShapeDtypeStruct):
                leaf = jnp.zeros(leaf.shape, leaf.dtype)
            bases.append(_random_bases(plan, leaf, key))
            due.append(jnp.zeros(plan.view.batch_shape, jnp.int32))
            small.append(plan.into(bases[-1], leaf))
        return GaLoreState(
            count=jnp.zeros([], jnp.int32),
            bases=tree.unflatten(bases),
            next_refresh=tree.unflatten(due),
            inner=inner.init(tree.unflatten(small)),
        )

    def update(
        updates: optax.Updates,
        state: GaLoreState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaLoreState]:
        grads, tree = jax.tree.flatten(updates)
        plans = projections(updates)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        bases = tree.flatten_up_to(state.bases)
        due = tree.flatten_up_to(state.next_refresh)
        following = (state.count // update_proj_gap + 1) * update_proj_gap
        for i, (plan, grad) in enumerate(zip(plans, grads, strict=True)):
            if plan is not None:
                bases[i], due[i] = _refresh(
                    plan, find, grad, bases[i], due[i], state.count, following, key
                )

        def projected(leaves: list[Any]) -> Any:
            return tree.unflatten(
                [
                    leaf if plan is None else plan.into(basis, leaf)
                    for plan, basis, leaf in zip(plans, bases, leaves, strict=True)
                ]
            )

        def inner_update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
            return inner.update(updates, state, params, **extra_args)

        weights = None if params is None else tree.flatten_up_to(params)
        small, inner_state, slopes = _run_inner(
            inner_update,
            projected(grads),
            state.inner,
            None if weights is None else projected(weights),
            decoupled_decay,
        )
        new_updates = tree.flatten_up_to(small)
        for i, plan in enumerate(plans):
            if plan is not None:
                scaled = jax.tree.map(lambda n: scale * n, new_updates[i])
                new_updates[i] = plan.out_of(bases[i], scaled)
        if slopes is not None:
            for i, slope in enumerate(tree.flatten_up_to(slopes)):
                if any(s is not None for s in jax.tree.leaves(slope, is_leaf=lambda x: x is None)):
                    whole = (
                        slope * weights[i]
                        if plans[i] is None
                        else plans[i].decay(slope, weights[i])
                    )
                    new_updates[i] = new_updates[i] + whole.astype(new_updates[i].dtype)
        return tree.unflatten(new_updates), GaLoreState(
            count=optax.safe_increment(state.count),
            bases=tree.unflatten(bases),
            next_refresh=tree.unflatten(due),
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_whole(value: int, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is no whole number of at least 1")


def _choice(value: str, name: str, table: dict[str, Any]) -> Any:
    if value not in table:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(table)}")
    return table[value]


def _warn_of_left_out(leaves: list[Any], plans: list[_Projection | None]) -> None:
    several = [leaf.shape for leaf in leaves if len(leaf.shape) > 2]
    if several:
        warnings.warn(
            f"galore leaves {len(several)} parameters with three or more axes unprojected, the first "
            f"of shape {several[0]}; say with weight_dimension_numbers which axes are a matrix "
            "(or None to leave one out knowingly)",
            stacklevel=3,
        )
    if leaves and not any(plans):
        warnings.warn(
            "galore projects nothing: no parameter has two axes; say with weight_dimension_numbers "
            "which axes are a matrix",
            stacklevel=3,
        )


def _random_bases(
    plan: _Projection, leaf: Float[Array, "..."], key: PRNGKeyArray
) -> Float[Array, "*batch n r"]:
    oriented = plan.oriented(leaf)
    shape = (oriented.shape[-2], plan.rank)
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    gaussian = jax.vmap(lambda k: jax.random.normal(k, shape, wide))(plan.keys(key))
    gaussian = gaussian.reshape(*plan.view.batch_shape, *shape)
    return subspaces.orthonormalize(sharded_like(gaussian, oriented)).astype(leaf.dtype)


def _refresh(
    plan: _Projection,
    find: subspaces.FindSubspace,
    grad: Float[Array, "..."],
    basis: Float[Array, "*batch n r"],
    due: Int[Array, "*batch"],
    count: Int[Array, ""],
    following: Int[Array, ""],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "*batch n r"], Int[Array, "*batch"]]:
    """Looks for a new basis of each matrix that is due one; costs nothing on other steps.

    A conditional within a loop over the matrices: under `vmap` it would become a select, which
    computes every basis at every step.
    """

    def matrix(gradient: Any, basis: Any, due: Any, key: Any) -> tuple[Any, Any]:
        def search() -> tuple[Any, Any]:
            new, found = subspaces.refreshed(find, gradient(), basis, key)
            return new, jnp.where(found, following, due)

        return jax.lax.cond(count >= due, search, lambda: (basis, due))

    keys = plan.keys(key)
    if not plan.view.batch_axes:
        return matrix(lambda: plan.oriented(grad), basis, due, keys[0])

    def stack() -> tuple[Any, Any]:
        gradients = plan.oriented(grad)
        gradients = gradients.reshape(-1, *gradients.shape[-2:])

        def body(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            bases, dues = carry
            new, new_due = matrix(lambda: gradients[i], bases[i], dues[i], keys[i])
            return bases.at[i].set(new), dues.at[i].set(new_due)

        carry = basis.reshape(-1, *basis.shape[-2:]), due.reshape(-1)
        bases, dues = jax.lax.fori_loop(0, keys.shape[0], body, carry)
        return bases.reshape(basis.shape), dues.reshape(due.shape)

    return jax.lax.cond(jnp.any(count >= due), stack, lambda: (basis, due))


def _run_inner(
    update: Callable[[Any, Any, Any], tuple[Any, Any]],
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    decoupled_decay: bool | None,
) -> tuple[optax.Updates, optax.OptState, Any]:
    """The inner's updates and state, and a tree of slopes where it applies decoupled decay."""
    if params is None or decoupled_decay is False:
        return *update(updates, state, params), None
    slopes = decay_slopes(update, updates, state, params, check=not decoupled_decay)
    if slopes is None:
        return *update(updates, state, params), None
    zeros = jax.tree.map(jnp.zeros_like, params)
    return *update(updates, state, zeros), jax.tree.structure(params).unflatten(slopes)
