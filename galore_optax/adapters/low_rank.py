"""W = a b with no frozen weight: the low-rank baseline of GaLore's table 2 (arXiv:2403.03507)."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax.adapters.base import Adapter, check_rank, multiply, wide
from galore_optax.projection import subspace
from galore_optax.serialization import pytree
from galore_optax.sharding import axis_specs, with_automatic_axes


@pytree
@dataclasses.dataclass(frozen=True)
class LowRank(Adapter):
    """W = a b; the field `base` is None."""

    @classmethod
    def create(cls, weight: Any, key: PRNGKeyArray, rank: int) -> Self:
        """Projects a weight onto `rank` of its leading directions, found by a random sketch.

        The rest of the weight is lost: a random one shrinks, a trained one is compressed.
        """
        check_rank(weight, rank)
        w = wide(weight)

        def factors(w: Array, key: Array) -> tuple[Array, Array]:
            a = _leading_directions(w, key, rank)
            return a.astype(weight.dtype), (a.mT @ w).astype(weight.dtype)

        def out_specs(_: Any) -> tuple[PartitionSpec, PartitionSpec]:
            *layers, rows, columns = axis_specs(w)
            return PartitionSpec(*layers, rows, None), PartitionSpec(*layers, None, columns)

        return cls(None, *with_automatic_axes(factors, out_specs, w, key))

    def matrix(self) -> Float[Array, "*layers in out"]:
        """Returns a b."""
        return self.a @ self.b

    def times(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """Returns (rows a) b."""
        return multiply(multiply(rows, self.a), self.b)

    def restarted(self, key: PRNGKeyArray) -> Self:
        """Returns itself, as there is no weight to merge into."""
        return self


@functools.partial(jax.jit, static_argnames="rank")
def _leading_directions(
    w: Float[Array, "*layers in out"], key: PRNGKeyArray, rank: int
) -> Float[Array, "*layers in r"]:
    """Returns orthonormal columns that keep most of each matrix's energy."""
    start = jnp.eye(w.shape[-2], rank, dtype=w.dtype)

    def find(args: tuple[Array, Array]) -> Array:
        return subspace.refreshed(subspace.randomized, args[0], start, args[1])[0]

    # One matrix at a time, as factorizations of a batch can deadlock on a CPU.
    matrices = w.reshape(-1, *w.shape[-2:])
    found = jax.lax.map(find, (matrices, jax.random.split(key, len(matrices))))
    return found.reshape(*w.shape[:-1], rank)
