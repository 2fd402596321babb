"""The perplexity of a model on text: `python -m train.evaluate --run DIR --data FILES`."""

import dataclasses
import json
import math
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from models.hugging_face.llama import load_llama
from train.config.settings import Pretrain, flag
from train.config.source import is_run, with_model
from train.data.files import read_files
from train.data.loader import evaluation_batches
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.run.cli import run
from train.run.trained import load_trained
from train.step.ordinary import summed_loss
from train.step.programs import make_forward
from train.step.state import Params

# Tokens in a row for a model of transformers, unless it takes fewer.
_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Print the perplexity of a run's best checkpoint, or of a model of transformers, on text."""

    data: tuple[str, ...]
    """Files, folders or quoted patterns: a plain text (.txt, .md) is one document, and so is each
    `text` in JSON (.jsonl, .json) and Parquet; .gz is unpacked."""
    run: str | None = None
    """Folder of a run."""
    init: str | None = None
    """Folder of a model of transformers, instead of --run."""
    tokenizer: str | None = None
    """`bytes`, or the path of a tokenizer.json. Default: the one of the run, or in --init."""
    end_token: str | None = None
    """Token of the tokenizer.json that ends a document. Default: the one that the files name."""
    seq_len: int | None = None
    """Tokens per row, as many as a prediction can look back on. Default: the run's; 1024 with
    --init, or the model's longest if that is shorter."""
    batch_size: int = 8
    """Rows that are computed at once."""
    json: bool = False
    """Print the numbers as one JSON object."""


class _Loaded(NamedTuple):
    """A run's model or that of a folder of transformers."""

    graph: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer
    step: int | None = None  # of the run's checkpoint
    seq_len: int | None = None  # that the run trained with


def main(config: Evaluate) -> int:
    """Prints loss and perplexity; ValueError if the model, the text or the tokenizer do not fit."""
    for name in ("seq_len", "batch_size"):
        value = getattr(config, name)
        if value is not None and not 1 <= value < 2**31:
            raise ValueError(f"{flag(name)} {value}: expected 1 or more")
    texts = read_files(config.data)
    if not any(texts):
        raise ValueError(f"--data {' '.join(config.data)}: there is no text in it")
    model = _load(config)
    longest = nnx.merge(model.graph, model.params).config.max_length
    length = config.seq_len or model.seq_len or min(_LENGTH, longest)
    if length > longest:
        raise ValueError(f"--seq-len {length}: the model takes at most {longest} tokens")
    found = evaluated(model, texts, batch_size=config.batch_size, seq_len=length)
    if config.json:
        print(json.dumps({k: _finite(v) for k, v in found.items()}))
        return 0
    at = "" if model.step is None else f" after step {model.step}"
    source = config.run or config.init
    print(
        f"{source}{at}: {found['documents']:,} document(s), {found['tokens']:,} tokens (the end of "
        f"a document is one), {found['bytes']:,} bytes, rows of {length} tokens\n"
        f"loss                  {found['loss']:.4f} nats per token\n"
        f"perplexity per token  {found['perplexity_per_token']:,.4f}\n"
        f"perplexity per byte   {found['perplexity_per_byte']:,.4f}, "
        f"{found['bits_per_byte']:.4f} bits per byte"
    )
    return 0


def evaluated(
    loaded: _Loaded, texts: list[str], *, batch_size: int, seq_len: int
) -> dict[str, float | int]:
    """The loss of a model on documents, packed into rows.

    `loss` is the mean over all tokens, including the ends of documents, in nats.
    `perplexity_per_byte` is exp of the mean loss per UTF-8 byte: models with different tokenizers
    can be compared by it.
    """
    model: Any = nnx.merge(loaded.graph, loaded.params)
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    batches = evaluation_batches(
        texts, loaded.tokenizer, **sizes, vocab_size=model.config.vocab_size
    )
    step = jax.jit(partial(summed_loss, make_forward(loaded.graph, "packed")))
    losses = [step(loaded.params, batch) for batch in batches]
    total = float(np.sum(jax.device_get(losses), dtype=np.float64))
    tokens = int(sum(batch["weights"].sum(dtype=np.float64) for batch in batches))
    size = sum(len(text.encode("utf-8", errors="replace")) for text in texts)
    return {
        "loss": total / tokens,
        "perplexity_per_token": _exp(total / tokens),
        "perplexity_per_byte": _exp(total / size),
        "bits_per_byte": total / size / math.log(2),
        "tokens": tokens,
        "bytes": size,
        "documents": sum(map(bool, texts)),
        "seq_len": seq_len,
    }


def _load(config: Evaluate) -> _Loaded:
    if (config.run is None) == (config.init is None):
        raise ValueError("name one of --run, a run's folder, and --init, that of another model")
    option, folder = ("--init", config.init) if config.run is None else ("--run", config.run)
    if config.run is not None or is_run(str(folder)):
        for name in ("tokenizer", "end_token"):
            if getattr(config, name) is not None:
                raise ValueError(f"{flag(name)} has no effect with a run, which has its own")
        trained = load_trained(str(folder), option, partial(print, file=sys.stderr))
        return _Loaded(*trained[:3], trained.step, trained.config.seq_len)
    named = {name: getattr(config, name) for name in ("init", "tokenizer", "end_token")}
    found = with_model(Pretrain(**named))
    tokenizer = load_tokenizer(str(found.tokenizer), found.end_token)
    graph, params = nnx.split(load_llama(str(folder)), nnx.Param)
    return _Loaded(graph, nnx.to_pure_dict(params), tokenizer)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    run(main, Evaluate, "python -m train.evaluate")
