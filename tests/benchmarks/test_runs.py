"""Records of finished runs, with which a table of many hours is continued elsewhere."""

import dataclasses
import json
from pathlib import Path

import pytest
from paths import ROOT

from benchmarks import glue, glue_peers, quality
from benchmarks.bfloat16 import BFloat16, row
from benchmarks.quality import run_name
from benchmarks.runs import Table, finished, read_records
from docs.frontier import perplexities

# A program that trains: its summary is what --steps said, or it fails after the metrics of --lines.
PROGRAM = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(flags["--out"])
out.mkdir()
(out / "config.json").write_text(json.dumps({"max_skipped": 2}))
if "--lines" in flags:
    (out / "metrics.jsonl").write_text(flags["--lines"])
    sys.exit(1)
(out / "summary.json").write_text(json.dumps({"steps": flags["--steps"]}))
"""
WORDS = ["--optimizer", "adamw", "--learning-rate", 0.001]


def finish(out: Path, perplexity: float) -> None:
    out.mkdir(parents=True)
    places = {"out": str(out), "data_dir": str(out.parents[1])}
    (out / "config.json").write_text(json.dumps({"steps": 5, **places}))
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


def test_a_finished_run_of_other_flags_is_not_taken_for_the_one_that_is_asked_for(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "program.py").write_text(PROGRAM)
    table = Table(tmp_path, tmp_path / "runs")
    with pytest.raises(SystemExit, match="1"):  # nothing is trained
        finished(table, "no.program", "galore-0.01-0", ["--steps", 4000])
    for _ in range(2):
        found = finished(table, "program", "galore-0.01-0", ["--steps", 1000])
        assert found == {"steps": "1000"}
    with pytest.raises(SystemExit, match=r"galore-0\.01-0 was trained with --steps 1000: name"):
        finished(table, "program", "galore-0.01-0", ["--steps", 4000])


def test_a_finished_run_of_another_model_or_of_other_data_is_not_taken_either(tmp_path):
    table = Table(tmp_path / "data", tmp_path / "runs", tmp_path / "records.jsonl")
    finish(table.out / "a", 7.0)
    places = {"init": str(tmp_path / "base"), "data_dir": str(tmp_path / "data")}
    (table.out / "a/config.json").write_text(json.dumps(places))
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for init in ("link", "base"):  # the record of the first has no place for the other's name
        alone = dataclasses.replace(table, records=tmp_path / f"{init}.jsonl")
        found = finished(alone, "no.program", "a", WORDS, tmp_path / init)
        assert found == {"eval_perplexity": 7.0}
    other = tmp_path / "large"
    with pytest.raises(SystemExit, match=f"trained with --init {places['init']}: name another"):
        finished(table, "no.program", "a", WORDS, other)
    moved = dataclasses.replace(table, data_dir=tmp_path / "more")
    with pytest.raises(SystemExit, match=f"trained with --data-dir {places['data_dir']}: name an"):
        finished(moved, "no.program", "a", WORDS, tmp_path / "base")
    elsewhere = Table(tmp_path, tmp_path / "none", tmp_path / "base.jsonl")
    assert finished(elsewhere, "no.program", "a", WORDS, Path("base"))
    with pytest.raises(SystemExit, match=r"base\.jsonl: its a began with a model base"):
        finished(elsewhere, "no.program", "a", WORDS, other)


def test_a_run_whose_program_crashed_did_not_diverge(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "program.py").write_text(PROGRAM)
    table = Table(tmp_path, tmp_path / "runs")
    for name, skipped, diverged in (("a", (0, 1, 2), True), ("b", (0, 0, 1), False)):
        lines = [json.dumps({"step": i, "skipped": n}) for i, n in enumerate(skipped, 1)]
        flags = ["--lines", "\n".join(lines)]
        if diverged:
            assert finished(table, "program", name, flags) == {}
        else:
            with pytest.raises(SystemExit):
                finished(table, "program", name, flags)


def test_a_row_of_other_settings_is_not_taken_for_the_one_that_is_asked_for(tmp_path):
    config = BFloat16(out=tmp_path / "a.json", seeds=(0,), steps=600)
    made = {"steps": 600, "batch_size": 2, "eval_tokens": 30_000}
    done = {"adamw | a": {"perplexity": {"0": 7.0}, "settings": made}}
    row(config, "adamw", "a", {}, done)
    with pytest.raises(SystemExit, match=r"a\.json has runs with .*600.*: name another file"):
        row(dataclasses.replace(config, steps=1500), "adamw", "a", {}, done)


def test_a_method_that_diverged_at_each_rate_has_no_row(tmp_path, monkeypatch, capsys):
    numbers = ("weight_bytes", "optimizer_state_bytes", "trained_params", "tokens_per_second")
    summary = {"eval_perplexity": 7.0, **dict.fromkeys(numbers, 5)}

    def trained(_, name: str, __) -> dict:
        return summary if name.startswith("galore") else {}

    monkeypatch.setattr(quality, "trained", trained)
    quality.main(quality.Comparison(tmp_path, tmp_path, methods=("SCALE", "GaLore")))
    said = capsys.readouterr()
    assert "SCALE diverged at each learning rate" in said.err
    assert said.out.splitlines()[2:] == [x for x in said.out.splitlines() if "GaLore" in x]


def test_a_method_of_which_a_seed_diverged_has_a_row_that_says_so(tmp_path, monkeypatch, capsys):
    numbers = ("weight_bytes", "optimizer_state_bytes", "trained_params", "tokens_per_second")
    summary = {"eval_perplexity": 7.0, **dict.fromkeys(numbers, 5)}
    monkeypatch.setattr(
        quality, "trained", lambda _, name, __: summary if name.endswith("-0") else {}
    )
    quality.main(quality.Comparison(tmp_path, tmp_path, methods=("GaLore",), seeds=3))
    assert "| GaLore | inf ± inf (n=3) | 0.005 (" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value", "expected"), [("seeds", 0, "1 or"), ("rates", 4, "1 t")])
def test_no_table_is_made_of_no_runs(tmp_path, name, value, expected):
    config = glue.Glue(tmp_path, tmp_path / "out", init=tmp_path, **{name: value})
    with pytest.raises(SystemExit, match=f"--{name} {value}: expected {expected}"):
        glue.main(config)


def test_the_peer_trains_no_run_of_settings_that_it_does_not_have(tmp_path):
    record = json.loads((ROOT / "benchmarks/records/glue.jsonl").read_text().splitlines()[0])
    glue_peers._check_same(record)
    records = tmp_path / "records.jsonl"
    others = {**record, "config": {**record["config"], "schedule": "cosine"}}
    records.write_text(json.dumps(others))
    config = glue_peers.Peers(records, tmp_path, tmp_path, tmp_path / "out", "python", seeds=1)
    with pytest.raises(SystemExit, match="has schedule 'cosine', and the peer trains with 'linear"):
        glue_peers.main(config)


def test_the_picture_has_each_method_at_its_best_rate_with_the_seeds_there(tmp_path):
    table = Table(tmp_path, tmp_path / "runs", tmp_path / "records.jsonl")
    for rate, seed, perplexity in ((0.005, 0, 8.0), (0.01, 0, 7.0), (0.01, 1, 7.5), (0.005, 1, 1)):
        name = run_name("GaLore", rate, seed)
        finish(table.out / name, perplexity)
        finished(table, "no.program", name, WORDS)
    assert perplexities(tmp_path / "records.jsonl") == {"GaLore": [7.0, 7.5]}
