"""Random keys for the leaves of a tree, each derived from the leaf's path alone."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray


def is_key(seed: Any) -> bool:
    """Whether it is one random key of JAX, typed or raw."""
    if not isinstance(seed, jax.Array):
        return False
    typed = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    return seed.ndim == (0 if typed else 1) and (typed or seed.dtype == jnp.uint32)


def of_seed(seed: Any) -> PRNGKeyArray:
    """The key of a seed: an integer, or a key already."""
    if not is_key(seed):
        return jax.random.key(seed)
    typed = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    return seed if typed else jax.random.wrap_key_data(seed)


def for_path(key: PRNGKeyArray, path: Any) -> PRNGKeyArray:
    """Folds the number of a path into a key."""
    return jax.random.fold_in(key, number_of(path))


def number_of(path: Any) -> int:
    """The CRC-32 of a tree path, or of its `jax.tree_util.keystr`."""
    name = path if isinstance(path, str) else jax.tree_util.keystr(path)
    return zlib.crc32(name.encode())
