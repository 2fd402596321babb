"""Whether a transformation updates every leaf from that leaf's gradient alone.

What does not, such as clipping by the global norm, needs all gradients at once, and cannot run
where one layer's gradient is there at a time (`galore_optax.layerwise.step`). Read from the traced
update; nothing is computed.
"""

import jax
import numpy as np
import optax

from galore_optax.trace.interpreter import depends


def coupled_leaves(
    tx: optax.GradientTransformationExtraArgs, params: optax.Params, **extra_args: object
) -> tuple[str, str] | None:
    """Two leaves of which the first's update depends on the second's gradient, if there are any.

    A dependence through a scalar of the state, one or more updates later, counts too. One through
    an array of the state does not: it would have to hold something of several leaves.

    Args:
        tx: The transformation.
        params: Arrays or `jax.ShapeDtypeStruct`; their values are not used.
        **extra_args: Given to the update.

    Returns:
        The paths of the two; None where every leaf is updated by itself.

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
    scalars = [np.ndim(leaf) == 0 for leaf in jax.tree.leaves(state)]
    for i, path in enumerate(paths):
        gradient = [j == i for j in range(n)]
        stated = [False] * len(scalars)
        while True:
            outputs = depends(traced, [*gradient, *stated, *[False] * n])
            marks = zip(scalars, outputs[n:], strict=True)
            new = [scalar and mark for scalar, mark in marks]
            if new == stated:
                break
            stated = new
        for other, mark in zip(paths, outputs[:n], strict=True):
            if mark and other != path:
                return other, path
    return None
