"""The lines of metrics.jsonl, and what is concluded from them."""

import json
import math

import pytest

from train.run.metrics import (
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
