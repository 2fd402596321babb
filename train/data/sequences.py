"""From documents to the rows of a batch: packed one after another, or one document per row.

A batch is a dict of arrays, all (batch, length):
  inputs, targets: int32 token ids; targets[:, i] is what follows inputs[:, i].
  positions: int32, from 0 at the start of a document and of a row.
  segment_ids: int32, from 1 in each row, one for each document in it; 0 is padding.
  weights: float32, 1 if the target counts, 0 for padding.

One separator precedes each document: as an input it is the document's beginning (or the token
`begin` is), as a target the end of the previous one. Rows are a fixed function of the documents and
the position.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

Batch = dict[str, np.ndarray]
Document = Int[np.ndarray, " length"]


class Position(NamedTuple):
    """A place in the stream of documents, and in the window of rows that begins there."""

    documents: int = 0  # completely read
    tokens: int = 0  # read of the next one, with its separator
    windows: int = 0  # of `shuffled_rows`, completely used
    batches: int = 0  # used of the next one


START = Position()
Positions = tuple[Position, ...]  # of each part of the data
Batches = Iterator[tuple[Batch, Position]]  # each batch with the position after it


def packed_batches(
    documents: Iterable[Document],
    *,
    separator: int,
    begin: int | None = None,
    batch_size: int,
    seq_len: int,
    start: Position = START,
) -> Batches:
    """Rows without padding, filled one after another from the stream of documents.

    A document that does not fit goes on in the next row, as a segment of its own. Each token of the
    stream is a target once, except the very first separator. Empty documents are skipped.

    `documents` begin with number `start.documents`; if they end, the last batch is padded.
    """
    size = batch_size * seq_len
    number, taken = start[:2]
    document, documents = None, iter(documents)
    while True:
        stream, begins, filled = np.full(size + 1, separator, np.int32), np.zeros(size, bool), 0
        while filled < size:
            if document is None:
                if (tokens := next(documents, None)) is None:
                    break
                if taken > len(tokens):
                    raise ValueError(
                        f"position {start[:2]} is beyond the {len(tokens) + 1} tokens of its "
                        "document: it was saved with other data or another tokenizer"
                    )
                if not len(tokens):
                    number += 1
                    continue
                document = np.concatenate([[separator], tokens])
            piece = document[taken : taken + size - filled]
            stream[filled : filled + len(piece)] = piece
            begins[filled] = True
            filled, taken = filled + len(piece), taken + len(piece)
            if taken == len(document):
                document, number, taken = None, number + 1, 0
        if not filled:
            return
        if document is not None:  # else a separator follows
            stream[size] = document[taken]
        batch = _packed_batch(stream, begins, filled, (batch_size, seq_len))
        yield _begun(batch, separator, begin), Position(number, taken)


def _begun(batch: Batch, separator: int, begin: int | None) -> Batch:
    """The batch in which `begin` is before each document: no text gives the separator."""
    if begin is None or begin == separator:
        return batch
    inputs = batch["inputs"]
    return batch | {"inputs": np.where(inputs == separator, np.int32(begin), inputs)}


def _packed_batch(
    stream: Document, begins: Bool[np.ndarray, " size"], filled: int, shape: tuple[int, int]
) -> Batch:
    """Cuts `stream` into rows; `begins` marks the documents' starts, padding starts at `filled`."""
    begins = begins.reshape(shape)
    begins[:, 0] = True
    column = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    valid = (np.arange(begins.size) < filled).reshape(shape)
    return {
        "inputs": stream[:-1].reshape(shape),
        "targets": stream[1:].reshape(shape),
        "positions": column - np.maximum.accumulate(np.where(begins, column, 0), axis=1),
        "segment_ids": np.where(valid, np.cumsum(begins, axis=1), 0).astype(np.int32),
        "weights": valid.astype(np.float32),
    }


def document_batches(
    documents: Iterable[Document],
    *,
    separator: int,
    begin: int | None = None,
    batch_size: int,
    seq_len: int,
    start: Position = START,
) -> Batches:
    """One document per row, truncated or padded, as GaLore's paper does; see `packed_batches`."""
    if start.tokens:
        said = "is inside a document: it was saved in packed mode"
        raise ValueError(f"position {start[:2]} {said}")
    number, documents = start.documents, iter(documents)
    while True:
        stream = np.full((batch_size, seq_len + 1), separator, np.int32)
        lengths, row = np.zeros((batch_size, 1), np.int32), 0
        while row < batch_size and (tokens := next(documents, None)) is not None:
            number += 1
            if len(tokens):
                kept = tokens[:seq_len]
                stream[row, 1 : 1 + len(kept)] = kept
                lengths[row] = min(len(tokens) + 1, seq_len)
                row += 1
        if not row:
            return
        column = np.arange(seq_len, dtype=np.int32)
        valid = column < lengths
        batch = {
            "inputs": stream[:, :-1].copy(),
            "targets": stream[:, 1:].copy(),
            "positions": np.where(valid, column, 0),
            "segment_ids": valid.astype(np.int32),
            "weights": valid.astype(np.float32),
        }
        yield _begun(batch, separator, begin), Position(number)


MODES: dict[str, Callable[..., Batches]] = {"packed": packed_batches, "document": document_batches}


# Rows that `shuffled_rows` shuffles together, more than most documents fill, and batches at most.
WINDOW, BATCHES = 4096, 64


def shuffled_rows(batches: Batches, *, seed: int, start: Position = START) -> Batches:
    """Batches of the same rows in another order, so that a long document does not fill whole ones.

    Rows are shuffled within windows of several batches. The order depends on the seed and the
    window's number alone. `batches` begin at the window in which `start` is, and never end. For
    each batch one is read, so that no step waits for a whole window; two windows are in memory.
    """
    first, position = next(batches)
    size = len(first["inputs"])
    count = min(BATCHES, -(-WINDOW // size))
    ahead = [first]
    for batch, at in itertools.islice(batches, count - 1):
        ahead.append(batch)
        position = at
    begin, taken = start._replace(batches=0), start.batches
    while True:
        rows = {name: np.concatenate([batch[name] for batch in ahead]) for name in first}
        ahead = []
        end, at = Position(*position[:2], begin.windows + 1), begin.windows * count * size
        for used in range(1, count + 1):
            batch, position = next(batches)
            ahead.append(batch)
            if used > taken:
                chosen = _shuffled(count * size, seed, at + (used - 1) * size, size)
                batch = {name: x[chosen] for name, x in rows.items()}
                yield batch, end if used == count else begin._replace(batches=used)
        begin, taken = end, 0


@lru_cache(maxsize=1)  # parts of a stream need the same, one after another
def _shuffled(count: int, seed: int, start: int, size: int) -> Int[np.ndarray, " size"]:
    """Numbers of the endless stream of shuffled `range(count)`s, from number `start` on."""
    import grain

    # Grain shuffles with another seed in each epoch.
    order = grain.MapDataset.range(count).shuffle(seed).repeat()
    return np.array([order[start + i] for i in range(size)])


def limit_tokens(batches: Iterable[Batch], max_tokens: int) -> Iterator[Batch]:
    """The batches up to `max_tokens` targets that count; later ones get weight 0."""
    left = max_tokens
    for batch in batches:
        if left <= 0:
            return
        weights = batch["weights"]
        counted = np.cumsum(weights.reshape(-1), dtype=np.int64).reshape(weights.shape)
        yield batch | {"weights": weights * (counted <= left)}
        left -= int(counted[-1, -1])


def check_token_ids(batch: Batch, vocab_size: int) -> None:
    """Raises ValueError if a token id is not below `vocab_size`, a model's vocabulary."""
    largest = int(max(batch["inputs"].max(), batch["targets"].max()))
    if largest >= vocab_size:
        raise ValueError(
            f"token id {largest} is beyond the model's vocabulary of {vocab_size}: take the "
            "tokenizer that belongs to the model, or a model with a larger vocabulary"
        )
