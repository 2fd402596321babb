"""Random keys for the leaves of a tree, each derived from the leaf's path, and random bits."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, UInt32


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


def for_matrix(
    key: PRNGKeyArray, path: UInt32[Array, ""] | int, index: Int[Array, ""] | int, mode: int
) -> PRNGKeyArray:
    """The key of one side of one matrix, from the number of its path and its index in a stack.

    Hashed, as random bits are for rounding: `jax.random.fold_in`, of hundreds of operations for
    each leaf, took much of the time to compile a refresh.
    """
    first, second = words(key)
    matrix = hashed((first, jnp.asarray(index).astype(jnp.uint32)), jnp.uint32(path))
    count = len(jax.random.key_data(key))
    each = jnp.arange(mode * count, (mode + 1) * count, dtype=jnp.uint32)
    made = hashed((matrix, second), each)
    return jax.random.wrap_key_data(made, impl=jax.random.key_impl(key))


def words(key: PRNGKeyArray) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """Two of the words of a key, which has two with JAX's default generator."""
    data = jax.random.key_data(key)
    return data[0], data[-1]


def number_of(path: Any) -> int:
    """The CRC-32 of a tree path, or of its `jax.tree_util.keystr`."""
    name = path if isinstance(path, str) else jax.tree_util.keystr(path)
    return zlib.crc32(name.encode())


def hashed(
    seed: Sequence[Any] | Array, elements: UInt32[Array, "*s"], leaf: int = 0
) -> UInt32[Array, "*s"]:
    """Returns 32 bits that look random, from two words of seed, elements' numbers and a leaf's.

    Two rounds of Wellons' "lowbias32" hash (https://nullprogram.com/blog/2018/07/31/): a sixth of
    the operations of JAX's Threefry, which rounding does not need, and the same in a GPU's kernel.
    """
    x = elements
    for word in (seed[0] ^ np.uint32(leaf), seed[1]):
        x = x ^ word
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        x = x ^ (x >> 16)
    return x
