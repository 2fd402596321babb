"""Bytes of weights and of optimizer states, by kind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from galore_optax.layerwise.backward import at
from galore_optax.layerwise.step import LayerwiseState
from galore_optax.stages import GaLoreState


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays (or `jax.ShapeDtypeStruct`) in a tree, on all devices."""
    # Of a number, as `optax.tree.set` puts a learning rate into a state, those of its array.
    return sum(np.size(x) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))


def state_bytes(state: optax.OptState) -> dict[str, int]:
    """Returns the bytes of an optimizer state by kind.

    Args:
        state: State of any transformation, of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
        `projections` (GaLore's bases), `moments` (all other arrays with axes, and what `recover`
        remembers) and `counters` (scalars, and the steps of GaLore's refreshes).

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import galore, state_bytes
        >>> state = galore(8, optax.adam(1e-3)).init({"w": jnp.ones((64, 256))})
        >>> state_bytes(state)["projections"], state_bytes(state)["moments"]
        (2048, 16384)
    """
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, GaLoreState | LayerwiseState))
    kinds = dict(projections=0, moments=0, counters=0)
    for part in parts:
        if isinstance(part, LayerwiseState):
            # Per layer: a scalar of each layer counts as a scalar, though they are stacked.
            one = jax.eval_shape(lambda stack: at(stack, 0), part.layers)
            layers = tree_bytes(part.layers) // max(1, tree_bytes(one))
            of_one, of_rest = state_bytes(one), state_bytes((part.count, part.norm, part.rest))
            kinds = {kind: kinds[kind] + layers * of_one[kind] + of_rest[kind] for kind in kinds}
            continue
        galore = isinstance(part, GaLoreState)
        if galore:
            kinds["projections"] += tree_bytes(part.bases)
            kinds["moments"] += tree_bytes(part.recovery)
            kinds["counters"] += tree_bytes(part._replace(bases=(), recovery=(), inner=()))
        for leaf in jax.tree.leaves(part.inner if galore else part):
            kinds["moments" if np.ndim(leaf) > 0 else "counters"] += tree_bytes(leaf)
    return kinds
