"""The flags of the commands that train language models only, in groups as in `flags`."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TextFlags:
    """Model and data."""

    model: str | None = None
    """tiny, llama-60m, -130m, -350m, -1b or -7b, with the sizes of the GaLore paper; or the path of
    a config.json of transformers, of a LLaMA or Mistral. Default: tiny, or that of --init."""
    init: str | None = None
    """Folder with the weights to begin with: a LLaMA or Mistral of transformers, or a run of
    train.pretrain. Default: random weights."""
    data: Literal["builtin", "c4", "text"] = "builtin"
    """`builtin`: text that ships with Python, about 2 MB; `c4`: the TFDS data set in --data-dir;
    `text`: your own files there."""
    data_dir: str | None = None
    """Folder of the data set, as `python -m train.prepare_c4` writes one. With --data text: a
    folder, a file or a pattern such as 'texts/*.jsonl': plain text (.txt, .md), JSON lines or
    Parquet with `text`, also as .gz. All is read into memory."""
    eval_data: str | None = None
    """The same for evaluation, with --data text. Default: each twentieth document of --data-dir."""
    tokenizer: str | None = None
    """`bytes`, or the path of a tokenizer.json. Default: bytes, or that of --init."""
    end_token: str | None = None
    """Token of the tokenizer.json that ends a document, such as </s>. Default: the one that it and
    the files beside it name, else its one special token with a common name."""
    sequences: Literal["packed", "document"] = "packed"
    """`packed`: no padding, no attention across documents; `document`: one document per row,
    truncated or padded, as published."""
    skip_unreadable: bool = False
    """Name and skip documents of C4 that cannot be read."""


@dataclasses.dataclass(frozen=True)
class OwnTextFlags:
    """Model and data."""

    init: str | None = None
    """Folder with the weights to begin with: a LLaMA or Mistral of transformers, or a run of
    train.pretrain or train.finetune_lm. Required."""
    data: tuple[str, ...] = ()
    """Files to learn from, folders or patterns such as 'chats/*.jsonl': JSON lines or Parquet with
    `text`, `prompt` and `completion`, or `messages`; plain text (.txt, .md). Required."""
    eval_data: tuple[str, ...] = ()
    """The same for evaluation. Default: each twentieth example of --data, which is not learnt."""
    tokenizer: str | None = None
    """`bytes`, or the path of a tokenizer.json. Default: that of --init."""
    end_token: str | None = None
    """Token of the tokenizer.json that ends an answer, such as <|eot_id|>. Default: the one that it
    and the files beside it name."""
    chat_template: str | None = None
    """File with the chat template, in Jinja, that writes `messages`. Default: the one that a run in
    --init was given, else that beside the tokenizer.json."""
    sequences: Literal["packed", "document"] = "packed"
    """`packed`: several whole examples in a row, without attention across; `document`: one example
    per row. What exceeds a row is cut off; a `text` goes on in another row."""
    epochs: float | None = None
    """Passes over the examples, instead of --steps. Default: 3."""


@dataclasses.dataclass(frozen=True)
class TextRunFlags:
    """The run."""

    eval_tokens: int | None = None
    """Validation tokens per evaluation. Default: all; 10 million of C4."""
    data_parts: int | None = None
    """Parts into which the text is cut, a divisor of --batch-size: each of several processes reads
    those of its own rows. Default: the greatest common divisor of --batch-size and 8."""
    workers: int = 0
    """Processes that read and tokenize; 0: the training process does."""
    prompt: str = "The "
    """Prompt of the text that is sampled."""


@dataclasses.dataclass(frozen=True)
class SampleFlags:
    """The run."""

    sample_every: int | None = None
    """Steps between two samples of text, kept in samples/ of the run. Default: one at the end."""
