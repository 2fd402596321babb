"""From one text or two to padded rows of token ids, of few lengths so that few are compiled.

A batch is a dict of arrays: `inputs` and `token_types` int32 (B, L); `mask` bool (B, L), all but
padding; `targets` (B,) int32 classes or float32 numbers; `weights` float32 (B,), 0 for a row that
fills a batch up.
"""

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from train.data.agreement import check_agreement, name_in, read_beside
from train.data.glue import Examples
from train.data.separator import first_and_last
from train.data.sequences import START, Batch, Position, Positions
from train.data.tokenizer import errors_named, read_tokenizer

# Lengths to which rows are padded, up to --seq-len.
_LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Row(NamedTuple):
    """An example as token ids."""

    ids: Int[np.ndarray, " length"]
    types: Int[np.ndarray, " length"]


@dataclasses.dataclass(frozen=True)
class PairTokenizer:
    """The tokenizer.json beside an encoder's weights, with its post-processor."""

    path: Path
    seq_len: int  # the longer of two texts is truncated until both fit
    vocab_size: int  # of the model
    token_types: int  # of the model; 1: those of the tokenizer are not used
    pad_id: int | None = None  # of the model, if its positions leave that token out

    def rows(self, texts: list[tuple[str, ...]]) -> list[Row]:
        """Encodes examples; ValueError if the tokenizer does not fit the model."""
        side = read_beside(self.path, "tokenizer_config.json").get("truncation_side") or "right"
        tokenizer = read_tokenizer(self.path)
        content = json.loads(tokenizer.to_str())
        with errors_named(lambda said: f"{self.path} cannot encode the texts ({said})"):
            tokenizer.enable_truncation(self.seq_len, strategy="longest_first", direction=side)
            added = tokenizer.num_special_tokens_to_add(is_pair=len(texts[0]) == 2)
            if added >= self.seq_len:
                raise ValueError(
                    f"--seq-len {self.seq_len}: {self.path} adds {added} special tokens, and no "
                    "text would be left; choose more"
                )
            found = tokenizer.encode_batch([x if len(x) == 2 else x[0] for x in texts])
        first, _ = first_and_last(content["post_processor"])
        check_agreement(tokenizer, content, self.path, first)
        if not added:
            raise ValueError(
                f"{self.path} adds no special tokens: its post_processor must make a pair from two "
                "texts, as transformers saves it"
            )
        one = self.token_types == 1
        rows = [
            Row(np.array(x.ids, np.int32), np.array(x.type_ids, np.int32) * (not one))
            for x in found
        ]
        largest = max(int(row.ids.max()) for row in rows)
        if largest >= self.vocab_size or max(int(row.types.max()) for row in rows) > max(
            1, self.token_types - 1
        ):
            raise ValueError(
                f"{self.path} gives token id {largest}, the model has vocab_size={self.vocab_size} "
                f"and token_types={self.token_types}: take the tokenizer of the model"
            )
        if any(self.pad_id in row.ids for row in rows):
            name = name_in(tokenizer, int(self.pad_id or 0))
            raise ValueError(
                f"{self.path} gives {name!r} for a text, the model's pad_token_id {self.pad_id}: "
                "take the tokenizer of the model, and leave the name out of the texts"
            )
        return rows


def padded_length(length: int, seq_len: int) -> int:
    """The length to which the longest row of a batch is padded."""
    return min([x for x in _LENGTHS if length <= x < seq_len] or [seq_len])


@dataclasses.dataclass(frozen=True)
class PairData:
    """An endless stream of batches, reshuffled in each epoch, that starts at any position."""

    rows: list[Row]
    labels: np.ndarray
    _: dataclasses.KW_ONLY
    batch_size: int
    seq_len: int
    pad_id: int
    seed: int = 0  # of the order

    def longest(self) -> int:
        """The length of the longest batch."""
        return padded_length(max(len(row.ids) for row in self.rows), self.seq_len)

    def batches(self, start: Positions | None = None) -> Generator[tuple[Batch, Positions]]:
        """Batches from a position on, which counts examples, each with the position after it.

        The data have one part.
        """
        import grain

        examples: Any = grain.MapDataset.range(len(self.rows)).shuffle(self.seed).repeat()
        first = (start or (START,))[0].documents
        while True:
            chosen = [examples[first + i] for i in range(self.batch_size)]
            first += self.batch_size
            yield self.batch(chosen), (Position(first),)

    def evaluation(self, size: int) -> list[tuple[Batch, list[int]]]:
        """All examples, those of one length together, in batches of `size` with their numbers."""
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i].ids))
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        return [(self.batch(part, size), part) for part in parts]

    def batch(self, numbers: list[int], size: int | None = None) -> Batch:
        """A batch of the examples with these numbers, filled up to `size`."""
        rows = [self.rows[i] for i in numbers]
        size = len(rows) if size is None else size
        length = padded_length(max(len(row.ids) for row in rows), self.seq_len)
        batch = {
            "inputs": np.full((size, length), self.pad_id, np.int32),
            "token_types": np.zeros((size, length), np.int32),
            "mask": np.zeros((size, length), bool),
            "targets": np.zeros(size, self.labels.dtype),
            "weights": np.zeros(size, np.float32),
        }
        for i, row in enumerate(rows):
            n = len(row.ids)
            batch["inputs"][i, :n], batch["token_types"][i, :n] = row
            batch["mask"][i, :n] = True
        batch["targets"][: len(rows)] = self.labels[numbers]
        batch["weights"][: len(rows)] = 1
        return batch


def pair_data(examples: Examples, tokenizer: PairTokenizer, **how: int) -> PairData:
    """The data of a split."""
    rows = tokenizer.rows(examples.texts)
    return PairData(rows, examples.labels, seq_len=tokenizer.seq_len, **how)
