"""`train.evaluate`: the perplexity of runs and of models of transformers on text."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import ADAMW, MICRO, small, spoil, topics
from tokenizer_file import write_tokenizer

from models.hugging_face.llama import load_llama, save_llama
from models.llama.model import Llama
from train.evaluate import Evaluate, main
from train.pretrain import main as pretrain
from train.run import assemble, cli
from train.run.metrics import evaluation_losses


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run, evaluated on all of its validation text, which is in text.jsonl beside it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    texts = topics("validation")[:30]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (out.parent / "text.jsonl").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        few = {"train": topics("train"), "validation": texts}
        patch.setattr(assemble, "load_text", lambda name, split, *_: few[split])
        settings = {**ADAMW, "steps": 2, "warmup_steps": 1, "eval_every": 2, "eval_tokens": None}
        assert pretrain(small(out, **settings)) == 0
    return out


def evaluated(capsys, *data, **options) -> dict:
    capsys.readouterr()
    assert main(Evaluate(data=tuple(map(str, data)), json=True, **options)) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_on_its_validation_text_has_its_loss_per_token_and_per_byte(run, capsys):
    found = evaluated(capsys, run.parent / "text.jsonl", run=str(run))
    texts = topics("validation")[:30]
    assert found["loss"] == pytest.approx(evaluation_losses(run)[2], rel=1e-5)
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["tokens"] == found["bytes"] + 30  # the end of each document
    assert found["perplexity_per_token"] == pytest.approx(math.exp(found["loss"]))
    nats = found["loss"] * found["tokens"] / found["bytes"]
    assert found["perplexity_per_byte"] == pytest.approx(math.exp(nats))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2))
    assert main(Evaluate(data=(str(run.parent / "text.jsonl"),), run=str(run))) == 0
    said = capsys.readouterr().out
    assert f"{run} after step 2: 30 document(s), {found['tokens']:,} tokens" in said
    assert f"perplexity per byte   {found['perplexity_per_byte']:.4f}" in said


def test_an_empty_document_counts_as_none(run, tmp_path, capsys):
    lines = (run.parent / "text.jsonl").read_text().splitlines()
    text = tmp_path / "text.jsonl"
    text.write_text("".join('{"text": ""}\n' + line + "\n" for line in lines))
    found = [evaluated(capsys, file, run=str(run)) for file in (run.parent / "text.jsonl", text)]
    assert found[0] == found[1]


def test_a_damaged_checkpoint_is_named_beside_the_json(run, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    spoil(copy / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"no checkpoint in .* that can be read"):
        evaluated(capsys, run.parent / "text.jsonl", run=str(copy))
    assert "checkpoint 2 is damaged" in capsys.readouterr().err


def test_a_model_of_transformers_has_the_loss_of_its_logits(tmp_path, capsys):
    words = {"<unk>": 0, "</s>": 1, "the": 2, "a": 3}
    model = tmp_path / "model"
    save_llama(Llama(MICRO, rngs=nnx.Rngs(0)), model)
    write_tokenizer(model / "tokenizer.json", words, ["</s>"])
    text = tmp_path / "a.txt"
    text.write_text("the a the the\na")
    ids = jnp.array([[1, 2, 3, 2, 2, 3, 1]])
    log_probs = jax.nn.log_softmax(load_llama(model)(ids[:, :-1]))
    nats = -float(np.sum([log_probs[0, i, ids[0, i + 1]] for i in range(6)]))
    found = evaluated(capsys, text, init=str(model))
    assert (found["tokens"], found["bytes"], found["seq_len"]) == (6, 15, MICRO.max_length)
    assert found["loss"] == pytest.approx(nats / 6, rel=1e-5)
    assert found["perplexity_per_byte"] == pytest.approx(math.exp(nats / 15), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "name one of --run"),
        ({"run": "RUN", "init": "RUN"}, "name one of --run"),
        ({"run": "nowhere"}, "--run nowhere is not a run"),
        ({"init": "nowhere"}, "--init nowhere has no config.json"),
        ({"run": "RUN", "tokenizer": "bytes"}, "--tokenizer has no effect with a run"),
        ({"init": "RUN", "end_token": "</s>"}, "--end-token has no effect with a run"),
        ({"run": "RUN", "seq_len": 65}, "--seq-len 65: the model takes at most 64"),
        ({"run": "RUN", "batch_size": 0}, "--batch-size 0: expected 1 or more"),
    ],
)
def test_wrong_use_is_named(run, options, says):
    options = {k: str(run) if v == "RUN" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=says):
        main(Evaluate(data=(str(run.parent / "text.jsonl"),), **options))


def test_a_text_without_a_document_is_named(run, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"--data .*a.txt: there is no text in it"):
        main(Evaluate(data=(str(tmp_path / "a.txt"),), run=str(run)))


def test_a_home_folder_is_expanded_in_each_of_several_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    with pytest.raises(SystemExit):
        cli.run(seen.append, Evaluate, "evaluate", args=["--data", "~/a.txt", "~/b.txt"])
    assert seen[0].data == (f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")
