"""From documents to batches on devices: shuffled order, tokenizing, worker processes, prefetching.

The stream of documents is cut into parts, each of which fills its own rows of every batch: of
several processes each reads the parts of its rows. A batch is a function of the source, the seed,
the number of parts and the position alone, for any number of workers, processes and devices.
"""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from train.data import sequences
from train.data.sequences import MODES, START, Batch, Batches, Document, Position, Positions
from train.data.tokenizer import Tokenizer

T = TypeVar("T")

# Documents that a worker process sends together, and such groups that each keeps ready.
_GROUP, _GROUPS_AHEAD = 32, 4
# More worker processes than this only take memory, and a typing error would start a million.
_WORKERS_PER_CORE = 8


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """An endless stream of batches, reshuffled in each epoch, that starts at any position.

    Of the shuffled documents, part k has those with the numbers k, k + parts, k + 2 parts, ...;
    they fill batch_size / parts rows of each batch, from row k batch_size / parts on.
    """

    source: Sequence[str]  # the documents, e.g. of `train.data.text.load_text`
    tokenizer: Tokenizer
    _: dataclasses.KW_ONLY
    batch_size: int  # rows, over all devices and processes
    seq_len: int  # tokens in a row
    mode: str = "packed"  # no padding, no attention across documents; or "document": one per row
    seed: int = 0  # of the order of the documents and of their rows
    parts: int = 1  # into which the stream is cut; a divisor of batch_size
    read: Sequence[int] | None = None  # parts read here; rows of others are zeros. Default: all
    workers: int = 0  # processes that read and tokenize; 0: this process does both
    vocab_size: int | None = None  # the model's; default: the tokenizer's

    def __post_init__(self):
        sizes = {"batch_size": self.batch_size, "seq_len": self.seq_len}
        _check(self.source, self.tokenizer, self.mode, self.vocab_size, **sizes)
        most = _WORKERS_PER_CORE * (os.cpu_count() or 1)
        if not 0 <= self.workers <= most:
            expected = f"the number of processes, 0 for none, {most} at most here"
            raise ValueError(f"workers={self.workers}: give {expected}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: give a seed from 0 to {2**32 - 1}")
        if self.parts < 1 or self.batch_size % self.parts:
            raise ValueError(f"parts={self.parts}: give a divisor of batch_size={self.batch_size}")

    def batches(self, start: Positions | None = None) -> Generator[tuple[Batch, Positions]]:
        """Batches from a position on, each with the position after; closing it ends the workers.

        A position has one of each part, which is that of the start for parts that are not read.
        """
        positions = [START] * self.parts if start is None else [*start]
        rows = self.batch_size // self.parts
        own = range(self.parts) if self.read is None else self.read
        with self._read({k: positions[k].documents for k in own}) as documents:
            made = {k: self._rows(documents[k], positions[k]) for k in own}
            while True:
                batch: Batch = {}
                for k, stream in made.items():
                    found, positions[k] = next(stream)
                    for name, x in found.items():
                        if name not in batch:
                            batch[name] = np.zeros((self.batch_size, *x.shape[1:]), x.dtype)
                        batch[name][k * rows : (k + 1) * rows] = x
                sequences.check_token_ids(batch, self.vocab_size or self.tokenizer.vocab_size)
                yield batch, tuple(positions)

    def _rows(self, documents: Iterator[Document], start: Position) -> Batches:
        """A part's rows of each batch, with its position after it."""
        sizes = {"batch_size": self.batch_size // self.parts, "seq_len": self.seq_len}
        made = MODES[self.mode](documents, **_separators(self.tokenizer), start=start, **sizes)
        if self.mode == "packed":
            made = sequences.shuffled_rows(made, seed=self.seed, start=start)
        return made

    def documents(self, start: int, part: int = 0) -> Generator[Document]:
        """Token ids of a part's documents from its number `start` on, without end."""
        with self._read({part: start}) as documents:
            yield from documents[part]

    @contextmanager
    def _read(self, starts: Mapping[int, int]) -> Iterator[Mapping[int, Iterator[Document]]]:
        """The documents of some parts, each from a number of its own on.

        The parts share the workers, which read a group of documents for each of them in turn. What
        comes for one part before it is asked for is kept: parts of a shuffled text are alike, so
        that they ask for nearly as many.
        """
        import grain

        # Grain shuffles with another seed in each epoch: index // len(source) is the epoch.
        stream = grain.MapDataset.source(self.source).shuffle(self.seed).repeat()
        document: Any = stream.map(self.tokenizer.encode).__getitem__
        if not self.workers:
            parts = {k: itertools.count(n * self.parts + k, self.parts) for k, n in starts.items()}
            yield {k: self._checked(map(document, numbers)) for k, numbers in parts.items()}
            return
        _mark_flags_as_parsed()
        groups = (
            grain.MapDataset.range(2**62)
            .map(partial(_in_turn, tuple(starts.items()), self.parts))
            .map(document)
            .batch(_GROUP, batch_fn=_join)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(
                grain.MultiprocessingOptions(self.workers, _GROUPS_AHEAD),
                worker_init_fn=_start_worker,
            )
        )
        kept: dict[int, collections.deque[Document]] = {k: collections.deque() for k in starts}
        turns = itertools.cycle(starts)

        def of(part: int) -> Iterator[Document]:
            while True:
                while not kept[part]:
                    tokens, lengths = next(iterator)
                    # A copy, because shared memory is released with `tokens`.
                    split = np.split(np.array(tokens), np.cumsum(lengths)[:-1])
                    kept[next(turns)].extend(split)
                yield kept[part].popleft()

        with closing(iter(groups)) as iterator, _worker_loss_as_os_error():
            yield {k: self._checked(of(k)) for k in starts}

    def _checked(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents; ValueError if none has a token."""
        empty = 0
        for document in documents:
            empty = 0 if len(document) else empty + 1
            if empty > 2 * len(self.source):
                # A part may have missed a document for some epochs.
                if not any(len(self.tokenizer.encode(text)) for text in self.source):
                    raise ValueError("every document of the training text is empty")
                empty = 0
            yield document


def _in_turn(starts: Sequence[tuple[int, int]], parts: int, i: int) -> int:
    """The number of the i-th document, of groups for each of some parts in turn."""
    group, within = divmod(i, _GROUP)
    turn, which = divmod(group, len(starts))
    part, start = starts[which]
    return (start + turn * _GROUP + within) * parts + part


@contextmanager
def _worker_loss_as_os_error() -> Iterator[None]:
    """Raises what Grain raises when a worker process has ended as an OSError that says so."""
    try:
        yield
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        reason = "most likely because the host's memory was short"
        raise OSError(
            f"a process that reads and tokenizes was ended from outside, {reason}: resume the run, "
            f"with fewer --workers ({error})"
        ) from error


def _join(documents: Sequence[Document]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " d"]]:
    """Documents end to end, and their lengths: Grain takes a block of shared memory for each."""
    return np.concatenate(documents), np.array([len(document) for document in documents])


def _mark_flags_as_parsed() -> None:
    """Grain reads absl's flags, which raise unless absl.app has parsed them."""
    from absl import flags

    flags.FLAGS.mark_as_parsed()


def _start_worker(_number: int, _count: int) -> None:
    """Runs first in each worker process."""
    _mark_flags_as_parsed()
    # Ctrl-C reaches all processes of a terminal: the run ends itself, then its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """Ends a worker process after its run was killed; Grain's would wait forever."""
    run = multiprocessing.parent_process()
    assert run is not None
    run.join()
    time.sleep(1)  # until the queue is full: a half-made block of shared memory would remain
    os._exit(1)


def evaluation_batches(
    source: Sequence[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    mode: str = "packed",
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> list[Batch]:
    """The fixed batches that a run is evaluated on: the documents in order, each once.

    `max_tokens` is the most targets that count, default all. The last batch is padded. Other
    arguments and errors: see `TrainingData`.
    """
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    _check(source, tokenizer, mode, vocab_size, **sizes)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: give at least 1")
    documents = (tokenizer.encode(source[i]) for i in range(len(source)))
    made = MODES[mode](documents, **_separators(tokenizer), **sizes)
    kept = (batch for batch, _ in made)
    result = list(kept if max_tokens is None else sequences.limit_tokens(kept, max_tokens))
    if not result:
        raise ValueError("every document of the validation text is empty")
    for batch in result:
        sequences.check_token_ids(batch, vocab_size or tokenizer.vocab_size)
    return result


def _separators(tokenizer: Tokenizer) -> dict[str, int]:
    return {"separator": tokenizer.separator, "begin": tokenizer.begin}


def _check(
    source: Sequence[str], tokenizer: Tokenizer, mode: str, vocab_size: int | None, **sizes: int
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown: choose one of {', '.join(MODES)}")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if not len(source):
        raise ValueError("the text has no document")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer gives token ids up to {tokenizer.vocab_size - 1}, beyond the model's "
            f"vocabulary of {vocab_size}: take another tokenizer, or a model with a larger one"
        )


def prefetch(
    batches: Iterator[tuple[Batch, Positions]], put: Callable[[Batch], T], size: int = 2
) -> Generator[tuple[T, Positions]]:
    """Runs `put`, such as to the devices, `size` batches ahead in a thread; closes `batches`."""

    def produce() -> tuple[T, Positions] | None:
        item = next(batches, None)
        return None if item is None else (put(item[0]), item[1])

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        ahead = collections.deque(thread.submit(produce) for _ in range(size))
        try:
            while (item := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(produce))
                yield item
        finally:
            for future in ahead:
                future.cancel()
            # In the thread, after the batch that it may be working on.
            if (close := getattr(batches, "close", None)) is not None:
                thread.submit(close).result()
