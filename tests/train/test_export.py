"""What transformers reads of an exported run: tokenizer, ids, chat template, model card."""

import json
import shlex
from types import SimpleNamespace

import pytest
from small_run import ADAMW, small
from tokenizer_file import with_first, write_byte_level, write_tokenizer
from tokenizers import Tokenizer

from models.hugging_face.files import write_json
from models.llama.config import TokenIds
from train.data.chat import FILE
from train.data.tokenizer import ByteTokenizer, load_tokenizer
from train.export import Export
from train.export import main as export
from train.pretrain import main as pretrain
from train.run.directory import claim
from train.run.exported import write_beside

TEXTS = ["Hello wörld\n\n  two  spaces 漢字 🙂 don't", "", " lead", "a b"]


def exported(tokenizer, out, **config):
    """The files beside the weights, of a run with a tokenizer."""
    out.mkdir()
    write_json(out / "config.json", {"vocab_size": tokenizer.vocab_size})
    settings = {"data": "builtin", "init": None, "optimizer": "adamw", "command": "x", **config}
    trained = SimpleNamespace(tokenizer=tokenizer, config=small("x", **ADAMW), step=3)
    trained.config = SimpleNamespace(**{**vars(trained.config), **settings})
    write_beside(trained, TokenIds(tokenizer.begin, tokenizer.separator), out, out)
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def test_a_run_is_exported_with_all_that_transformers_needs(tmp_path):
    config = small(tmp_path / "run", **ADAMW, steps=2, warmup_steps=1, eval_every=1)
    assert pretrain(config) == 0
    export(Export(str(tmp_path / "run"), str(tmp_path / "out")))
    out = tmp_path / "out"
    read = {p.name: json.loads(p.read_text()) for p in out.glob("*.json")}
    assert read["generation_config.json"] == {"bos_token_id": 256, "eos_token_id": 256}
    assert read["config.json"]["eos_token_id"] == 256
    assert read["tokenizer_config.json"]["eos_token"] == "<|endoftext|>"
    card = (out / "README.md").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"Perplexity: {summary['eval_perplexity']:,.2f}" in card
    words = shlex.split(card.split("```")[1].removeprefix("bash"))
    assert words[:3] == ["python", "-m", "train.pretrain"]
    assert words[words.index("--learning-rate") + 1] == "0.01"
    # It is a model to begin with, too.
    tokenizer = load_tokenizer(out / "tokenizer.json")
    assert (tokenizer.begin, tokenizer.separator) == (256, 256)


def test_the_command_of_a_model_card_has_a_flag_that_turns_something_off(tmp_path):
    exported(ByteTokenizer(), tmp_path / "out", clip_norm=None)
    assert "--clip-norm none" in (tmp_path / "out" / "README.md").read_text()


def test_the_exported_tokenizer_gives_our_ids_after_the_token_that_begins_a_text(
    tmp_path, shared_data
):
    write_byte_level(tmp_path / "tokenizer.json")
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "</s>", "eos_token": "</s>"})
    for i, tokenizer in enumerate(
        (
            ByteTokenizer(),
            load_tokenizer(tmp_path / "tokenizer.json"),
            # Its own file puts the end after each text.
            load_tokenizer(shared_data / "tokenizers" / "t5_tokenizer.json"),
        )
    ):
        theirs = exported(tokenizer, tmp_path / str(i))
        again = load_tokenizer(tmp_path / str(i) / "tokenizer.json")
        assert (again.begin, again.separator) == (tokenizer.begin, tokenizer.separator)
        for text in TEXTS:
            ours = tokenizer.encode(text).tolist()
            assert theirs.encode(text).ids == [tokenizer.begin, *ours]
            assert theirs.decode([*ours, tokenizer.separator]) == tokenizer.decode(ours)


@pytest.mark.parametrize("named", [False, True])
def test_a_tokenizers_own_settings_beginning_and_chat_template_are_kept(tmp_path, named):
    path = tmp_path / "tokenizer.json"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    write_tokenizer(path, vocabulary, ["<s>", "</s>"], post_processor=with_first("<s>", 1))
    own = {"eos_token": "</s>", "pad_token": "<unk>", "add_bos_token": True, "chat_template": "x"}
    write_json(tmp_path / "tokenizer_config.json", own)
    (tmp_path / ("named.jinja" if named else FILE)).write_text("{{ messages }}")
    changes = {"chat_template": str(tmp_path / "named.jinja")} if named else {}
    theirs = exported(load_tokenizer(path), tmp_path / "out", **changes)
    assert theirs.encode("a").ids == [1, 3]
    written, before = (
        json.loads((p / "tokenizer.json").read_text()) for p in (tmp_path / "out", tmp_path)
    )
    assert written["post_processor"] == before["post_processor"]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["pad_token"], settings.get("bos_token")) == ("<unk>", None)
    assert not {"add_bos_token", "chat_template"} & {*settings}
    assert (tmp_path / "out" / FILE).read_text() == "{{ messages }}"


def test_what_a_tokenizer_json_leaves_out_and_how_it_finds_a_token_are_exported(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, {"<unk>": 0, "</s>": 1, "a": 2}, ["</s>"])
    content = json.loads(path.read_text())
    content["added_tokens"][0]["rstrip"] = True
    del content["post_processor"], content["truncation"]
    path.write_text(json.dumps(content))
    own = {"chat_template": "{{ bos_token }}"}
    write_json(tmp_path / "tokenizer_config.json", own)
    theirs = exported(load_tokenizer(path), tmp_path / "out")
    assert theirs.encode("a</s> \n a").ids == [1, 2, 1, 2]
    assert theirs.get_added_tokens_decoder()[1].rstrip
    # The template was trained without a name of it.
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (said.get("bos_token"), said["eos_token"]) == (None, "</s>")


@pytest.mark.parametrize("listed", [False, True])
def test_a_padding_token_without_an_embedding_is_left_out(tmp_path, listed):
    # No text gives it: a model that begins with random weights has no row for it.
    vocabulary = {"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "[PAD]": 4}
    special = ("</s>", "<pad>") + ("[PAD]",) * listed
    words = vocabulary if listed else {k: i for k, i in vocabulary.items() if k != "[PAD]"}
    write_tokenizer(tmp_path / "tokenizer.json", words, special=special)
    for name, kept in (("<pad>", "<pad>"), ("[PAD]", None)):
        write_json(tmp_path / "tokenizer_config.json", {"pad_token": name, "eos_token": "</s>"})
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
        assert tokenizer.vocab_size == 4
        exported(tokenizer, tmp_path / name)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert settings.get("pad_token") == kept


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "pytorch_model.bin"])
def test_a_folder_with_files_is_no_place_for_an_export(tmp_path, name):
    (tmp_path / ".gitattributes").write_text("")
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"--out .* already has {name} in it"):
        export(Export(str(tmp_path / "run"), str(tmp_path)))
    assert (tmp_path / name).read_text() == "mine"


def test_two_processes_do_not_export_into_one_folder(tmp_path):
    out = tmp_path / "new" / "out"
    with claim(out), pytest.raises(ValueError, match=r"--out .*out is in use: another process"):
        export(Export(str(tmp_path / "run"), str(out)))
    with pytest.raises(ValueError, match="not a run's folder"):
        export(Export(str(tmp_path / "run"), str(out)))
    assert not (tmp_path / "new").exists()
