"""A fine-tuning of a second: a random encoder of two narrow layers, and a task of a few words."""

import dataclasses
from pathlib import Path

import numpy as np
from flax import nnx
from tokenizer_file import write_tokenizer

from models.encoder import Encoder, EncoderConfig
from models.hugging_face import save_roberta
from train.config.glue import Finetune

MICRO = EncoderConfig(
    width=32, mlp_width=48, layers=2, heads=2, vocab_size=24, positions=40, token_types=2
)
WORDS = [f"w{i}" for i in range(20)]
SMALL = Finetune(
    task="mrpc",
    optimizer="galore-adamw",
    rank=4,
    update_proj_gap=3,
    learning_rate=0.01,
    steps=12,
    warmup_steps=2,
    batch_size=8,
    eval_every=4,
    keep=5,
)


def write_encoder(folder: Path, kind: str = "bert", **changes) -> Path:
    """Random weights, and a tokenizer that makes <s> a </s> b </s> of a pair."""
    sizes = {"pad_id": 1} if kind == "roberta" else {"pooler": True}
    config = dataclasses.replace(MICRO, **sizes | changes)
    save_roberta(Encoder(config, rngs=nnx.Rngs(0)), folder)
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocabulary = special | {word: 4 + i for i, word in enumerate(WORDS)}

    def token(name, type_id=0):
        return {"SpecialToken": {"id": name, "type_id": type_id}}

    def text(name, type_id=0):
        return {"Sequence": {"id": name, "type_id": type_id}}

    processor = {
        "type": "TemplateProcessing",
        "single": [token("<s>"), text("A"), token("</s>")],
        "pair": [token("<s>"), text("A"), token("</s>"), text("B", 1), token("</s>", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in ("<s>", "</s>")
        },
    }
    file, settings = folder / "tokenizer.json", {"post_processor": processor}
    short = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
    write_tokenizer(file, vocabulary, special=tuple(special), truncation=short, **settings)
    return folder


def write_mrpc(folder: Path, *, test: bool = False) -> Path:
    """Official TSV files: the words of paraphrases are others than those of other pairs."""
    rng = np.random.default_rng(0)
    (folder / "MRPC").mkdir(parents=True)
    names = {"train": 40, "dev": 20} | ({"test": 10} if test else {})
    for name, count in names.items():
        lines = ["index" if name == "test" else "Quality"]
        lines[0] += "\t#1 ID\t#2 ID\t#1 String\t#2 String"
        for i in range(count):
            same = int(rng.integers(2))
            words = rng.integers(10, size=(2, rng.integers(3, 12))) + 10 * same
            label = i if name == "test" else same
            texts = (" ".join(WORDS[j] for j in x) for x in words)
            lines.append("\t".join((str(label), "1", "2", *texts)))
        (folder / "MRPC" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def small_glue(folder: Path, **changes) -> Finetune:
    """The settings, for the encoder and the data in `folder`, which are written where missing."""
    if not (folder / "encoder").is_dir():
        write_encoder(folder / "encoder")
    if not (folder / "data").is_dir():
        write_mrpc(folder / "data")
    own = {"init": str(folder / "encoder"), "data_dir": str(folder / "data")}
    return dataclasses.replace(SMALL, **own | changes)
