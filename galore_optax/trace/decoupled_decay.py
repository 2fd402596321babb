"""Decoupled weight decay, recognised in an inner optimizer and applied to the whole matrix.

An optimizer inside GaLore sees projected weights, yet decay must reach all of W. It is recognised
in the traced update: an update that is affine in the params, with a slope that is one number for a
whole leaf, and a state that never sees the params' values.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from galore_optax.projection.leaf import Projection
from galore_optax.sharding import first_element
from galore_optax.trace.interpreter import depends, zeros

Update = Callable[
    [optax.Updates, optax.OptState, optax.Params | None], tuple[optax.Updates, optax.OptState]
]


def update_and_slopes(
    init: Callable[[optax.Params], optax.OptState],
    update: Update,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    decoupled_decay: bool | None,
) -> tuple[optax.Updates, optax.OptState, PyTree | None]:
    """An inner update, its decoupled weight decay taken out of it.

    Args:
        init: The inner's `init`.
        update: The inner's update, `(updates, state, params) -> (updates, state)`.
        updates: The inner's updates.
        state: The inner's state.
        params: The inner's params.
        decoupled_decay: Whether the use of params is decoupled decay; None finds out.

    Returns:
        The new updates (at params zero, if there is decay), the new state, and where there is decay
        a tree like params of slopes: minus learning rate times decay, None where there is none.
    """
    slopes = None
    if params is not None and decoupled_decay is not False:
        slopes = decay_slopes(init, update, updates, state, params, check=decoupled_decay is None)
    if slopes is None:
        return *update(updates, state, params), None
    zeros = jax.tree.map(jnp.zeros_like, params)
    return *update(updates, state, zeros), jax.tree.structure(params).unflatten(slopes)


def decay(
    slope: PyTree, projection: Projection | None, leaf: Float[Array, "..."]
) -> Float[Array, "..."] | None:
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


def decay_slopes(
    init: Callable[[optax.Params], optax.OptState],
    update: Update,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    check: bool = True,
) -> list[Array | None] | None:
    """Slopes of an update with respect to each leaf of the params, if they are decoupled decay.

    Args:
        init: The inner's `init`.
        update: The inner's update, `(updates, state, params) -> (updates, state)`.
        updates: Updates to trace with; their values are not used.
        state: State to trace with. Slopes may depend on its scalars, such as a step count.
        params: Params to trace with; their values are not used.
        check: Whether to return None for what is not decoupled decay; else the slopes at params
            zero are returned whatever they depend on.

    Returns:
        For each leaf of params, in the order of `jax.tree.leaves`, a scalar, or None where the
        leaf's update does not depend on params. None in place of the list where the use of params
        is not decoupled decay.
    """
    params_leaves, params_tree = jax.tree.flatten(params)
    if check:
        made = jax.make_jaxpr(lambda leaves: init(params_tree.unflatten(leaves)))(params_leaves)
        if any(depends(made, [True] * len(params_leaves))):
            return None
    rest_leaves, rest_tree = jax.tree.flatten((updates, state))
    all_leaves = params_leaves
    # Integers and empty leaves have no slope.
    sloped = [
        i for i, x in enumerate(all_leaves) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size > 0
    ]
    params_leaves = [all_leaves[i] for i in sloped]

    def apply(rest: Sequence[Array], leaves: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        updates, state = rest_tree.unflatten(rest)
        given = dict(zip(sloped, leaves, strict=True))
        params = params_tree.unflatten([given.get(i, x) for i, x in enumerate(all_leaves)])
        new_updates, new_state = update(updates, state, params)
        new_leaves = jax.tree.leaves(new_updates)
        return [new_leaves[i] for i in sloped], jax.tree.leaves(new_state)

    def slope(
        rest: Sequence[Array], leaves: Sequence[Array], tangents: Sequence[Array]
    ) -> list[Array]:
        return jax.jvp(lambda leaves: apply(rest, leaves)[0], (leaves,), (tangents,))[1]

    n_rest, n_params = len(rest_leaves), len(params_leaves)
    uses = depends(
        jax.make_jaxpr(apply)(rest_leaves, params_leaves), [False] * n_rest + [True] * n_params
    )
    in_updates, in_state = uses[:n_params], uses[n_params:]
    if check and any(in_state):
        return None
    if not any(in_updates):
        return [None] * len(all_leaves)
    ones = [jnp.ones_like(leaf) for leaf in params_leaves]
    traced = jax.make_jaxpr(slope)(rest_leaves, params_leaves, ones)
    if check:
        none, every = [False] * n_params, [True] * n_params
        on_params = depends(traced, [False] * n_rest + every + none)
        on_tangents = depends(traced, [False] * n_rest + none + every)
        # One number for a whole leaf: what has axes may enter the slope through a scalar only.
        of_arrays = [jnp.ndim(leaf) > 0 for leaf in rest_leaves]
        on_arrays = depends(traced, of_arrays + none + none, through_scalars=False)
        # A use of params without a derivative, as in a sign, is not affine.
        if any(on_params) or any(on_arrays) or on_tangents != in_updates:
            return None
    # A decay of zero, such as that of many recipes by default, needs no pass over the weights.
    in_updates = [used and not z for used, z in zip(in_updates, zeros(traced), strict=True)]
    slopes = slope(rest_leaves, [jnp.zeros_like(leaf) for leaf in params_leaves], ones)
    found: list[Array | None] = [None] * len(all_leaves)
    for i, s, used in zip(sloped, slopes, in_updates, strict=True):
        found[i] = first_element(s) if used else None
    return found
