"""The params that a transformation is given, as the tree of arrays that it needs.

`nnx.Optimizer` passes Variables to `init` only, and stores what `init` returns for one as the value
of a Variable. That fails where a state has several arrays for one param (codes and scales, the
matrices of a stack, the bases of two sides), so states are made from params without Variables.
Flax is not imported for it.
"""

from typing import Any

import jax
import jax.numpy as jnp


def for_init(params: Any) -> Any:
    """Replaces each Variable by its value, and each `jax.ShapeDtypeStruct` by zeros."""

    def array(x: Any) -> Any:
        return jnp.zeros_like(x) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(array, without_variables(params))


def without_variables(tree: Any) -> Any:
    """Replaces each Variable in a tree by its value."""

    def is_variable(x: Any) -> bool:
        return hasattr(type(x), "get_metadata")

    def value(x: Any) -> Any:
        children = jax.tree_util.default_registry.flatten_one_level
        return children(x)[0][0] if is_variable(x) else x

    return jax.tree.map(value, tree, is_leaf=is_variable)


def with_updates(params: Any, updates: Any) -> Any:
    """Replaces the params by None where an update is None, such as an Equinox model's functions."""
    if params is None:
        return None

    def is_none(x: Any) -> bool:
        return x is None

    return jax.tree.map(lambda u, p: None if u is None else p, updates, params, is_leaf=is_none)
