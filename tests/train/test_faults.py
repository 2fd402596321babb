"""Faults of the machine in the middle of a run: nothing that was computed is lost.

The long ones are `slow`: README.md has the command.
"""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from orbax.checkpoint._src.futures import future
from paths import ROOT
from small_pair import ended, free_port, pair, wait_for
from small_run import ADAMW, killed_command, losses, small

from train import prepare_c4
from train.data import sequences
from train.pretrain import main
from train.run.metrics import MetricsLog, read_metrics


@pytest.fixture
def c4(tmp_path, monkeypatch) -> dict:
    """Settings of a run that reads its data while it trains, each document from its own file."""
    monkeypatch.setattr(sequences, "BATCHES", 2)  # read ahead
    monkeypatch.setattr(prepare_c4, "DOCUMENTS_PER_FILE", 1)
    texts = [f"document {i}: some words and more of them" for i in range(260)]
    lines = [json.dumps({"text": text, "timestamp": "", "url": ""}) for text in texts]
    (tmp_path / "texts.json").write_text("\n".join(lines))
    prepare_c4.main(prepare_c4.PrepareC4((f"{tmp_path}/texts.json",), tmp_path / "data"))
    return {**ADAMW, "data": "c4", "data_dir": str(tmp_path / "data"), "save_every": 14}


def lose_files_at(step: int, data: str, monkeypatch) -> None:
    """Has every other file of a data set vanish in a step."""
    write = MetricsLog.write

    def losing(log, line):
        if line["step"] == step:
            for file in sorted(Path(data).rglob("c4-train*"))[1::2]:
                file.unlink()
        write(log, line)

    monkeypatch.setattr(MetricsLog, "write", losing)


def test_a_data_file_that_vanishes_in_mid_run_is_named_and_the_run_goes_on_after_its_last_step(
    c4, tmp_path, monkeypatch, capsys
):
    assert main(small(tmp_path / "whole", **c4)) == 0
    shutil.copytree(c4["data_dir"], tmp_path / "copy")
    with monkeypatch.context() as patch:
        lose_files_at(2, c4["data_dir"], patch)
        with pytest.raises(
            OSError, match=r"cannot read document \d+ of c4-train.array_record-\d+-of-\d+: "
        ):
            main(small(tmp_path / "run", **c4))
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert 2 < last < 14
    shutil.rmtree(c4["data_dir"])
    (tmp_path / "copy").rename(c4["data_dir"])
    assert main(small(tmp_path / "run", **c4, resume=True)) == 0
    assert f"resumed from step {last}" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_what_cannot_be_read_is_skipped_and_named_if_so_asked(c4, tmp_path, monkeypatch, capsys):
    lose_files_at(2, c4["data_dir"], monkeypatch)
    assert main(small(tmp_path / "run", **c4, skip_unreadable=True)) == 0
    assert "skipped: cannot read document" in capsys.readouterr().err
    assert read_metrics(tmp_path / "run")[-1]["step"] == 14
    with pytest.raises(ValueError, match="--skip-unreadable has no effect: --data builtin is"):
        main(small(tmp_path / "other", skip_unreadable=True))


def test_a_clock_that_jumps_changes_no_duration_and_fails_no_write(tmp_path, monkeypatch):
    jumps = itertools.cycle((1e9, 1e9 + 60))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(future, "time", SimpleNamespace(time=lambda: next(hours)))
    assert main(small(tmp_path / "run", **ADAMW)) == 0
    speeds = [
        line["tokens_per_second"] for line in read_metrics(tmp_path / "run") if "loss" in line
    ]
    assert all(10 < speed < 1e6 for speed in speeds)


def numbers(out: Path, step: int) -> dict:
    """The checksums of all arrays of a checkpoint."""
    found = json.loads((out / "checkpoints" / str(step) / "progress" / "metadata").read_text())
    return {part: found[part] for part in ("params", "rest")}


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_bit_for_bit_as_the_uninterrupted_one(tmp_path):
    settings = {"steps": 300, "save_every": 3, "eval_every": 50}
    assert main(small(tmp_path / "whole", **settings)) == 0
    out, generator = tmp_path / "run", random.Random(0)
    resumed = {**settings, "out": str(out), "resume": True}
    for _ in range(20):
        lines = len(read_metrics(out)) if out.is_dir() else 0
        command = killed_command(resumed, "metrics", -1, "SIGTERM")
        with subprocess.Popen(**command, stdout=subprocess.DEVNULL) as run:
            before = time.monotonic()
            while not out.is_dir() or len(read_metrics(out)) == lines:
                assert run.poll() is None
                assert time.monotonic() < before + 120
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 1))
            run.kill()
        assert run.returncode == -signal.SIGKILL  # else it has ended before
    assert main(small(**resumed)) == 0
    assert losses(out) == losses(tmp_path / "whole")
    assert numbers(out, 300) == numbers(tmp_path / "whole", 300)


@pytest.mark.slow
def test_of_two_processes_a_slow_one_is_waited_for_and_both_killed_in_a_save_repeat_their_losses(
    tmp_path,
):
    out = tmp_path / "run"
    codes, _ = ended(pair(out, ("save", "8", "SIGKILL")), 120)
    assert codes == [-signal.SIGKILL] * 2
    processes = pair(out, resume=True)
    wait_for(out, 10)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(15)
    processes[1].send_signal(signal.SIGCONT)
    assert ended(processes, 120)[0] == [0, 0]
    assert ended(pair(tmp_path / "whole"), 120)[0] == [0, 0]
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_numbers_of_one_host_that_reads_its_rows_alone_make_both_skip_a_step_if_not_finite(
    tmp_path,
):
    out = tmp_path / "run"
    assert ended(pair(out, ("nan", "3", "")), 120)[0] == [0, 0]
    lines = [line for line in read_metrics(out) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * 12
    assert lines[-1]["loss"] < 6


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
def test_wrong_flags_of_one_process_end_both_in_a_minute(tmp_path, wrong):
    command = [sys.executable, "-m", "train.pretrain", "--out", str(tmp_path / "run")]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    options: dict = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE}
    processes = [
        subprocess.Popen(
            [*command, str(i), *(["--rnak", "3"] if i == wrong else [])],
            **options,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    codes, errors = ended(processes, 60)
    assert codes == [2, 2]
    assert "error: Unrecognized options: --rnak" in errors[wrong]
    assert f"error: process {wrong} of the run has stopped: it says why" in errors[1 - wrong]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_process_alone_cannot_read_of_a_checkpoint_ends_both_and_is_named(tmp_path):
    out = tmp_path / "run"
    assert ended(pair(out, mesh="fsdp=8"), 120)[0] == [0, 0]
    (out / "summary.json").unlink()
    for file in out.glob("checkpoints/14/params/ocdbt.process_1/d/*"):
        file.write_bytes(file.read_bytes()[:1000])
    codes, errors = ended(pair(out, mesh="fsdp=8", resume=True), 120)
    assert codes == [2, 2]
    assert f"error: {out}/checkpoints/14 cannot be read" in errors[1]
    assert "move it away, and start all processes again with --resume" in errors[1]
    assert "another process of the run has ended" in errors[0]
    shutil.rmtree(out / "checkpoints" / "14")
    assert ended(pair(out, mesh="fsdp=8", resume=True), 120)[0] == [0, 0]
