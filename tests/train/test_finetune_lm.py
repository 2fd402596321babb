"""Fine-tuning on prompts with completions, from a folder of transformers: the whole command."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import MICRO, losses, small, unfinished
from tokenizer_file import write_byte_level

from models.hugging_face.llama import save_llama
from models.llama.config import flops_per_token
from models.llama.model import Llama
from train.config.finetune_lm import load_finetuning, load_run, resolve_finetuning
from train.config.resolve import resolve
from train.config.settings import FinetuneLM
from train.config.weights import ADAPTERS_ONLY, split_params
from train.data.chat import ChatTemplate
from train.finetune_lm import main
from train.generate import Generate
from train.generate import main as generate
from train.run.finetune_lm import assemble, count_steps

TIED = dataclasses.replace(MICRO, tied=True, vocab_size=300)
ROWS = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tied model as transformers stores it, and examples beside it."""
    out = tmp_path_factory.mktemp("hugging") / "face"
    save_llama(Llama(TIED, rngs=nnx.Rngs(1)), out)
    write_byte_level(out / "tokenizer.json")
    (out / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return out


def settings(folder: Path, out: object = "unused", **changes) -> FinetuneLM:
    own = {
        "init": str(folder), "data": (str(folder / "a.jsonl"),), "optimizer": "galore-adamw8bit",
        "rank": 4, "learning_rate": 0.01, "batch_size": 4, "seq_len": 32, "save_every": 3,
        "epochs": 0.7,
    }  # fmt: skip
    return FinetuneLM(**own | {"out": str(out)} | changes)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(settings(folder, out)) == 0
    return out


def test_a_run_learns_the_answers_and_is_read_by_other_commands(finished, folder, capsys):
    found = losses(finished)
    steps = max(step for kind, step in found if kind == "loss")
    assert found["eval_loss", steps] < 0.9 * found["eval_loss", 0]
    config = load_run(finished / "config.json")
    assert (config.command, config.steps, config.model) == (
        "train.finetune_lm", steps, str(finished / "model" / f"{folder.name}.json")
    )  # fmt: skip
    # Each answer has one to two digits and its end; 57 examples are learnt.
    tokens = [found["tokens", step] for step in range(1, steps + 1)]
    assert 0.7 * 57 * 2 < tokens[-1] < 57 * 3
    assert (
        json.loads((finished / "summary.json").read_text())["eval_loss"]
        == found["eval_loss", steps]
    )
    capsys.readouterr()
    assert generate(Generate(run=str(finished), prompt="3 + 1 = ", max_new_tokens=5)) == 0
    assert capsys.readouterr().out.startswith("3 + 1 = ")


def test_a_learnt_token_takes_the_operations_of_its_prompt_too(folder):
    """Tokens per second are of learnt tokens, and a step computes with all of its rows."""
    config = resolve_finetuning(settings(folder, epochs=None, steps=2), count_steps)
    parts = assemble(config, lambda _: None)
    batches = [batch for batch, _ in parts.data.rows_of(parts.data.examples)]  # pyrefly: ignore
    read = sum(int(np.sum(batch["segment_ids"] > 0)) for batch in batches)
    learnt = sum(float(batch["weights"].sum()) for batch in batches)
    assert read > 2 * learnt
    one = flops_per_token(parts.model, config.seq_len)
    assert parts.flops_per_token() == pytest.approx(one * read / learnt)


def test_a_run_answers_a_message_by_its_chat_template(finished, monkeypatch, capsys):
    asked = Generate(run=str(finished), prompt="3", chat=True, max_new_tokens=5, temperature=0)
    with pytest.raises(ValueError, match="need a chat template"):
        generate(asked)
    template = ChatTemplate("{{ messages[0].content }} + 1 = ", {})
    monkeypatch.setattr("train.generate.chat_template", lambda *_: template)
    capsys.readouterr()
    assert generate(asked) == 0
    answer = capsys.readouterr().out
    assert len(answer) <= 6
    assert "3 + 1" not in answer


def test_a_run_that_begins_with_another_keeps_the_chat_template_that_it_was_given(
    finished, folder, tmp_path
):
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    template = copy / "chat_template" / "t.jinja"
    template.parent.mkdir()
    template.write_text("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    said = json.loads((copy / "config.json").read_text()) | {"chat_template": "/gone/t.jinja"}
    (copy / "config.json").write_text(json.dumps(said))
    config = resolve_finetuning(settings(folder, init=str(copy)), count_steps)
    assert config.chat_template == str(template)  # though prompts make no use of it
    given = {"init": str(copy), "chat_template": str(tmp_path / "other")}
    (tmp_path / "other").write_text("x")
    with pytest.raises(ValueError, match="other has no effect: no example has `messages`"):
        resolve_finetuning(settings(folder, **given), count_steps)
    rows = [[{"role": x, "content": f"{i}"} for x in ("user", "assistant")] for i in range(40)]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"messages": x}) for x in rows))
    chats = settings(folder, init=str(copy), data=(str(tmp_path / "c.jsonl"),))
    parts = assemble(resolve_finetuning(chats, count_steps), lambda _: None)
    ids = parts.held_out[0]
    assert parts.tokenizer.decode(np.where(ids < 0, ~ids, ids)) == "user=0;assistant=0;"
    others = dataclasses.replace(chats, tokenizer=str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="`messages` need a chat template"):
        resolve_finetuning(others, count_steps)


def test_a_resumed_run_repeats_the_uninterrupted_one_and_answers(
    finished, folder, tmp_path, capsys
):
    steps = load_run(finished / "config.json").steps
    copy = unfinished(finished, tmp_path, str(steps))
    capsys.readouterr()
    config = dataclasses.replace(load_finetuning(copy / "config.json"), out=str(copy), resume=True)
    assert main(config) == 0
    assert losses(copy) == losses(finished)
    said = capsys.readouterr().out
    assert len(re.findall(r"prompt: \d+ \+ 1 = \n  answer: .*\n  in the data: \d+", said)) == 3


def test_with_an_adapter_nothing_else_is_trained_unless_asked(folder):
    def trained(**changes):
        lora = {"optimizer": "lora-adamw", "adapter_pattern": "query|up", "steps": 2}
        config = settings(folder, epochs=None, **lora, **changes)
        config = resolve_finetuning(config, count_steps)
        params = assemble(config, lambda _: None).abstract.params
        return config, jax.tree.leaves(split_params(config, params)[0])

    config, leaves = trained()
    assert (config.train, len(leaves)) == (ADAPTERS_ONLY, 4)
    assert (config.learning_rate, config.rank) == (0.01, 4)
    assert len(trained(train="^norm|embedding")[1]) == 6


def test_defaults_are_those_of_fine_tuning(folder):
    bare = {"learning_rate": None, "rank": None, "seq_len": None, "batch_size": None, "steps": 9}
    config = resolve_finetuning(settings(folder, epochs=None, **bare), count_steps)
    assert (config.learning_rate, config.scale, config.rank) == (2e-5, 2.0, 8)
    assert (config.batch_size, config.accumulate, config.seq_len) == (16, 4, 64)
    lora = {**bare, "optimizer": "lora-adamw", "save_every": None}
    config = resolve_finetuning(settings(folder, epochs=None, **lora), count_steps)
    assert (config.learning_rate, config.rank, config.save_every) == (2e-4, 16, 1)
    config = dataclasses.replace(settings(folder, epochs=None, **lora), out=None)
    assert resolve_finetuning(config, count_steps).out == "runs/face-lora-adamw"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init": None}, "--init is needed"),
        ({"data": ()}, "--data is needed"),
        ({"data": ("missing.jsonl",)}, "missing.jsonl cannot be read: No such file"),
        ({"steps": 3}, "--epochs 0.7 and --steps 3: leave one out"),
        ({"epochs": 0.0}, "--epochs 0.0: expected a positive number"),
        ({"seq_len": 65}, "--seq-len 65: face takes at most 64 tokens"),
        ({"seq_len": 5}, "nothing to learn from is left within --seq-len 5"),
        (
            {"optimizer": "racs", "rank": None, "learning_rate": None},
            "--learning-rate is missing: --optimizer racs has a published one for pre-training",
        ),
        ({"scale": 0.5, "optimizer": "adamw", "rank": None}, "--scale 0.5 has no effect"),
        ({"eval_data": "a"}, "--eval-data 'a': expected a list of strings"),
        ({"init": ""}, "--init is empty: name a file or a folder"),
        ({"eval_data": ("",)}, "--eval-data is empty: name a file or a folder"),
        ({"out": "caf\udce9"}, r"--out 'caf\\udce9' is not text in UTF-8: rename it"),
        ({"chat_template": "a"}, "--chat-template .*/a has no effect: no example has `messages`"),
    ],
)
def test_wrong_use_is_named_and_writes_nothing(folder, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        main(settings(folder, **{"out": tmp_path / "out", **changes}))
    assert not [*tmp_path.iterdir()]


def test_a_folder_whose_files_are_read_is_no_place_for_a_run(folder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("data", "eval_data"):
        changes = {name: (str(folder), str(tmp_path / "link"))}
        with pytest.raises(ValueError, match=rf"--out .*/out: all files in --{name[:4]}.*link are"):
            resolve_finetuning(settings(folder, tmp_path / "out", **changes), count_steps)
    where = {"data": "text", "data_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"--out .*/a/b: all files in --data-dir .* are read"):
        resolve(small(tmp_path / "a" / "b", **where))
    for out in (tmp_path.parent / "out", tmp_path / ".runs" / "a"):  # hidden ones are not read
        assert resolve(small(out, **where)).out == str(out)


def test_what_is_evaluated_on_is_not_learnt(folder, tmp_path, capsys):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:40]))
    changes = {"eval_data": (str(tmp_path / "b.jsonl"),), "steps": 2, "epochs": None}
    assemble(resolve_finetuning(settings(folder, **changes), count_steps), print)
    assert re.search(r"20 \(\d+ tokens of .*\) to learn from, 40 ", capsys.readouterr().out)
