"""Cuts a batch into microbatches, whose gradients are summed: a smaller one needs less memory."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from train.step.mesh import BATCH, batch_shards


def microbatches(batch: Mapping[str, Array], count: int, mesh: Mesh | None) -> dict[str, Array]:
    """Cuts a batch's arrays `(B, L)` into `count` microbatches, to `(A, B / A, L)`."""

    def cut(x: Array) -> Array:
        # Row i goes to microbatch i mod A: (B, L) -> (B/A, A, L) -> (A, B/A, L) moves nothing
        # between devices, as each holds a range of rows.
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *BATCH)))

    return {name: cut(x) for name, x in batch.items()}


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError unless a batch divides into microbatches, and these over the devices."""
    shards = batch_shards(mesh)
    if batch_size % accumulate or (batch_size // accumulate) % shards:
        raise ValueError(
            f"--batch-size {batch_size} with --accumulate {accumulate} cannot be split over "
            f"data * fsdp = {shards} devices: choose a multiple of {accumulate * shards}"
        )
