"""Random keys for the leaves of a tree, each derived from the leaf's path alone."""

import zlib
from typing import Any

import jax
from jaxtyping import PRNGKeyArray


def path_hash(path: str) -> int:
    """Returns the CRC-32 of a path as `jax.tree_util.keystr` writes it."""
    return zlib.crc32(path.encode())


def for_path(key: PRNGKeyArray, path: Any) -> PRNGKeyArray:
    """Folds the hash of a tree path, or of its `jax.tree_util.keystr`, into a key."""
    name = path if isinstance(path, str) else jax.tree_util.keystr(path)
    return jax.random.fold_in(key, path_hash(name))
