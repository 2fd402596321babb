"""Whether an inner optimizer keeps values of the params in its state, as L-BFGS and Prodigy do.

Inside GaLore such a value is PᵀW in the basis of its day. When the basis changes, PᵀW jumps, far
more than any step of training moves it, and a remembered one can no longer be compared with it.
Moments are another matter: they are averages of gradients, most of which a new basis still holds.
"""

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from galore_optax.trace.interpreter import depends, traced_update


def remembers_params(
    inner: optax.GradientTransformation, params: optax.Params, projected: PyTree = True
) -> bool:
    """Whether the state of `inner` holds values of the params, found without computing anything.

    It does where an array in the state depends on the params' values, either as `init` makes it
    (DoG, Prodigy, schedule-free, MADGRAD), or after one update without depending on the gradient
    (L-BFGS, whose `init` makes zeros). An average of gradients to which L2 regularization or a
    trust ratio was applied depends on both, and is a moment. Scalars, such as a norm, do not count:
    they belong to no basis.

    Args:
        inner: The transformation. Its `update` is traced with optax's usual extra arguments
            (`value`, `grad`, `value_fn`, `obj_fn`, `grad_fn`); one that wants others is judged by
            its `init` alone.
        params: Its params: arrays or `jax.ShapeDtypeStruct`; their values are not used.
        projected: A tree like params, or a prefix of one, of whether a leaf counts: what is
            remembered of a leaf that is not projected stays valid.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax.trace.remembered_params import remembers_params
        >>> params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
        >>> remembers_params(optax.adamw(1e-3), params)
        False
        >>> remembers_params(optax.lbfgs(), params)
        True
    """
    inner = optax.with_extra_args_support(inner)
    # Without shardings, which some updates cannot be traced with, and which change nothing here.
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    counts = [bool(c) for c in jax.tree.leaves(jax.tree.broadcast(projected, params))]
    if not any(counts):
        return False
    made, state = jax.make_jaxpr(inner.init, return_shape=True)(params)
    if any(_arrays(made, depends(made, counts))):
        return True

    updated = traced_update(inner, params, state)
    if updated is None:
        return False
    others = [False] * len(jax.tree.leaves(state))
    nothing = [False] * len(counts)
    on_params = depends(updated, nothing + counts + others)
    # Its bare values: a step that is skipped for its gradient still keeps the params of the others.
    on_updates = depends(updated, counts + nothing + others, through_choices=False)
    kept = [p and not u for p, u in zip(on_params, on_updates, strict=True)]
    return any(_arrays(updated, kept))


def _arrays(traced: jax.extend.core.ClosedJaxpr, marks: list[bool]) -> list[bool]:
    return [mark and np.ndim(aval) > 0 for mark, aval in zip(marks, traced.out_avals, strict=True)]
