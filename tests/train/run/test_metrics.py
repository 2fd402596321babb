"""The lines of metrics.jsonl, and what is concluded from them."""

import itertools
import json
import math
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore

from train.run.metrics import (
    MetricsLog,
    evaluation_losses,
    has_evaluation,
    keep_own,
    read_metrics,
    stalled,
)


def test_the_best_evaluation_has_the_lowest_loss_or_the_highest_metric(tmp_path):
    lines = [
        {"step": 0, "eval_loss": 0.7, "eval_metric": 0.1},
        {"step": 1, "loss": 0.5},
        {"step": 2, "eval_loss": None, "eval_metric": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert evaluation_losses(tmp_path) == {0: 0.7, 2: pytest.approx(math.nan, nan_ok=True)}
    assert evaluation_losses(tmp_path, "eval_metric")[0] == -0.1


def test_a_resumed_run_keeps_its_own_lines_alone(tmp_path):
    lines = [
        {"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": None},
        {"step": 2, "eval_loss": 0.1}, {"step": 2, "loss": 0.4}, {"step": 4, "eval_loss": 0.2},
        {"step": 5, "loss": 0.3},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"st')
    keep_own(tmp_path, 4, {0: 3.0, 2: math.nan})
    assert read_metrics(tmp_path) == [*lines[:3], lines[4]]
    known = {0: 3.0, 1: 0.5, 2: math.nan, 4: 0.3}
    found = [step for step in known if has_evaluation(tmp_path, step, known)]
    assert found == [0, 2]


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 2.0], 1, False),
        ([3.0, 3.0], 1, True),
        ([3.0, 4.0, 2.5], 2, False),
        ([2.0, 4.0, 2.5], 2, True),
        ([2.0, math.nan], 1, True),
        ([math.nan, 2.0], 1, False),
        ([4.0, 2.0, 3.0, 3.0], 3, False),
    ],
)
def test_a_run_stalls_after_evaluations_that_are_no_better(losses, patience, ends):
    assert stalled(dict(enumerate(losses)), patience) == ends


@pytest.mark.parametrize("saved", [None, 0, 2])
def test_tensorboard_has_each_step_of_a_resumed_run_once(tmp_path, saved):
    """`saved`: the step of the checkpoint, if there is one, from which it is resumed."""
    steps, first = [0, 1, 2, 3], 0 if saved is None else saved + 1
    for begin in (0, first):
        own = {step: 3.0 for step in steps if step < begin}
        keep_own(tmp_path, saved or 0, own)
        with closing(MetricsLog(tmp_path)) as log:
            for step in steps[begin:]:
                if step:
                    log.write({"step": step, "loss": float(begin)})
                log.write({"step": step, "eval_loss": 3.0})
    events = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.name)
    found: list[tuple[int, str]] = []
    for event in itertools.chain.from_iterable(map(events_of, events)):
        if event.HasField("session_log"):  # as TensorBoard reads it
            found = [x for x in found if x[0] < event.step]
        found += [(event.step, value.tag) for value in event.summary.value]
    tags = "evaluation/eval_loss", "training/loss"
    assert sorted(found) == sorted(
        (n, tag) for n in steps for tag in tags if (n, tag) != (0, tags[1])
    )


def events_of(path: Path) -> Iterator[Event]:
    """The events in a file of records: length, its checksum, the event, its checksum."""
    with path.open("rb") as file:
        while header := file.read(12):
            yield Event.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
            file.read(4)
