"""The metrics that a run writes: metrics.jsonl, and the same for TensorBoard."""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.run.directory import write_at_once
from train.run.tracking import Tracker


class MetricsLog:
    """Appends a line to metrics.jsonl, and an event to tensorboard/, for each step and evaluation.

    In a run's `directory` it goes on after the lines that `keep_own` has left. `settings` are
    TensorBoard's hyperparameters; the `tracker` gets what TensorBoard gets. Raises OSError if a
    file cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any] | None = None,
        tracker: Tracker | None = None,
    ):
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
        from tensorboardX.record_writer import RecordWriter

        self._file = (directory / "metrics.jsonl").open("a", buffering=1)
        (directory / "tensorboard").mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        # On a full disk, the training loop would wait forever for the thread from which
        # tensorboardX's SummaryWriter writes.
        self._events = RecordWriter(str(directory / "tensorboard" / name))
        self._record(Event(file_version="brain.Event:2"))
        # TensorBoard then drops this and later steps of an earlier process.
        first = 1 + max((line["step"] for line in read_metrics(directory)), default=-1)
        self._record(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self._tracker, self._explained = tracker, dict(MEANINGS)
        for summary in _hyperparameters(settings or {}):
            self._record(Event(summary=summary))

    def write(self, values: Mapping[str, float | int]) -> None:
        """Writes one line; a number that is not finite becomes null, as JSON has no NaN."""
        from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore
        from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata  # pyrefly: ignore

        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(finite) + "\n")
        kind = "evaluation" if "eval_loss" in values else "training"
        scalars = []
        for name, value in values.items():
            if name != "step":
                # TensorBoard keeps the first description of a tag.
                told = self._explained.pop(name, "")
                scalar = SummaryMetadata.PluginData(plugin_name="scalars")
                described = SummaryMetadata(summary_description=told, plugin_data=scalar)
                about = {"metadata": described} if told else {}
                tag = f"{kind}/{name}"
                scalars.append(Summary.Value(tag=tag, simple_value=float(value), **about))
        step = int(values["step"])
        self._record(Event(step=step, summary=Summary(value=scalars)))
        if self._tracker is not None:
            self._tracker.log({x.tag: x.simple_value for x in scalars}, step)
        if kind == "evaluation":
            self._events.flush()

    def _record(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write(event.SerializeToString())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._events.close()
        if self._tracker is not None:
            self._tracker.close()


# What TensorBoard says of a metric.
MEANINGS = {
    "loss": "Mean loss of the step's tokens, in nats.",
    "grad_norm": "Global norm of the gradient, before it is clipped.",
    "skipped": "Steps so far whose loss or gradient was not finite: no weight changed.",
    "refreshes": "Bases found so far: one for each matrix and refresh.",
    "tokens": "Tokens trained on so far.",
    "eval_perplexity": "exp of eval_loss: per token of this tokenizer.",
}


def _hyperparameters(settings: Mapping[str, Any]) -> list[Any]:
    """TensorBoard's summaries of a run's settings, by which its runs are compared."""
    from tensorboardX.summary import hparams  # pyrefly: ignore

    known = {k: v for k, v in settings.items() if isinstance(v, str | int | float)}
    return [*hparams(known, {"evaluation/eval_loss": 0})[:2]] if known else []


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without one that a kill has truncated."""
    path, lines = directory / "metrics.jsonl", []
    for text in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def keep_own(
    directory: Path, step: int, evaluations: Mapping[int, float], metric: str | None = None
) -> None:
    """Drops the lines of a run's metrics.jsonl that it does not have at the step it resumes from.

    These are lines of later steps, one that a kill has truncated, and evaluations that are not
    among `evaluations`: such as those of another run, or of the same with other settings.
    """

    def own(line: Mapping[str, Any]) -> bool:
        return _is_of(line, evaluations, metric) if "eval_loss" in line else line["step"] <= step

    kept = [json.dumps(line) + "\n" for line in read_metrics(directory) if own(line)]
    write_at_once(directory / "metrics.jsonl", "".join(kept))


def has_evaluation(
    directory: Path, step: int, evaluations: Mapping[int, float], metric: str | None = None
) -> bool:
    """Whether a run's metrics.jsonl has the line of a step that is among its `evaluations`."""
    lines = [x for x in read_metrics(directory) if "eval_loss" in x and x["step"] == step]
    return any(_is_of(line, evaluations, metric) for line in lines)


def _is_of(line: Mapping[str, Any], evaluations: Mapping[int, float], metric: str | None) -> bool:
    """Whether an evaluation's line is of one of a run's `evaluations`."""
    known, found = evaluations.get(line["step"]), score(line, metric)
    return known == found or (known is not None and math.isnan(known) and math.isnan(found))


def evaluation_losses(
    directory: Path, metric: str | None = None, last: float = math.inf
) -> dict[int, float]:
    """The loss of each evaluation in a run's metrics.jsonl, by step; NaN if it was not finite.

    With a `metric`, whose highest value is the best, its negative instead. Evaluations after the
    step `last` are left out.
    """
    lines = (line for line in read_metrics(directory) if "eval_loss" in line)
    return {line["step"]: score(line, metric) for line in lines if line["step"] <= last}


def score(evaluation: Mapping[str, float | None], metric: str | None = None) -> float:
    """The number of an evaluation's line of which the lowest is the best; NaN if it has none."""
    value = evaluation.get(metric or "eval_loss")
    if not isinstance(value, int | float):
        return math.nan
    return value if metric is None else -value


def stalled(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than the best before them."""
    values = [math.inf if math.isnan(losses[step]) else losses[step] for step in sorted(losses)]
    before, last = values[:-patience], values[-patience:]
    return bool(before) and min(last) >= min(before)


def given_up(lines: Sequence[Mapping[str, Any]], max_skipped: int) -> int | None:
    """The last applied step of a run that stopped after `max_skipped` steps in a row, else None.

    The weights that such a step has made may be unusable.
    """
    lines, in_a_row = [line for line in lines if "skipped" in line], 0
    while in_a_row < len(lines):
        line, before = lines[-1 - in_a_row], lines[: -1 - in_a_row][-1:]
        if line["skipped"] == (before[0]["skipped"] if before else 0):
            break
        in_a_row += 1
    return lines[-1]["step"] - in_a_row if in_a_row >= max_skipped else None


def tokens_per_second(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Tokens per second over all steps of a run, from the lines of `read_metrics`."""
    lines = [x for x in lines if x.get("tokens_per_second") and "tokens" in x]
    counts = [0, *(line["tokens"] for line in lines)]
    tokens = [after - before for before, after in itertools.pairwise(counts)]
    seconds = sum(n / line["tokens_per_second"] for n, line in zip(tokens, lines, strict=True))
    return sum(tokens) / seconds if seconds else None
