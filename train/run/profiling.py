"""`--profile`: a trace of some steps, for TensorBoard and Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# Steps of a process before the trace: the first ones wait for data and for programs to load.
_BEFORE = 2


class Profiler:
    """Traces `steps` steps of a process, from its third on, into a folder; None traces nothing."""

    def __init__(self, folder: Path, steps: int | None, log: Callable[[str], object]):
        self._folder, self._steps, self._log = folder, steps, log
        self._done, self._running = 0, False

    def next_step(self, state: Any) -> None:
        """Called before each step with what the one before has returned."""
        if self._steps is None:
            return
        if self._done == _BEFORE:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        elif self._done == _BEFORE + self._steps:
            jax.block_until_ready(state)
            self.close()
        self._done += 1

    def close(self) -> None:
        """Ends the trace, if one is running, and says how to look at it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._log(
                f"profile: {self._folder}; `tensorboard --logdir` shows it with the package "
                "tensorboard-plugin-profile, ui.perfetto.dev opens perfetto_trace.json.gz below it"
            )
