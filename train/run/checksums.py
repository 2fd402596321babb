"""Checksums of a checkpoint's arrays, computed where they are, and of its JSON; their verification.

Any change of one number changes its array's checksum; other changes do in all but one of 2**32
cases. The sum does not depend on how an array is split over devices, and takes one read of it.
"""

import json
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32

Tree = Any


def leaf_names(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by name; the types of its containers do not matter."""
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def checksums(tree: Tree) -> dict[str, int]:
    """The checksum of each array in a tree, by name."""
    found = jax.device_get(_checksums(leaf_names(tree)))
    return {name: int(value) for name, value in found.items()}


def check(name: str, tree: Tree, saved: Mapping[str, int]) -> None:
    """ValueError if an array of the item `name` has another checksum than when it was saved."""
    now = checksums(tree)
    if changed := [k for k, value in saved.items() if now[k] != value]:
        raise ValueError(f"{name}/{changed[0]} is not what was saved")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a checksum of all others, as JSON has them."""
    content = json.loads(json.dumps({k: v for k, v in content.items() if k != "checksum"}))
    text = json.dumps(content, sort_keys=True)
    return {**content, "checksum": zlib.crc32(text.encode())}


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: _checksum(x) for name, x in arrays.items()}


def _checksum(x: Array) -> UInt32[Array, ""]:
    """The sum of (2 i + 1) times the bits of number i, modulo 2**32."""
    words = _bits(x)
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


def _bits(x: Array) -> Array:
    """An array's numbers as unsigned integers of 32 bits; those of 64 bits are two."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype in (jnp.bool, jnp.int4, jnp.uint4):
        return x.astype(jnp.uint8).astype(jnp.uint32)
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    return lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32)
