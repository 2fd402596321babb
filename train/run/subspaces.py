"""`--energy-every`: what GaLore's bases keep of the gradient, and how far they turn, by layer."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.config.settings import ResolvedTraining
from train.run.directory import write_at_once
from train.run.parts import Log, Parts
from train.step.energy import bases_of, make_energies, turned
from train.step.state import Batch, TrainState

_FILE = "subspace.jsonl"


class Subspaces:
    """Measures a run's bases, and appends a line to subspace.jsonl for each measurement.

    Lines of a run's `directory` after `step`, from which it resumes, are dropped. A process
    measures how far bases turned from its second measurement on.
    """

    def __init__(
        self, config: ResolvedTraining, parts: Parts, directory: Path, step: int, log: Log
    ):
        self._energies, self._file, self._log = make_energies(config, parts), directory / _FILE, log
        kept = [line for line in read_subspaces(directory) if line["step"] < step]
        write_at_once(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._before: dict[str, Any] = {}

    def measure(self, step: int, state: TrainState, batch: Batch) -> None:
        """Measures the bases before the step that follows `step`, on the gradient of its batch."""
        energy = self._listed(self._energies(state, batch))
        # One param's bases before are on the device at a time.
        now = bases_of(state.optimizer.inner_state)
        turn = self._listed({x: turned(old, now[x], x) for x, old in self._before.items()})
        self._before = jax.device_get(now)
        line = {"step": step, "energy": energy, "turned": turn}
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        means = [f"{_mean(energy):.1%} of the gradient's energy kept"]
        means += [f"turned by {_mean(turn):.1%}"] if turn else []
        self._log(f"subspaces before step {step + 1}: {', '.join(means)}")

    def _listed(self, found: dict[str, Any]) -> dict[str, list[float | None]]:
        values = {name: np.asarray(x, np.float64) for name, x in found.items()}
        return {k: [y if np.isfinite(y) else None for y in x.tolist()] for k, x in values.items()}


def read_subspaces(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's subspace.jsonl, without one that a kill has truncated."""
    file, lines = directory / _FILE, []
    for text in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _mean(found: dict[str, list[float | None]]) -> float:
    values = [x for layers in found.values() for x in layers if x is not None]
    return float(np.mean(values)) if values else float("nan")
