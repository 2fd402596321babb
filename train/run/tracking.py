"""`--track`: metrics are sent to a service, too, besides metrics.jsonl and TensorBoard."""

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.run.cli import one_line
from train.run.directory import write_at_once


class Tracker(Protocol):
    """A service that gets a run's metrics. Another one is a class like `_Wandb` in `_TRACKERS`."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends the metrics of a step by the names that they have in TensorBoard."""

    def close(self) -> None:
        """Waits until all is sent."""


class _Wandb:
    """Weights & Biases: one run of the project galore-optax, which a resumed run goes on with."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        wandb = importlib.import_module("wandb")
        file = directory / "wandb-id"
        if not file.exists():
            write_at_once(file, secrets.token_hex(4))
        self._run = wandb.init(
            project="galore-optax",
            name=directory.name,
            id=file.read_text().strip(),
            resume="allow",
            dir=str(directory),
            config=dict(settings),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLflow: one run of the experiment galore-optax, which a resumed run goes on with."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self._mlflow = importlib.import_module("mlflow")
        file = directory / "mlflow-id"
        known = file.read_text().strip() if file.exists() else None
        if known is None:  # of a known run both are set
            self._mlflow.set_experiment("galore-optax")
        run = self._mlflow.start_run(run_id=known, run_name=None if known else directory.name)
        if known is None:
            write_at_once(file, run.info.run_id)
            self._mlflow.log_params(dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS = {"wandb": _Wandb, "mlflow": _Mlflow}


def check_tracker(name: str | None) -> None:
    """Raises ValueError unless the package of a service is installed."""
    try:
        if name is not None:
            importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"--track {name}: install it (pip install {name}), or leave it out"
        ) from None


def start_tracker(name: str | None, directory: Path, settings: Mapping[str, Any]) -> Tracker | None:
    """The service of a name; OSError if it cannot be reached, or refuses."""
    if name is None:
        return None
    try:
        return _TRACKERS[name](directory, settings)
    except Exception as error:  # of the service's package
        raise OSError(f"--track {name}: {one_line(error)}") from error
