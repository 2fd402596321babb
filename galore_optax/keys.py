"""Random keys for the leaves of a tree, each derived from the leaf's path alone."""

import zlib
from typing import Any

import jax
from jaxtyping import PRNGKeyArray


def for_path(key: PRNGKeyArray, path: Any) -> PRNGKeyArray:
    """Folds the number of a path into a key."""
    return jax.random.fold_in(key, number_of(path))


def number_of(path: Any) -> int:
    """The CRC-32 of a tree path, or of its `jax.tree_util.keystr`."""
    name = path if isinstance(path, str) else jax.tree_util.keystr(path)
    return zlib.crc32(name.encode())
