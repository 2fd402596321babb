"""Which program runs a step: the one that can refresh subspaces, or the one that cannot."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from galore_optax import GaLoreState
from train.step.state import Batch, Metrics, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class BySize:
    """A program for batches of several sizes, each compiled at its first use.

    `compiled` is the one for batches like `batch`.
    """

    def __init__(self, program: Any, batch: Mapping[str, Any], compiled: Any):
        self._program, self._compiled = program, {_size(batch): compiled}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs a step."""
        if (size := _size(batch)) not in self._compiled:
            self._compiled[size] = self._program.lower(state, batch).compile()
        return self._compiled[size](state, batch)


def _size(batch: Mapping[str, Any]) -> tuple[int, ...]:
    return batch["inputs"].shape


class Steps:
    """A training step, made of two programs.

    After a step that could refresh, the host waits for the state and reads in how many updates a
    refresh is due. Until then it runs the other program, and waits for nothing.
    """

    def __init__(self, with_refresh: Step, without: Step):
        self._with_refresh, self._without = with_refresh, without
        self._left: int | None = None  # updates until a refresh is due

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs a step."""
        if self._left is None:
            self._left = int(updates_to_refresh(state.optimizer))
        if self._left <= 0:
            self._left = None
            return self._with_refresh(state, batch)
        self._left -= 1
        return self._without(state, batch)


@jax.jit
def updates_to_refresh(optimizer: Any) -> Int[Array, ""]:
    """The number of updates before a refresh is due, of an optimizer's state with `GaLoreState`s.

    A step that is skipped is no update: then it is due later.
    """

    def is_galore(x: Any) -> bool:
        return isinstance(x, GaLoreState)

    states = (x for x in jax.tree.leaves(optimizer, is_leaf=is_galore) if is_galore(x))
    least = [
        jnp.min(state.next_refresh - jnp.expand_dims(jnp.asarray(state.count), -1))
        for state in states
        if jax.tree.leaves(state.bases)
    ]
    return jnp.min(jnp.array(least))
