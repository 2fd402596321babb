"""The state that counts skipped steps, whose loss or gradient is not finite.

`train.step.ordinary` skips them, and `galore_optax.layerwise.step` with `--layerwise`.

A NaN in a single gradient would stay in the moments and the weights for good, and bfloat16 and high
learning rates do produce some. `optax.apply_if_finite`, whose state is used here, looks at the
gradient alone, cannot keep a refreshed basis, and gives up after some errors in a row; here the
trainer stops the run instead (`--max-skipped`).
"""

from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from train.step.mesh import replicated


def init(inner: optax.OptState) -> optax.ApplyIfFiniteState:
    """The optimizer's state, with no step skipped yet."""
    none = jnp.zeros((), jnp.int32)
    return optax.ApplyIfFiniteState(none, jnp.array(True), none, inner)


def shardings(mesh: Mesh, inner: Any) -> optax.ApplyIfFiniteState:
    """The shardings of `init`'s result, from those of the optimizer's state."""
    whole = replicated(mesh)
    return optax.ApplyIfFiniteState(whole, whole, whole, inner)  # pyrefly: ignore


def skipping(state: optax.ApplyIfFiniteState) -> bool:
    """Whether the last step was skipped."""
    return int(state.notfinite_count) > 0


def counted(
    before: optax.ApplyIfFiniteState, finite: Bool[Array, ""], inner: optax.OptState
) -> optax.ApplyIfFiniteState:
    """The state after a step that was applied or skipped."""
    in_a_row = jnp.where(finite, 0, before.notfinite_count + 1)
    return optax.ApplyIfFiniteState(in_a_row, finite, before.total_notfinite + ~finite, inner)
