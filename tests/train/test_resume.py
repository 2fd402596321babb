"""`--resume` with other flags: what may change, from where, and what the run keeps of its own."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flax import nnx
from paths import ROOT
from small_run import ADAMW, MICRO, NO_SUBSPACE, everything_in, losses, small
from tokenizer_file import write_byte_level as write_tokenizer

from models.hugging_face.llama import save_llama
from models.llama.model import Llama
from train.config.finetune_lm import load_finetuning
from train.config.resolve import load, resolve, settings_file
from train.config.resume import differences, table
from train.config.settings import FinetuneLM, Pretrain, to_json
from train.data.tokenizer import load_tokenizer
from train.export import Export
from train.export import main as export
from train.finetune_lm import main as finetune
from train.pretrain import main
from train.run import cli
from train.run.finetune_lm import FinetuningParts
from train.run.metrics import given_up, read_metrics
from train.run.training import Host, Training

CONSTANT = {**ADAMW, "schedule": "constant", "warmup_steps": 0, "eval_every": 4, "save_every": 1}


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "short"
    assert main(small(out, **CONSTANT, steps=4)) == 0
    return out


def resumed(out: Path, *flags: str) -> int:
    """The exit code of the command with nothing but the run's folder and the flags."""
    args = ["--resume", "--out", str(out), *flags]
    with pytest.raises(SystemExit) as stop:
        cli.run(main, Pretrain, "pretrain", load=load, settings_file=settings_file, args=args)
    return stop.value.code


def finetuned(out: Path, *flags: object) -> int:
    """The same of train.finetune_lm."""
    args = ["--out", str(out), *map(str, flags)]
    how = {"load": load_finetuning, "settings_file": settings_file, "args": args}
    with pytest.raises(SystemExit) as stop:
        cli.run(finetune, FinetuneLM, "finetune_lm", **how)
    return stop.value.code


def rates(out: Path) -> list[float]:
    return [line["learning_rate"] for line in read_metrics(out) if "loss" in line]


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_had_them(short, tmp_path):
    assert main(small(tmp_path / "long", **CONSTANT, steps=8)) == 0
    out = Path(shutil.copytree(short, tmp_path / "short"))
    assert resumed(out, "--steps", "8") == 0
    assert losses(out) == losses(tmp_path / "long")
    assert json.loads((out / "summary.json").read_text())["steps"] == 8


def test_a_learning_rate_changes_from_here_on_and_config_json_says_so(short, tmp_path, capsys):
    out = Path(shutil.copytree(short, tmp_path / "run"))
    flags = ["--steps", "6", "--schedule", "linear", "--learning-rate", "0.004", "--keep", "3"]
    assert resumed(out, *flags) == 0
    assert rates(out) == pytest.approx([0.01] * 4 + [0.0016, 0.001])
    before, after = losses(short), losses(out)
    assert all(after[key] == value for key, value in before.items() if key[1] < 4)
    config = json.loads((out / "config.json").read_text())
    changed = {
        "floor": [None, 0.1], "keep": [2, 3], "learning_rate": [0.01, 0.004],
        "schedule": ["constant", "linear"], "steps": [4, 6],
    }  # fmt: skip
    assert config["history"] == [{"step": 4, "changed": changed}]
    assert (
        "changed after step 4: --floor None -> 0.1, --keep 2 -> 3, --lea" in capsys.readouterr().out
    )
    assert resumed(out) == 0
    assert "is finished" in capsys.readouterr().out
    assert resumed(out, "--steps", "7", "--schedule", "constant") == 0  # --floor has no use again
    history = json.loads((out / "config.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [4, 6]


def test_a_run_that_gave_up_goes_on_from_its_last_good_checkpoint(short, tmp_path, capsys):
    out = Path(shutil.copytree(short, tmp_path / "run"))
    assert resumed(out, "--steps", "9", "--learning-rate", "1e20", "--max-skipped", "3") == 1
    command = capsys.readouterr().out.strip().splitlines()[-1]
    assert command.endswith(f"--config {out}/config.json --resume --learning-rate 5e+19")
    assert (out / "checkpoints" / "5").is_dir()  # ruined, and the newest
    assert resumed(out, "--steps", "6", "--learning-rate", "0.005") == 0
    said = capsys.readouterr().out
    assert "resumed from step 4, the last good checkpoint" in said
    assert rates(out) == pytest.approx([0.01] * 4 + [0.005] * 2)
    assert all(line["skipped"] == 0 for line in read_metrics(out) if "loss" in line)


def test_a_fine_tuning_goes_on_without_the_run_it_began_with_and_its_card_says_how(
    short, tmp_path, monkeypatch
):
    monkeypatch.setattr(FinetuningParts, "sample", lambda *_: None)  # it would be compiled, too
    begun, out, data = tmp_path / "begun", tmp_path / "run", tmp_path / "a.jsonl"
    shutil.copytree(short, begun)
    rows = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--init", begun, "--data", data, "--optimizer", "adamw", "--learning-rate", "0.01"]
    flags += ["--steps", "1", "--batch-size", "4", "--seq-len", "16"]
    assert finetuned(out, *flags) == 0
    before = losses(out)["loss", 1]
    shutil.rmtree(begun)
    data = data.rename(tmp_path / "moved.jsonl")
    changes = ["--data", data, "--epochs", "0.25", "--accumulate", "2", "--schedule", "constant"]
    assert finetuned(out, "--resume", *changes) == 0
    found = losses(out)
    assert (found["loss", 1], ("loss", 2) in found) == (before, True)
    export(Export(run=str(out), out=str(tmp_path / "out")))
    first, step, then = (
        (tmp_path / "out" / "README.md").read_text().split("```")[1].split("\n")[1:4]
    )
    assert first.startswith("python -m train.finetune_lm ")
    assert "--steps 1 " in first
    steps = json.loads((out / "summary.json").read_text())["steps"]
    assert step == "# after step 1:"
    command = f"python -m train.finetune_lm --resume --out {out} --accumulate 2 --schedule constant"
    assert then == f"{command} --steps {steps}"


def test_a_run_of_another_command_is_named(short, capsys):
    assert finetuned(short, "--resume") == 2
    said = (
        "is of a run of train.pretrain, not of train.finetune_lm; `python -m train.pretrain --res"
    )
    assert said in capsys.readouterr().err


def test_the_kind_of_a_source_may_not_change_and_the_place_of_files_may():
    old = {"data": ["a"]}
    assert differences(old, {"data": ["b"]}) == []
    assert differences({"data": "c4"}, {"data": "text"}) == ["--data c4 (now text)"]


def test_parts_of_the_text_may_not_change_and_a_run_of_before_has_none_to_compare():
    assert differences({"data_parts": 8}, {"data_parts": 4}) == ["--data-parts 8 (now 4)"]
    assert differences({}, {"data_parts": 8}) == []  # its checkpoints say why it is refused


def test_the_docs_have_the_table_of_flags_that_may_change():
    assert f"<!-- resume -->\n{table()}\n" in (ROOT / "docs" / "trainer.md").read_text()


def test_fewer_steps_than_are_done_are_refused(short, tmp_path, capsys):
    out = Path(shutil.copytree(short, tmp_path / "run"))
    assert resumed(out, "--steps", "3") == 2
    assert f"--steps 3: the run in {out} has done 4" in capsys.readouterr().err
    (out / "summary.json").unlink()
    config = (out / "config.json").read_text()
    assert resumed(out, "--steps", "3") == 2
    assert "--steps 3: the run has done 4 already" in capsys.readouterr().err
    assert (out / "config.json").read_text() == config


def test_what_a_finished_run_cannot_use_is_refused(short, capsys):
    assert resumed(short, "--learning-rate", "0.001") == 2
    said = "--learning-rate has no effect: the run in .* is finished; give more --steps, too"
    assert re.search(said, capsys.readouterr().err)


def test_more_steps_may_give_a_setting_its_first_use():
    few, many = (to_json(resolve(small("x", steps=n))) for n in (3, 14))
    assert (few["moments"], many["moments"]) == (None, "rotate")
    assert differences(few, many) == []
    relora = {**NO_SUBSPACE, "optimizer": "relora-adamw", "rank": 4, "restart_every": 7}
    few, many = (to_json(resolve(small("x", **relora, steps=n))) for n in (7, 21))
    assert differences(few, many) == []
    assert differences(many, many | {"rank": 5}) == ["--rank 4 (now 5)"]


def test_a_run_had_the_default_of_a_setting_that_is_younger():
    now = to_json(resolve(Pretrain()))
    before = {k: v for k, v in now.items() if k != "compress_gradients"}
    assert differences(before, now) == []
    said = ["--compress-gradients False (now True)"]
    assert differences(before, now | {"compress_gradients": True}) == said


def test_a_run_keeps_copies_of_its_tokenizer_and_its_model(tmp_path, capsys):
    face, out = tmp_path / "face", tmp_path / "run"
    save_llama(Llama(MICRO, rngs=nnx.Rngs(1)), face)
    write_tokenizer(face / "tokenizer.json", 300)
    (face / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    settings = {**CONSTANT, "steps": 1, "model": None, "tokenizer": None}
    assert main(small(out, init=str(face), **settings)) == 0
    ids = load_tokenizer(face / "tokenizer.json").encode("a b").tolist()
    shutil.rmtree(face)
    assert resumed(out, "--steps", "2") == 0
    export(Export(run=str(out), out=str(tmp_path / "out")))
    assert load_tokenizer(tmp_path / "out" / "tokenizer.json").encode("a b").tolist() == ids
    capsys.readouterr()
    moved = tmp_path / "moved.json"
    write_tokenizer(moved, 280)
    assert resumed(out, "--steps", "3", "--tokenizer", str(moved)) == 2
    assert "another run: content of the tokenizer is" in capsys.readouterr().err


def test_the_steps_in_a_row_after_which_a_run_gave_up_are_read_from_its_metrics():
    lines = [{"step": n, "skipped": k} for n, k in enumerate((0, 1, 1, 1, 2, 3), 1)]
    assert given_up(lines, 2) == 4
    assert given_up(lines, 3) is None
    assert given_up([{"step": 1, "skipped": 1}], 1) == 0
    assert given_up([], 1) is None


def test_a_run_resumed_with_less_patience_ends_at_its_next_evaluation():
    said = SimpleNamespace(log=lambda _: None)
    for step, ends in ((6, True), (7, False)):
        run: Any = SimpleNamespace(
            config=SimpleNamespace(patience=1),
            host=Host(step=step, evaluations={0: 3.0, 3: 2.0, 6: 2.0}),
            progress=said,
        )
        assert Training.out_of_patience(run) == ends


def test_a_config_json_without_a_setting_has_its_default_when_resumed(short, tmp_path, capsys):
    out = Path(shutil.copytree(short, tmp_path / "run"))
    file = out / "config.json"
    fields = json.loads(file.read_text())
    del fields["max_skipped"]
    file.write_text(json.dumps(fields))
    assert resumed(out, "--steps", "5") == 0
    assert "resumed from step 4\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('"history": null', "history is not a list of what was changed"),
        ('"history": {"step": 4}', "history is not a list of what was changed"),
        ('"history": [{"step": 4}]', "history is not a list of what was changed"),
        ('"seed": 7', "'seed' is there twice"),
    ],
)
def test_a_config_json_with_a_broken_history_or_a_name_twice_is_refused(
    short, tmp_path, capsys, written, said
):
    out = Path(shutil.copytree(short, tmp_path / "run"))
    file = out / "config.json"
    file.write_text(file.read_text().rstrip().rstrip("}") + f", {written}}}")
    before = everything_in(out)
    assert resumed(out, "--steps", "5") == 2
    assert said in capsys.readouterr().err
    assert everything_in(out) == before


def test_an_evaluation_that_metrics_have_lost_is_made_again(short, tmp_path):
    """A machine that fails may lose the end of metrics.jsonl, and keep the checkpoint after it."""
    out = Path(shutil.copytree(short, tmp_path / "run"))
    before = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert resumed(out) == 0
    assert losses(out) == losses(short)
    assert json.loads((out / "summary.json").read_text())["eval_loss"] == before["eval_loss"]
