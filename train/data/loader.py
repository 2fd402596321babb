"""The way of the data: documents in shuffled order, tokenized, made into batches, put on devices.

Grain reads and tokenizes, in this process or in worker processes, always in the same order: a
batch is a function of the source, the seed and the position alone. Every process of a multi-process
run reads the same stream and puts its own rows of the global batch on its devices, so that a
position means the same for any number of workers, processes and devices.
"""

import collections
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np

from train.data.sequences import (
    MODES,
    START,
    Batch,
    Document,
    Position,
    check_token_ids,
    limit_tokens,
)
from train.data.tokenizer import Tokenizer

T = TypeVar("T")

# Documents that travel together from a worker process, and such groups that each holds ready.
_GROUP = 32
_GROUPS_AHEAD = 4
# More worker processes than this only take memory, and a slip of the key starts a million.
_WORKERS_A_CORE = 8


class TrainingData:
    """An endless stream of batches, shuffled anew in each epoch, that starts at any position.

    Args:
        source: the documents, e.g. of `train.data.text.load_text` or a list of strings.
        tokenizer: of `train.data.tokenizer.load_tokenizer`.
        batch_size: rows in a batch, over all devices and processes.
        seq_len: tokens in a row.
        mode: "packed" (no padding, no attention across documents) or "document" (one a row).
        seed: of the order of the documents.
        workers: processes that read and tokenize; 0 does both in this one.
        vocab_size: the model's; by default the tokenizer's.

    Raises:
        ValueError: an unknown mode, a size below 1, more workers than eight for each of the
            machine's cores, an empty source, or a tokenizer with more ids than the model's
            vocabulary.
    """

    def __init__(
        self,
        source: Sequence[str],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seq_len: int,
        mode: str = "packed",
        seed: int = 0,
        workers: int = 0,
        vocab_size: int | None = None,
    ):
        _check_sizes(source, mode, batch_size, seq_len)
        most = _WORKERS_A_CORE * (os.cpu_count() or 1)
        if not 0 <= workers <= most:
            raise ValueError(
                f"workers={workers}: give the number of processes, 0 for none, {most} at most here"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}: give a seed from 0 to {2**32 - 1}")
        if vocab_size is None:
            vocab_size = tokenizer.vocab_size
        check_vocabulary(tokenizer, vocab_size)
        self.source, self.tokenizer = source, tokenizer
        self.batch_size, self.seq_len, self.mode = batch_size, seq_len, mode
        self.seed, self.workers, self.vocab_size = seed, workers, vocab_size

    def batches(self, start: Position = START) -> Generator[tuple[Batch, Position]]:
        """Batches from a position on, each with the position after it.

        Close it (`contextlib.closing`) when done: worker processes end then.
        """
        with closing(self._documents(start.documents)) as documents:
            for batch, position in MODES[self.mode](
                documents,
                separator=self.tokenizer.separator,
                batch_size=self.batch_size,
                seq_len=self.seq_len,
                start=start,
            ):
                check_token_ids(batch, self.vocab_size)
                yield batch, position

    def _documents(self, start: int) -> Generator[Document]:
        """Token ids of the documents from number `start` of the endless stream on."""
        import grain

        # Grain shuffles with another seed in each epoch: index // len(source) is the epoch.
        stream = grain.MapDataset.source(self.source).shuffle(self.seed).repeat()
        groups = (
            stream[start:]
            .map(self.tokenizer.encode)
            .batch(_GROUP, batch_fn=_join)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )
        if self.workers:
            _mark_flags_as_parsed()
            groups = groups.mp_prefetch(
                grain.MultiprocessingOptions(self.workers, _GROUPS_AHEAD),
                worker_init_fn=_start_worker,
            )
        empty = 0
        with closing(iter(groups)) as iterator:
            for tokens, lengths in iterator:
                # A copy, because shared memory is released with `tokens`.
                for document in np.split(np.array(tokens), np.cumsum(lengths)[:-1]):
                    empty = 0 if len(document) else empty + 1
                    if empty > 2 * len(self.source):  # a whole epoch at least
                        raise ValueError("every document of the training text is empty")
                    yield document


def _join(documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Documents end to end, and their lengths: Grain takes one block of shared memory for each."""
    return np.concatenate(documents), np.array([len(document) for document in documents])


def _mark_flags_as_parsed() -> None:
    """Grain reads absl's flags, which raise where no absl.app has parsed them."""
    from absl import flags

    flags.FLAGS.mark_as_parsed()


def _start_worker(_number: int, _count: int) -> None:
    """Runs first in each worker process."""
    _mark_flags_as_parsed()
    # Ctrl-C reaches all processes of a terminal: the run ends itself, then its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """Ends a worker whose run was killed: Grain's would wait for it for ever."""
    run = multiprocessing.parent_process()
    assert run is not None
    run.join()
    time.sleep(1)  # until the queue is full: a block of shared memory that is half made would stay
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
    """The fixed set of batches that a run is evaluated on: the documents in order, each once.

    Args:
        source: the validation documents.
        tokenizer: as in training.
        batch_size: rows in a batch; the last one is padded.
        seq_len: tokens in a row.
        mode: "packed" or "document", as in training.
        max_tokens: how many targets count in all; fewer where the documents end before, all of them
            by default. No target is counted twice.
        vocab_size: the model's; by default the tokenizer's.

    Raises:
        ValueError: as for `TrainingData`, or the documents have no token.
    """
    _check_sizes(source, mode, batch_size, seq_len)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: give at least 1")
    if vocab_size is None:
        vocab_size = tokenizer.vocab_size
    check_vocabulary(tokenizer, vocab_size)
    documents = (tokenizer.encode(source[i]) for i in range(len(source)))
    batches = MODES[mode](
        documents, separator=tokenizer.separator, batch_size=batch_size, seq_len=seq_len
    )
    kept = (batch for batch, _ in batches)
    result = list(kept if max_tokens is None else limit_tokens(kept, max_tokens))
    if not result:
        raise ValueError("every document of the validation text is empty")
    for batch in result:
        check_token_ids(batch, vocab_size)
    return result


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError where a text could give a token id that a model does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer gives token ids up to {tokenizer.vocab_size - 1}, beyond the model's "
            f"vocabulary of {vocab_size}: take another tokenizer, or a model with a larger one"
        )


def _check_sizes(source: Sequence[str], mode: str, batch_size: int, seq_len: int) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown: choose one of {', '.join(MODES)}")
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if not len(source):
        raise ValueError("the text has no document")


def prefetch(
    batches: Iterator[tuple[Batch, Position]], put: Callable[[Batch], T], size: int = 2
) -> Generator[tuple[T, Position]]:
    """Runs `put`, e.g. the transfer to the devices, up to `size` batches ahead in a thread.

    Errors of `batches` and `put` are raised where the batch is asked for. Closing it stops the
    thread and closes `batches`.

    Args:
        batches: as `TrainingData.batches` yields them.
        put: takes a batch.
        size: how many batches are held ready.
    """
    if size < 1:
        raise ValueError(f"size={size}: give at least 1")

    def produce() -> tuple[T, Position] | None:
        if (item := next(batches, None)) is None:
            return None
        batch, position = item
        return put(batch), position

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
