"""Flax NNX's Variables taken off a tree of params, without importing Flax.

`nnx.Optimizer` gives params to `init` within Variables, to `update` without, and holds what `init`
made of a Variable as the value of one. Where a state has several arrays in a param's place (codes
and scales, the matrices of a stack, the bases of two sides) it cannot put new ones back there. A
state that is made without Variables is held array by array.
"""

from typing import Any

import jax


def without_variables(tree: Any) -> Any:
    """The tree with the value of each Variable in its place.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from galore_optax.nnx_variables import without_variables
        >>> without_variables({"a": nnx.Param(jnp.ones(2)), "b": jnp.zeros(2)})
        {'a': Array([1., 1.], dtype=float32), 'b': Array([0., 0.], dtype=float32)}
    """

    def is_variable(x: Any) -> bool:
        return hasattr(type(x), "get_metadata")

    def value(x: Any) -> Any:
        if not is_variable(x):
            return x
        (held,), _ = jax.tree_util.default_registry.flatten_one_level(x)
        return held

    return jax.tree.map(value, tree, is_leaf=is_variable)
