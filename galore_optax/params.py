"""The params that a transformation is given, as the tree of arrays that it needs.

`nnx.Optimizer` passes Variables to `init` only, and stores what `init` returns for one as the value
of a Variable. That fails where a state has several arrays for one param (codes and scales, the
matrices of a stack, the bases of two sides), so states are made from params without Variables.
Where params and gradients are a state of NNX themselves (`nnx.split`), an update is made of their
arrays, and is returned in Variables again. Flax is not imported for it.
"""

import functools
from collections.abc import Callable
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
    return jax.tree.map(_value, tree, is_leaf=_is_variable)


def with_variables(tree: Any, like: Any) -> Any:
    """Puts what is in a tree into Variables where the tree `like` has them."""
    leaves, structure = jax.tree.flatten(like, is_leaf=_is_variable)
    if not any(map(_is_variable, leaves)):
        return tree

    def one(x: Any, new: Any) -> Any:
        parts = jax.tree.structure(_value(x)).flatten_up_to(new)
        return jax.tree.structure(x).unflatten(parts)

    return structure.unflatten(map(one, leaves, structure.flatten_up_to(tree)))


def of_arrays(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Makes the update of a transformation one that takes Variables and a model's functions."""

    @functools.wraps(update)
    def wrapped(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        arrays = without_variables(updates)
        new, state = update(arrays, state, with_updates(params, arrays), **extra_args)
        return with_variables(new, updates), state

    return wrapped


def _is_variable(x: Any) -> bool:
    return hasattr(type(x), "get_metadata")


def _value(x: Any) -> Any:
    children = jax.tree_util.default_registry.flatten_one_level
    return children(x)[0][0] if _is_variable(x) else x


def with_updates(params: Any, updates: Any) -> Any:
    """Replaces the params by None where an update is None, such as an Equinox model's functions.

    Variables are replaced by their values.
    """
    if params is None:
        return None
    params, updates = without_variables(params), without_variables(updates)

    def is_none(x: Any) -> bool:
        return x is None

    return jax.tree.map(lambda u, p: None if u is None else p, updates, params, is_leaf=is_none)
