"""A whole run: trained, stopped, killed, resumed, refused."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import (
    ADAMW,
    everything_in,
    killed_command,
    losses,
    run_killed,
    small,
    spoil,
    topics,
    unfinished,
)

from train import pretrain
from train.config.resolve import load, resolve
from train.config.settings import Pretrain
from train.data.text import SPLITS
from train.pretrain import main
from train.run import assemble, training
from train.run.metrics import MetricsLog, read_metrics
from train.run.signals import StopRequest
from train.run.training import Training
from train.step import programs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that nothing interrupted, with all of its checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(small(out, keep=5)) == 0
    return out


def test_a_run_learns_and_leaves_what_the_readme_promises(finished):
    lines = read_metrics(finished)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 15))
    assert [line["step"] for line in evaluated] == [0, 7, 14]
    assert set(trained[0]) >= {"step", "loss", "learning_rate", "tokens", "tokens_per_second"}
    assert [line["tokens"] for line in trained] == [8 * 32 * step for step in range(1, 15)]
    # An untrained model is near the uniform distribution over 257 ids.
    assert evaluated[0]["eval_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert evaluated[-1]["eval_loss"] < 4.5
    assert evaluated[-1]["eval_perplexity"] == pytest.approx(math.exp(evaluated[-1]["eval_loss"]))
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["eval_loss"] == evaluated[-1]["eval_loss"]
    assert summary["weight_bytes"] == 4 * summary["params"]
    assert summary["optimizer_state_bytes"] < summary["adamw_state_bytes"]
    assert summary["peak_memory_bytes"] > 1e6
    assert summary["tokens_per_second"] > 0
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (finished / "checkpoints").iterdir()} >= {"12", "14"}


def test_patience_ends_a_run_after_evaluations_that_are_no_better(tmp_path, monkeypatch, capsys):
    # The compiled step is that of the run above.
    found = iter([5.0, 4.0, 4.0, 4.5])
    evaluated = assemble.Evaluation({"eval_loss": 0.0, "eval_perplexity": 1.0}, "")
    values = evaluated.values
    monkeypatch.setattr(
        assemble.TextParts,
        "evaluate",
        lambda *_: evaluated._replace(values=values | {"eval_loss": next(found)}),
    )
    out = tmp_path / "run"
    config = small(out, eval_every=2, save_every=4, patience=2)
    assert main(config) == 0
    assert "ended after step 6: no better in 2 evaluations" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["steps"] == 6
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"4", "6"}


def test_the_learning_rate_rises_then_falls_to_a_tenth(finished):
    rates = [line["learning_rate"] for line in read_metrics(finished) if "loss" in line]
    assert np.argmax(rates) == 2
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert rates[-1] == pytest.approx(0.001, rel=0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))


@pytest.mark.parametrize(
    ("where", "step", "checkpoints"),
    # Which checkpoint is whole when the kill comes is a race with the thread that writes them.
    [
        pytest.param("metrics", 11, (4, 8), marks=pytest.mark.slow),
        ("save", 12, (8, 12)),
        pytest.param("metrics", 2, (0,), marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_moment_repeats_the_uninterrupted_one_bit_for_bit(
    finished, tmp_path, where, step, checkpoints, capsys
):
    out = tmp_path / "run"
    assert run_killed({"out": str(out)}, where, step, "SIGKILL").returncode == -9
    if where == "metrics":  # and a line that the kill has cut
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 12, "lo')
    assert main(small(out, resume=True)) == 0
    said = capsys.readouterr().out
    assert any(
        f"resumed from step {c}" in said or f"starting at step {c}" in said for c in checkpoints
    )
    assert losses(out) == losses(finished)


def test_sigterm_saves_and_says_how_to_go_on(finished, tmp_path):
    out = tmp_path / "run"
    stopped = run_killed({"out": str(out)}, "metrics", 5, "SIGTERM")
    assert stopped.returncode == 128 + 15
    assert "Traceback" not in stopped.stderr
    command = stopped.stdout.strip().splitlines()[-1]
    assert command.endswith(f"-m train.pretrain --config {out}/config.json --resume")
    last = max(line["step"] for line in read_metrics(out))
    assert (out / "checkpoints" / str(last)).is_dir()
    assert last < 10
    file = out / "config.json"
    assert main(dataclasses.replace(load(file), config=str(file), resume=True)) == 0
    assert losses(out) == losses(finished)


def stopped_in_evaluation(step: int, config: Pretrain) -> None:
    """Runs until SIGTERM comes at the beginning of a step's evaluation."""
    evaluate = Training.evaluate

    def stop_and_evaluate(run, state):
        if run.host.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(run, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "evaluate", stop_and_evaluate)
        assert main(config) == 128 + 15


@pytest.mark.parametrize(
    "step", [pytest.param(0, marks=pytest.mark.slow), 7, pytest.param(14, marks=pytest.mark.slow)]
)
def test_an_evaluation_that_is_stopped_is_done_after_resuming(finished, tmp_path, step, capsys):
    out = tmp_path / "run"
    stopped_in_evaluation(step, small(out))
    assert f"stopped by SIGTERM after step {step}" in capsys.readouterr().out
    assert ("eval_loss", step) not in losses(out)
    assert main(small(out, resume=True)) == 0
    assert list(losses(out).items()) == list(losses(finished).items())


def test_the_best_checkpoint_is_kept_though_its_evaluation_was_stopped(tmp_path):
    out = tmp_path / "run"
    # A learning rate that makes the model worse from step to step.
    worse = ADAMW | {"keep": 1, "save_every": 7}
    worse |= {"learning_rate": 3.0, "warmup_steps": 13, "clip_norm": 1e9}
    stopped_in_evaluation(7, small(out, **worse))
    assert main(small(out, resume=True, **worse)) == 0
    assert losses(out)["eval_loss", 7] < losses(out)["eval_loss", 14]
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"7", "14"}


def test_one_process_at_a_time_trains_in_a_folder_and_a_killed_one_leaves_no_lock(
    finished, tmp_path
):
    out = tmp_path / "run"
    with subprocess.Popen(
        **killed_command({"out": str(out)}, "metrics", 5, "SIGSTOP"), stdout=subprocess.DEVNULL
    ) as first:
        try:
            assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
            before = everything_in(out)
            for resume in (False, True):
                with pytest.raises(ValueError, match="is in use: another process is writing"):
                    main(small(out, resume=resume))
            assert everything_in(out) == before
        finally:
            first.kill()
    assert main(small(out, resume=True)) == 0
    assert losses(out) == losses(finished)


def test_the_peak_of_memory_is_that_of_all_processes_of_a_run(tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(training, "peak_memory", lambda _: (10**15, "the first process"))
    stopped_in_evaluation(7, small(out, **ADAMW))
    monkeypatch.setattr(training, "peak_memory", lambda _: (5, "the second process"))
    assert main(small(out, resume=True, **ADAMW)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["peak_memory_bytes"] == 10**15
    assert summary["peak_memory_source"] == "the first process"


def test_a_run_goes_on_with_other_devices_and_workers(finished, tmp_path):
    out = unfinished(finished, tmp_path, "12", "14")
    assert main(small(out, resume=True, mesh="data=2,fsdp=2,tensor=2", workers=1)) == 0
    again, before = losses(out), losses(finished)
    assert again.keys() == before.keys()
    # float32 sums in another order.
    assert all(again[k] == pytest.approx(before[k], rel=1e-4) for k in before)
    assert json.loads((out / "config.json").read_text())["mesh"] == "data=2,fsdp=2,tensor=2"


def test_a_run_does_not_go_on_with_another_text(finished, tmp_path, monkeypatch):
    config = resolve(small(unfinished(finished, tmp_path), resume=True))
    for name, expected in ((None, None), ("train", "the text"), ("validation", "the validation t")):
        found = {split: topics(split)[: -1 if split == name else None] for split in SPLITS}
        monkeypatch.setattr(assemble, "load_text", lambda _, split, *__, found=found: found[split])
        run = Training(config, assemble.assemble(config, print), StopRequest(), print)
        error = pytest.raises(ValueError, match=f"another run: content of {expected}")
        with error if expected else nullcontext():
            run.restore()


def test_resuming_a_finished_run_says_so_and_does_nothing(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = everything_in(out)
    monkeypatch.setattr(pretrain, "assemble", None)  # neither data nor workers
    assert main(small(out, resume=True, workers=2)) == 0
    assert capsys.readouterr().out == f"the run in {out} is finished: nothing is left to do\n"
    assert everything_in(out) == before


def test_a_run_killed_before_its_summary_gets_the_same_one(finished, tmp_path):
    out = unfinished(finished, tmp_path)
    assert main(small(out, resume=True)) == 0
    before, after = (json.loads((r / "summary.json").read_text()) for r in (finished, out))
    assert losses(out) == losses(finished)
    same = set(before) - {"peak_memory_bytes"}
    assert {k: after[k] for k in same} == {k: before[k] for k in same}
    assert after["peak_memory_bytes"] >= before["peak_memory_bytes"]


def test_the_first_step_after_resuming_takes_the_time_since_then(finished, tmp_path):
    out = unfinished(finished, tmp_path, "14")
    start = time.perf_counter()
    assert main(small(out, resume=True)) == 0
    took = time.perf_counter() - start
    first = next(line for line in read_metrics(out) if line["step"] == 13)
    assert 8 * 32 / first["tokens_per_second"] < took


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(finished, tmp_path, capsys):
    out = unfinished(finished, tmp_path)
    spoil(out / "checkpoints" / "14")
    assert main(small(out, resume=True)) == 0
    said = capsys.readouterr().out
    assert "checkpoint 14 is damaged and passed over" in said
    assert "resumed from step 12" in said
    assert losses(out) == losses(finished)


def test_resume_without_a_run_starts_one_and_says_so(tmp_path, capsys):
    assert main(small(tmp_path / "new", resume=True, steps=1, warmup_steps=0, **ADAMW)) == 0
    assert "nothing to resume in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "has a run: add --resume"),
        ({"resume": True, "rank": 5}, r"has another run: --rank 4 \(now 5\)"),
        (
            {"resume": True, "seq_len": 16, "seed": 1},
            r"--seed 0 \(now 1\), --seq-len 32 \(now 16\)",
        ),
        ({"resume": True, "model": "tiny"}, r"--model micro \(now tiny\)"),
        ({"resume": True, "mesh": "data=3"}, "there are 8"),
        ({"resume": True, "mesh": "data=8", "accumulate": 2}, "accumulate"),
    ],
)
def test_a_run_directory_of_another_run_is_refused_and_not_touched(
    finished, tmp_path, changes, message
):
    out = unfinished(finished, tmp_path)
    before = everything_in(out)
    with pytest.raises(ValueError, match=message):
        main(small(out, **changes))
    assert everything_in(out) == before


def test_checkpoints_of_another_model_are_refused_and_not_touched(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rank": 5}))
    (out / "summary.json").unlink()
    before = everything_in(out)
    with pytest.raises(ValueError, match="another run: rank is 4 there and 5 here"):
        main(small(out, rank=5, resume=True))
    assert everything_in(out) == before


def test_a_folder_that_is_no_run_is_refused_and_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    for resume in (False, True):
        with pytest.raises(ValueError, match="not empty and not a run"):
            main(small(tmp_path, resume=resume))
    assert everything_in(tmp_path) == {"thesis.tex": b"chapter 1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "missing.json"}, "tokenizer.*cannot be read"),
        ({"data": "c4", "data_dir": "nowhere"}, "there is no data set c4/en"),
        ({"seq_len": 65}, "--seq-len 65: micro takes at most 64"),
        ({"batch_size": 12, "mesh": "data=8"}, "--batch-size 12 .* multiple of 8"),
        ({"mesh": "data=4"}, "asks for 4 devices, there are 8"),
    ],
)
def test_bad_input_creates_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(small(tmp_path / "runs" / "run", **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run"])
def test_an_unwritable_directory_is_an_error(out):
    with pytest.raises((ValueError, OSError), match=out.rsplit("/", 1)[0]):
        main(small(out))


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(finished, tmp_path):
    out = unfinished(finished, tmp_path, "12", "14")
    # Files end at 16 blocks of 512 bytes, as they would on a disk with no more room.
    command = killed_command({"out": str(out), "keep": 5, "resume": True}, "metrics", -1, "SIGKILL")
    command["args"] = ["sh", "-c", 'ulimit -f 16 && exec "$@"', "-", *command["args"]]
    command["env"]["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"  # it would not fit either
    stopped = subprocess.run(**command, capture_output=True, text=True, timeout=120, check=False)
    assert stopped.returncode == 2
    expected = f"error: cannot write a checkpoint to {out}/checkpoints: File too large\n"
    assert stopped.stderr == expected
    assert main(small(out, keep=5, resume=True)) == 0
    assert losses(out) == losses(finished)


@jax.custom_vjp
def with_nan_gradient(x):
    return x


with_nan_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.full_like(g, jnp.nan),))


def poison(monkeypatch, steps: set[int], *, only_gradient: bool):
    """Has the model give NaN, or a NaN gradient, for the batches of some steps."""
    put, make = training.put_batch, programs.make_forward
    batches = iter(range(1, 1000))

    def marking_put(mesh, batch):
        training = threading.current_thread() is not threading.main_thread()
        if training and next(batches) in steps:
            batch = {**batch, "positions": batch["positions"] - 1_000_000}
        return put(mesh, batch)

    def make_breaking_forward(graph, sequences):
        forward = make(graph, sequences)

        def breaking(params, batch):
            hidden, head = forward(params, batch)
            bad = batch["positions"][0, 0] < 0
            broken = with_nan_gradient if only_gradient else lambda x: x * jnp.nan
            return jax.lax.cond(bad, broken, lambda x: x, hidden), head

        return breaking

    monkeypatch.setattr(training, "put_batch", marking_put)
    monkeypatch.setattr(programs, "make_forward", make_breaking_forward)


@pytest.mark.parametrize("only_gradient", [False, True])
def test_steps_that_are_not_finite_are_skipped_counted_and_shown(
    tmp_path, monkeypatch, capsys, only_gradient
):
    poison(monkeypatch, {3, 4}, only_gradient=only_gradient)
    assert main(small(tmp_path / "run", optimizer="adamw", rank=None, update_proj_gap=None)) == 0
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2] + [2] * 10
    assert (lines[2]["loss"] is None) is not only_gradient
    assert lines[2]["grad_norm"] is None
    # A skipped step does not use up a learning rate.
    assert lines[2]["learning_rate"] == lines[3]["learning_rate"] == lines[4]["learning_rate"]
    assert lines[-1]["loss"] < 5
    assert "2 skipped (not finite)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"] == 2


def test_too_many_such_steps_stop_the_run_and_name_the_last_good_checkpoint(
    tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, set(range(6, 100)), only_gradient=False)
    settings = {"optimizer": "adamw", "rank": None, "update_proj_gap": None, "max_skipped": 3}
    assert main(small(tmp_path / "run", **settings)) == 1
    said = capsys.readouterr().out.strip().splitlines()[-2]
    assert "stopped: 3 steps in a row" in said
    last = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert said.count(str(tmp_path / "run" / "checkpoints" / str(last))) == 1
    assert len([1 for line in read_metrics(tmp_path / "run") if "loss" in line]) == 8


def checkpoints(run: Path) -> set[str]:
    return {p.name for p in (run / "checkpoints").iterdir()}


def test_a_checkpoint_of_ruined_weights_is_not_called_good(tmp_path, monkeypatch, capsys):
    settings = ADAMW | {"save_every": 1, "max_skipped": 3}
    # The first update ruins the weights.
    assert main(small(tmp_path / "ruined", learning_rate=1e20, **settings)) == 1
    said = capsys.readouterr().out.strip().splitlines()[-2]
    assert "3 steps in a row" in said
    assert "; there is no good checkpoint; " in said
    assert checkpoints(tmp_path / "ruined") == {"1"}
    # What the last update made of the weights has given no loss.
    poison(monkeypatch, set(range(6, 100)), only_gradient=False)
    assert main(small(tmp_path / "run", **settings)) == 1
    said = capsys.readouterr().out.strip().splitlines()[-2]
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '4'};" in said
    assert checkpoints(tmp_path / "run") == {"4", "5"}


@pytest.mark.slow
def test_a_stop_among_skipped_steps_saves_beside_the_checkpoint_before(tmp_path, monkeypatch):
    settings = ADAMW | {"save_every": 1, "keep": 1}
    with monkeypatch.context() as patch:
        poison(patch, {4, 5, 6}, only_gradient=False)
        assert main(small(tmp_path / "whole", **settings)) == 0
    write = MetricsLog.write

    def stop_and_write(log, line):
        write(log, line)
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stop_and_write)
        poison(patch, {4, 5, 6}, only_gradient=False)
        assert main(small(tmp_path / "run", **settings)) == 128 + 15
    assert checkpoints(tmp_path / "run") == {"3", "4"}
    with monkeypatch.context() as patch:
        poison(patch, {1, 2}, only_gradient=False)  # steps 5 and 6
        assert main(small(tmp_path / "run", resume=True, **settings)) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert checkpoints(tmp_path / "run") == {"14"}


def test_the_same_settings_from_config_json_give_the_same_run_and_lines(finished, tmp_path, capsys):
    out = tmp_path / "again"
    config = dataclasses.replace(load(finished / "config.json"), out=str(out))
    assert main(config) == 0
    assert losses(out) == losses(finished)
    said = capsys.readouterr().out
    for line in read_metrics(out):
        if "loss" in line:
            assert f"step {line['step']:2d}/14  loss {line['loss']:.4f} (smoothed " in said
            assert f"  gradient norm {line['grad_norm']:.2f}  lr " in said
            assert f"  {line['tokens_per_second']:,.0f} tokens/s" in said
        else:
            assert f"evaluation after step {line['step']}: loss {line['eval_loss']:.4f}" in said


def test_out_of_memory_names_the_flags_that_help(tmp_path, monkeypatch):
    def compile(run):
        return lambda state, batch: jnp.zeros(2**50).block_until_ready()  # a petabyte

    monkeypatch.setattr(Training, "compile", compile)
    with pytest.raises(OSError, match=r"^out of memory \(RESOURCE.*\): try a smaller --batch-size"):
        main(small(tmp_path / "run"))

    def assemble(config, log):
        raise MemoryError("Unable to allocate 1.00 TiB")

    monkeypatch.setattr(pretrain, "assemble", assemble)
    with pytest.raises(OSError, match=r"^out of memory \(Unable.*\): try a smaller --batch-size"):
        main(small(tmp_path / "other"))
