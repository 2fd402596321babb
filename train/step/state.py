"""What a training step changes (`TrainState`), and what it reports (`step_metrics`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

Params = dict[str, Any]
Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""] | Int[Array, ""]]


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Params  # the weights, some replaced by adapters
    optimizer: optax.ApplyIfFiniteState  # of the trained params, with the counts of skipped steps
    step: Int[Array, ""]  # batches seen, those of skipped steps too
    key: Key[Array, ""]  # of the run's seed; a step's randomness comes from it and `step`
    unsent: Any = None  # with --compress-bits what `train.step.eight_bits` has not sent yet

    def rest(self) -> dict[str, Any]:
        """All fields but the params, by name; `unsent` only if there is any."""
        fields = {name: x for name, x in self._asdict().items() if name != "params"}
        return {name: x for name, x in fields.items() if x is not None}


def step_key(key: Key[Array, ""], step: Int[Array, ""], use: int) -> Key[Array, ""]:
    """The random key of a step for one use: 0 rounding, 1 dropout, 2 restart."""
    return jax.random.fold_in(jax.random.fold_in(key, step), use)


def step_metrics(
    schedule: optax.Schedule,
    before: TrainState,
    optimizer: optax.ApplyIfFiniteState,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    tokens: Float[Array, ""],
) -> Metrics:
    """The metrics of a step, from the state before it and the optimizer's state after it."""
    applied = before.step - before.optimizer.total_notfinite
    refreshes = [x for _, x in optax.tree.get_all_with_path(optimizer, "refreshes")]
    counts = {"refreshes": jnp.asarray(optax.tree.sum(refreshes))} if refreshes else {}
    return counts | {
        "loss": loss,
        "learning_rate": jnp.asarray(schedule(applied), jnp.float32),
        "grad_norm": grad_norm.astype(jnp.float32),
        "tokens": tokens,
        "skipped": optimizer.total_notfinite,
        "skipped_in_a_row": optimizer.notfinite_count,
    }
