"""Whether a transformation updates every leaf from that leaf's gradient alone.

What does not, such as clipping by the global norm, needs all gradients at once, and cannot run
where one layer's gradient is known at a time (`galore_optax.layerwise`).
"""

import jax
import numpy as np
import optax

from galore_optax.trace.dependence import dependences


def coupled_leaves(
    tx: optax.GradientTransformationExtraArgs, params: optax.Params, **extra_args: object
) -> tuple[str, str] | None:
    """The paths of two leaves of which the first's update depends on the second's gradient.

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
        ("['b']", "['a']")
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
    named = {i: f"state {i}" for i in scalars}
    marks = [named.get(i) for i, _ in enumerate(jax.tree.leaves(state))]
    through = dependences(traced, [*nothing, *marks, *nothing])
    made_of = {named[i]: set(direct[n + i]) for i in scalars}
    changed = True
    while changed:
        changed = False
        for i in scalars:
            new = made_of[named[i]].union(*(made_of[name] for name in through[n + i]))
            changed |= new != made_of[named[i]]
            made_of[named[i]] = new
    for path, own, states in zip(paths, direct[:n], through[:n], strict=True):
        others = own.union(*(made_of[name] for name in states)) - {path}
        if others:
            return path, min(others)
    return None
