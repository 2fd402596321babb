"""The metrics that a run writes: metrics.jsonl, and the same for TensorBoard."""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train.run.directory import write_at_once


class MetricsLog:
    """Appends a line to metrics.jsonl, and an event to tensorboard/, for each step and evaluation.

    Lines of a run's `directory` after `step`, from which it resumes, are dropped, and so is a line
    that a kill has truncated. Raises OSError if a file cannot be written.
    """

    def __init__(self, directory: Path, step: int = 0):
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
        from tensorboardX.record_writer import RecordWriter

        path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(directory) if line["step"] <= step]
        write_at_once(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        (directory / "tensorboard").mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        # On a full disk, the training loop would wait forever for the thread from which
        # tensorboardX's SummaryWriter writes.
        self._events = RecordWriter(str(directory / "tensorboard" / name))
        self._record(Event(file_version="brain.Event:2"))
        if step:  # TensorBoard then drops later steps of an earlier process
            start = SessionLog(status=SessionLog.START)
            self._record(Event(step=step + 1, session_log=start))

    def write(self, values: Mapping[str, float | int]) -> None:
        """Writes one line; a number that is not finite becomes null, as JSON has no NaN."""
        from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore

        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(finite) + "\n")
        kind = "evaluation" if "eval_loss" in values else "training"
        scalars = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=float(value))
            for name, value in values.items()
            if name != "step"
        ]
        self._record(Event(step=int(values["step"]), summary=Summary(value=scalars)))
        if kind == "evaluation":
            self._events.flush()

    def _record(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write(event.SerializeToString())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._events.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without one that a kill has truncated."""
    path, lines = directory / "metrics.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def evaluation_losses(directory: Path, metric: str | None = None) -> dict[int, float]:
    """The loss of each evaluation in a run's metrics.jsonl, by step; NaN if it was not finite.

    With a `metric`, of which the highest is the best, the negative of that instead.
    """
    lines = (line for line in read_metrics(directory) if "eval_loss" in line)
    return {line["step"]: score(line, metric) for line in lines}


def score(evaluation: Mapping[str, float | None], metric: str | None = None) -> float:
    """The number of an evaluation's line of which the lowest is the best."""
    value = evaluation[metric or "eval_loss"]
    return math.nan if value is None else value if metric is None else -value


def stalled(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than the best before them."""
    values = [math.inf if math.isnan(losses[step]) else losses[step] for step in sorted(losses)]
    before, last = values[:-patience], values[-patience:]
    return bool(before) and min(last) >= min(before)


def tokens_per_second(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Tokens per second over all steps of a run, from the lines of `read_metrics`."""
    lines = [line for line in lines if line.get("tokens_per_second")]
    counts = [0, *(line["tokens"] for line in lines)]
    tokens = [after - before for before, after in itertools.pairwise(counts)]
    seconds = sum(n / line["tokens_per_second"] for n, line in zip(tokens, lines, strict=True))
    return sum(tokens) / seconds if seconds else None
