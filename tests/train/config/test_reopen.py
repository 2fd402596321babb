"""What a config.json's settings are beside flags that have other defaults."""

import dataclasses
import json
from functools import partial

import pytest
from small_glue import write_encoder

from train.config.finetune_lm import load_finetuning, resolve_finetuning
from train.config.glue import Finetune
from train.config.glue import resolve as resolve_glue
from train.config.optimizers import OPTIMIZERS
from train.config.reopen import reopened, without_own_adapter
from train.config.resolve import load, resolve
from train.config.settings import FinetuneLM, Pretrain, to_json
from train.run import cli


@pytest.fixture
def kinds(tmp_path):
    """For each command: settings that name no optimizer, how they are resolved, and read."""
    encoder, text = write_encoder(tmp_path / "encoder", positions=600), tmp_path / "a.txt"
    glue = Finetune(task="mrpc", init=str(encoder), data_dir=str(tmp_path))
    run = tmp_path / "base"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_json(resolve(Pretrain()))))
    text = FinetuneLM(init=str(run), data=(str(text),))
    return {
        "pretrain": (Pretrain(), resolve, load),
        "glue": (glue, lambda c: resolve_glue(c, 3668), partial(load, kind=Finetune)),
        "text": (text, lambda c: resolve_finetuning(c, lambda *_: 600), load_finetuning),
    }


def written(config, folder):
    file = folder / "config.json"
    file.write_text(json.dumps(to_json(config)))
    return file


@pytest.mark.parametrize("kind", ["pretrain", "glue", "text"])
def test_another_optimizer_than_in_a_config_json_is_as_without_it(kind, kinds, tmp_path):
    given, resolved, read = kinds[kind]
    needs = {} if kind == "pretrain" else {"alice": 1e-4, "racs": 1e-4}
    for old in OPTIMIZERS:
        before = dataclasses.replace(given, optimizer=old, learning_rate=needs.get(old))
        base = without_own_adapter(read(written(resolved(before), tmp_path)))
        for new in OPTIMIZERS:
            if old in needs or new in needs:  # whose learning rate is no default
                continue
            flags = {"optimizer": new}
            opened = reopened(base, dataclasses.replace(base, **flags))
            found = to_json(resolved(dataclasses.replace(opened, **flags)))
            direct = to_json(resolved(dataclasses.replace(given, **flags)))
            # How few rows a microbatch has is the file's.
            assert found == direct | {"accumulate": found["accumulate"]}, (old, new)


def of_command(kind, *args):
    given, resolved, read = kind
    seen = []
    with pytest.raises(SystemExit) as stop:
        cli.run(seen.append, type(given), "train", load=read, args=args)
    assert not stop.value.code
    return resolved(seen[0])


def test_the_published_settings_follow_the_task_and_the_rank(kinds, tmp_path):
    given, resolved, _ = kinds["glue"]
    file = str(written(resolved(given), tmp_path))
    found = of_command(kinds["glue"], "--config", file, "--rank", "4")
    assert (found.scale, found.learning_rate) == (4.0, 3e-5)
    found = of_command(kinds["glue"], "--config", file, "--task", "cola")
    assert found == dataclasses.replace(
        resolved(dataclasses.replace(given, task="cola")), config=file
    )
    assert (found.batch_size, found.steps) == (32, 30 * 115)
    # Resumed, the file says all.
    again = of_command(kinds["glue"], "--config", file, "--resume", "--steps", "7000")
    assert again.scale == 2.0


def test_another_model_than_in_a_config_json_has_its_own_published_settings(kinds, tmp_path):
    file = str(written(resolve(Pretrain(model="llama-60m", batch_size=64)), tmp_path))
    found = of_command(kinds["pretrain"], "--config", file, "--model", "llama-1b")
    direct = resolve(Pretrain(model="llama-1b", batch_size=64))
    own = ("rank", "steps", "warmup_steps", "learning_rate", "batch_size")
    assert [getattr(found, x) for x in own] == [getattr(direct, x) for x in own]


def test_what_was_given_to_the_run_or_is_given_now_stays(kinds, tmp_path):
    given, resolved, _ = kinds["glue"]
    own = {"scale": 3.0, "learning_rate": 7e-5, "weight_decay": 0.1}
    file = str(written(resolved(dataclasses.replace(given, **own)), tmp_path))
    found = of_command(kinds["glue"], "--config", file, "--rank", "4", "--optimizer", "fira-adamw")
    assert {name: getattr(found, name) for name in own} == own
    found = of_command(kinds["glue"], "--config", file, "--rank", "4", "--scale", "2")
    assert found.scale == 2.0
    # An adapter that is no part of the optimizer stays with another one; its own does not.
    file = str(written(resolve(Pretrain(optimizer="adamw", adapter="dora", alpha=5.0)), tmp_path))
    found = of_command(kinds["pretrain"], "--config", file, "--optimizer", "muon")
    assert (found.adapter, found.alpha) == ("dora", 5.0)
    file = str(written(resolve(Pretrain(optimizer="lora-adamw", alpha=5.0)), tmp_path))
    found = of_command(kinds["pretrain"], "--config", file, "--optimizer", "adamw")
    assert (found.adapter, found.rank, found.alpha) == (None, None, None)
    keeps = "--config", file, "--optimizer", "muon", "--adapter", "lora"
    assert of_command(kinds["pretrain"], *keeps).alpha == 5.0
