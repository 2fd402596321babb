"""Sampling from a run on disk."""

import json
import shutil
from pathlib import Path

import pytest
from small_run import small, spoil
from tokenizer_file import write_tokenizer

from train.generate import Generate, main
from train.pretrain import main as pretrain
from train.run.checkpoint import Checkpoints
from train.run.metrics import evaluation_losses


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    plain = {"optimizer": "adamw", "rank": None, "update_proj_gap": None, "deterministic": True}
    assert pretrain(small(out, **plain, steps=4, warmup_steps=1, eval_every=2, save_every=1)) == 0
    return out


def sampled(run, capsys, **options) -> str:
    capsys.readouterr()
    assert main(Generate(run=str(run), max_new_tokens=20, **options)) == 0
    return capsys.readouterr().out


def test_text_begins_with_the_prompt_and_a_seed_repeats_it(run, capsys):
    first = sampled(run, capsys, prompt="Return the ", seed=1)
    assert first.startswith("Return the ")
    assert len(first) > len("Return the \n")
    assert sampled(run, capsys, prompt="Return the ", seed=1) == first
    assert sampled(run, capsys, prompt="Return the ", seed=2) != first
    assert sampled(run, capsys, prompt="")


def test_the_best_checkpoint_is_used_and_a_damaged_one_passed_over(run, tmp_path, capsys):
    evaluations = evaluation_losses(run)
    assert evaluations[4] < evaluations[2]
    with Checkpoints(run / "checkpoints", 1, print, evaluations, read_only=True) as checkpoints:
        assert checkpoints.best_first() == [4, 3]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    spoil(copy / "checkpoints" / "4")
    assert "checkpoint 4 is damaged and passed over" in sampled(copy, capsys)


def test_a_folder_that_is_no_run_or_has_no_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="not a run"):
        main(Generate(run=str(tmp_path)))
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        main(Generate(run=str(tmp_path)))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json"}


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model": "tiny"}))
    with pytest.raises(ValueError, match="another run: model is 'micro' there and 'tiny'"):
        main(Generate(run=str(copy)))


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("clip_norm", 2.0)])
def test_a_config_json_that_the_checkpoint_was_not_made_with_is_refused(run, tmp_path, name, value):
    """A LoRA adapter's --alpha, for instance, is in config.json alone."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match=rf"another run: {name} is .* there and {value} here"):
        main(Generate(run=str(copy)))


def test_a_run_has_a_tokenizer_of_its_own_and_a_changed_copy_is_refused(tmp_path, capsys):
    path, words = tmp_path / "tokenizer.json", {"<unk>": 0, "</s>": 1, "the": 2, "a": 3}
    write_tokenizer(path, words, ["</s>"])
    run = tmp_path / "run"
    common = {"optimizer": "adamw", "rank": None, "update_proj_gap": None, "tokenizer": str(path)}
    settings = {**common, "prompt": "a", "steps": 1, "warmup_steps": 0, "eval_every": 1}
    assert pretrain(small(run, **settings)) == 0
    first = sampled(run, capsys, prompt="a")
    path.unlink()
    moved = run.rename(tmp_path / "moved")
    assert sampled(moved, capsys, prompt="a") == first
    write_tokenizer(moved / "tokenizer" / path.name, words | {"the": 3, "a": 2}, ["</s>"])
    message = r"another run: content of the tokenizer is '.*, </s>' there and '.*, </s>' here"
    with pytest.raises(ValueError, match=message):
        main(Generate(run=str(moved)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 64}, "max_length=64"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"seed": 99999999999999999999}, r"--seed 99999999999999999999: expected 0 to 2\*\*32 - 1"),
        ({"seed": -1}, "--seed -1"),
        ({"temperature": 0.0, "top_k": 5}, "--top-k has no effect: --temperature 0"),
        ({"temperature": 0.0, "top_p": 0.5}, "--top-p has no effect: --temperature 0"),
    ],
)
def test_values_out_of_range_are_refused(run, options, says):
    with pytest.raises(ValueError, match=says):
        main(Generate(run=str(run), **options))
