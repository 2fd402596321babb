"""Plans of fine-tuning an encoder, of which neither weights nor data are there."""

import json

import pytest
from small_glue import write_encoder

from train.memory.glue import encoder, programs_of, settings
from train.memory.plan import stored
from train.plan import Plan, main
from train.run.cli import run
from train.step.mesh import make_mesh


def parse(*args):
    with pytest.raises(SystemExit) as stop:
        run(main, Plan, "plan", args=["--task", "mrpc", *args])
    return stop.value.code


def test_the_plan_of_a_task_is_that_of_the_encoder(tmp_path, capsys):
    folder = write_encoder(tmp_path / "small")
    (folder / "model.safetensors").unlink()
    more = ["--optimizer", "adamw", "--batch-size", "4", "--json"]
    assert parse("--init", str(folder), *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["optimizer_state_bytes"] - 2 * found["weight_bytes"] < 40  # counters
    assert found["activation_bytes"] > 0


def test_roberta_base_is_what_is_fine_tuned_by_default():
    assert encoder(None)[1] == "roberta-base"
    values = {**vars(Plan()), "task": "mrpc", "optimizer": "galore-adamw", "rank": 4}
    config = settings({name: values[name] for name in values if name not in _OWN})
    assert (config.learning_rate, config.seq_len, config.scale) == (3e-5, 512, 4)
    weights, states = stored(programs_of(config, make_mesh(None)))
    # 124,647,170 params with a classifier of two classes, as transformers counts them.
    assert weights == 4 * 124_647_170
    embeddings = (50_265 + 514 + 1) * 768
    assert 8 * embeddings < states["moments"] < 8 * embeddings + 10_000_000


_OWN = {"gpu", "compare", "card", "json", "dump", "plot"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layerwise"], "--layerwise True has no effect with --task"),
        (["--tokenizer", "bytes"], "--tokenizer bytes has no effect with --task"),
        (["--card", "12"], "leave out --task"),
        (["--dtype", "bfloat16"], "name a GPU with --gpu"),
        (["--rank", "768"], "compresses no matrix"),
        (["--init", "nowhere"], "nowhere/config.json cannot be read"),
    ],
)
def test_what_a_fine_tuning_has_no_use_for_is_refused(args, message, capsys):
    assert parse(*args) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
