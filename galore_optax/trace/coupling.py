"""Whether a transformation updates every leaf from that leaf's gradient alone.

One that does not, such as clipping by the global norm, needs all gradients at once, and cannot run
layer by layer (`galore_optax.layerwise`).
"""

from typing import Any

import jax
import numpy as np
import optax

from galore_optax.trace.dependence import dependences


def coupled_leaves(
    tx: optax.GradientTransformationExtraArgs, params: optax.Params, **extra_args: object
) -> tuple[str, str] | None:
    """The paths of two leaves, the first of which is updated by the second's gradient.

    A dependence through a scalar of the state, one or more updates later, counts too. One through
    an array of the state does not: the array would have to hold something of several leaves.

    Args:
        tx: The transformation.
        params: Arrays or `jax.ShapeDtypeStruct`; their values are not used.
        **extra_args: Passed to the update.

    Returns:
        None if every leaf is updated by itself.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax.trace.coupling import coupled_leaves
        >>> params = {"a": jnp.ones(3), "b": jnp.ones(3)}
        >>> coupled_leaves(optax.with_extra_args_support(optax.adamw(1e-3)), params)
        >>> coupled_leaves(optax.with_extra_args_support(optax.clip_by_global_norm(1.0)), params)
        ("['a']", "['b']")
    """
    state = jax.eval_shape(tx.init, params)

    def update(gradient: optax.Updates, state: optax.OptState, params: optax.Params) -> object:
        return tx.update(gradient, state, params, **extra_args)

    traced = jax.make_jaxpr(update)(params, state, params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    n = len(paths)
    nothing = [None] * n
    # What a scalar of the state is made of: found by following it over the updates.
    scalars = [i for i, x in enumerate(jax.tree.leaves(state)) if np.ndim(x) == 0]
    direct = dependences(traced, [*paths, *(None for _ in jax.tree.leaves(state)), *nothing])
    marks = [i if i in scalars else None for i, _ in enumerate(jax.tree.leaves(state))]
    through: list[Any] = dependences(traced, [*nothing, *marks, *nothing])
    made_of: dict[Any, frozenset[Any]] = {i: direct[n + i] for i in scalars}
    before = None
    while made_of != before:
        before = made_of
        made_of = {i: made_of[i].union(*(made_of[j] for j in through[n + i])) for i in scalars}
    for path, own, states in zip(paths, direct[:n], through[:n], strict=True):
        others = own.union(*(made_of[i] for i in states)) - {path}
        if others:
            return path, str(min(others, key=str))
    return None
