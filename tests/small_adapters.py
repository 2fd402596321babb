"""A small GradNormLoRP adapter for tests of adapters."""

import jax
import jax.numpy as jnp

from galore_optax.adapters.gradnorm_lorp import GradNormLoRP

IN, OUT, RANK = 12, 20, 4


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def trained_a_while(*layers: int, seed: int = 0, dtype=jnp.float32) -> GradNormLoRP:
    """An adapter whose factors and magnitudes have moved away from where they begin."""
    return GradNormLoRP(
        base=normal(seed, *layers, IN, OUT, dtype=dtype),
        a=normal(seed + 1, *layers, IN, RANK, dtype=dtype),
        b=normal(seed + 2, *layers, RANK, OUT, dtype=dtype) / 4,
        magnitude=normal(seed + 3, *layers, OUT, dtype=dtype),
    )
