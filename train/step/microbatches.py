"""Where a batch is cut into microbatches (`--accumulate`)."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from train.step.mesh import BATCH
from train.step.state import Batch


def microbatches(batch: Batch, accumulate: int, mesh: Mesh | None) -> dict[str, Array]:
    """Cuts a batch's arrays `(B, L)` into microbatches `(A, B / A, L)`."""

    def cut(x: Array) -> Array:
        # Row i goes to microbatch i mod A: (B, L) -> (B/A, A, L) -> (A, B/A, L) moves nothing
        # between devices, as each holds a range of rows.
        x = x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *BATCH)))

    return {name: cut(x) for name, x in batch.items()}
