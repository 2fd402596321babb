"""Records of finished runs, with which a table of many hours is continued elsewhere."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import run_name
from benchmarks.runs import Table, finished, read_records
from docs.frontier import perplexities

WORDS = ["--optimizer", "adamw", "--learning-rate", 0.001]


def finish(out: Path, perplexity: float) -> None:
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"steps": 5, "out": "a", "data_dir": "b"}))
    (out / "summary.json").write_text(json.dumps({"eval_perplexity": perplexity}))


def test_a_finished_run_is_recorded_once_and_read_where_its_folder_is_not(tmp_path):
    table = Table(tmp_path, tmp_path / "runs", tmp_path / "records.jsonl")
    finish(table.out / "a", 7.0)
    elsewhere = Table(tmp_path, tmp_path / "none", table.records)
    for place in (table, table, elsewhere):
        assert finished(place, "no.program", "a", WORDS) == {"eval_perplexity": 7.0}
    (record,) = read_records(table.records)
    assert record["config"] == {"steps": 5}
    with pytest.raises(SystemExit, match="its a was trained with --optimizer adamw"):
        finished(elsewhere, "no.program", "a", [*WORDS, "--seed", 1])


def test_the_picture_has_each_method_at_its_best_rate_with_the_seeds_there(tmp_path):
    table = Table(tmp_path, tmp_path / "runs", tmp_path / "records.jsonl")
    for rate, seed, perplexity in ((0.005, 0, 8.0), (0.01, 0, 7.0), (0.01, 1, 7.5), (0.005, 1, 1)):
        name = run_name("GaLore", rate, seed)
        finish(table.out / name, perplexity)
        finished(table, "no.program", name, WORDS)
    assert perplexities(tmp_path / "records.jsonl") == {"GaLore": [7.0, 7.5]}
