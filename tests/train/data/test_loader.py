"""The text that training reads: where it is from, its order, and that a position resumes it."""

import collections
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

from train.data import sequences, text
from train.data.loader import TrainingData, evaluation_batches, prefetch
from train.data.sequences import Position
from train.data.text import SkippingUnreadable, content_of, load_text
from train.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
# Of many lengths, two of them empty, each recognisable.
DOCUMENTS = [f"<{i}>" + "x" * (i * 7 % 40) if i % 9 else "" for i in range(1, 20)]


def training_data(source=DOCUMENTS, **settings):
    return TrainingData(source, BYTES, **{"batch_size": 2, "seq_len": 32} | settings)


def first(data, count, start=None):
    with closing(data.batches(start)) as batches:
        return list(islice(batches, count))


def assert_same(got, expected):
    for (batch, position), (expected_batch, expected_position) in zip(got, expected, strict=True):
        assert position == expected_position
        assert batch.keys() == expected_batch.keys()
        for field, value in expected_batch.items():
            np.testing.assert_array_equal(batch[field], value)


class Broken(list):
    def __getitem__(self, number):
        raise OSError("the disk is gone")


class Counting:
    """A tokenizer of bytes that notes what it encodes."""

    vocab_size, separator, begin = BYTES.vocab_size, BYTES.separator, BYTES.begin

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return BYTES.encode(text)


def read_order(data, documents):
    """The numbers of the documents in the order in which training reads them."""
    with closing(data.documents(0)) as stream:
        read = (re.match(r"<(\d+)>", BYTES.decode(tokens)) for tokens in stream)
        return [int(found[1]) for found in islice(filter(None, read), documents)]


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(sequences, "BATCHES", 4)


# Sources


def test_builtin_text_is_pythons_documentation_and_needs_no_import():
    before = set(sys.modules)
    text.builtin_documents.cache_clear()
    train, validation = load_text("builtin", "train"), load_text("builtin", "validation")
    assert not {"antigravity", "this", "turtle"} & (set(sys.modules) - before)
    assert 1.5e6 < sum(map(len, train)) < 3e6
    assert sum(map(len, validation)) > 3e4
    assert not set(train) & set(validation)
    assert len(set(train)) == len(train)
    everything = "\n".join([*train, *validation])
    assert "context manager" in everything
    assert subprocess.check_output.__doc__.split("\n")[0] in everything


def test_builtin_documents_are_too_short_to_fill_a_batch_of_tiny():
    # Of the bytes, a few are in paragraphs that alone are longer than a document is to be.
    lengths = np.sort([len(document) for document in load_text("builtin", "train")])
    assert lengths[lengths > 16 * 128].sum() < 0.05 * lengths.sum()


def test_a_page_is_cut_between_paragraphs_and_nothing_of_it_is_lost():
    paragraphs = ["a" * 300, "b" * 300, "c" * 200, "d" * 600, "e"]
    documents = list(text.documents_of("\n\n".join(paragraphs)))
    assert documents == [paragraphs[0], "\n\n".join(paragraphs[1:3]), *paragraphs[3:]]


def test_c4_is_read_without_tensorflow(shared_data):
    train, validation = (load_text("c4", split, shared_data) for split in text.SPLITS)
    assert (len(train), len(validation)) == (1_000, 200)
    assert "Killtest vSAN Specialist Certification" in train[0]
    assert sum(1 for document in validation if document) == 200
    assert "tensorflow" not in sys.modules


def test_own_text_has_each_twentieth_document_for_validation_and_none_in_both(tmp_path):
    texts = [f"{i % 30}" for i in range(50)]  # twenty of them twice
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, validation = (load_text("text", split, str(file)) for split in text.SPLITS)
    assert validation == ["0", "20", "0"]
    assert train == [x for x in texts if x not in validation]
    (tmp_path / "b.txt").write_text("7")
    train, validation = (
        load_text("text", split, str(file), str(tmp_path / "b.txt")) for split in text.SPLITS
    )
    assert validation == ["7"]
    assert train == [x for x in texts if x != "7"]
    with pytest.raises(ValueError, match=r"b.txt: one document, or several"):
        load_text("text", "train", str(tmp_path / "b.txt"))


def test_own_plain_text_is_cut_between_paragraphs_or_else_lines_and_none_is_lost(tmp_path):
    paragraphs = [f"{i} {'x' * 500}\n\n" for i in range(60)]
    lines = [f"{i} {'y' * 500}\n" for i in range(60)]
    for name, parts in (("a", paragraphs), ("b", lines)):
        (tmp_path / f"{name}.txt").write_text("".join(parts))
        splits = [load_text("text", split, str(tmp_path / f"{name}.txt")) for split in text.SPLITS]
        documents = [*splits[1], *splits[0]]  # the first is for validation
        assert "".join(documents) == "".join(parts)
        assert len(documents) > 3
        assert max(map(len, documents)) <= 8192
        assert name == "b" or all(document.endswith("\n\n") for document in documents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("c5", "train", None), "data='c5' is unknown: choose one of builtin, c4"),
        (("c4", "test", "data"), "split='test' is unknown: choose one of train, validation"),
        (("c4", "train", None), "data='c4' needs data_dir"),
        (("builtin", "train", "data"), "data_dir='data' is not used by data='builtin'"),
        (("text", "train", None), "data='text' needs data_dir"),
        (("c4", "train", "data", "more"), "eval_data='more' is not used by data='c4'"),
        (("c4", "train", "/nowhere"), "no data set c4/en at /nowhere/c4/en: make it with `python"),
    ],
)
def test_a_source_that_is_not_there_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_text(*arguments)


@pytest.mark.parametrize("damage", ["shard", "info", "features", "split", "version"])
def test_a_damaged_c4_is_named_in_one_line_with_the_way_to_make_it(shared_data, tmp_path, damage):
    folder = tmp_path / "c4" / "en" / "3.0.1"
    folder.mkdir(parents=True)
    for file in (shared_data / "c4" / "en" / "3.0.1").iterdir():
        shutil.copyfile(file, folder / file.name)
    info = folder / "dataset_info.json"
    if damage == "shard":
        (folder / "c4-train.array_record-00003-of-00008").unlink()
    elif damage == "info":
        info.write_text("{")
    elif damage == "features":
        (folder / "features.json").unlink()
    elif damage == "split":
        info.write_text(info.read_text().replace('"train"', '"other"'))
    else:
        folder.rename(folder.with_name("3.0.1.incomplete"))
    with pytest.raises(ValueError, match="cannot read split 'train' of c4/en at") as caught:
        load_text("c4", "train", tmp_path)
    assert "python -m train.prepare_c4" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "delete" not in str(caught.value)


def test_a_data_set_in_another_file_format_is_named_as_that(tmp_path):
    folder = tmp_path / "c4" / "en" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(ValueError, match="has the file format tfrecord, and only arr") as caught:
        load_text("c4", "train", tmp_path)
    assert f"`tfds convert_format --dataset_version_dir {folder} --out_file" in str(caught.value)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "cut at a block", "gone"])
def test_a_shard_that_breaks_while_training_is_named(shared_data, tmp_path, damage):
    folder = tmp_path / "c4" / "en" / "3.0.1"
    folder.mkdir(parents=True)
    for file in (shared_data / "c4" / "en" / "3.0.1").iterdir():
        shutil.copyfile(file, folder / file.name)
    shard, text = (
        folder / "c4-train.array_record-00003-of-00008",
        load_text("c4", "train", tmp_path),
    )
    if damage == "gone":
        shard.unlink()
    else:
        os.truncate(shard, 100_000 if damage == "cut" else 2**16)
    with pytest.raises(
        OSError, match=r"cannot read document 375 of c4-train.array_record-00003-of-00008: "
    ):
        list(text)
    skipping = SkippingUnreadable(text)
    assert len(content_of(skipping)) == len(content_of(["a"]))
    assert [*skipping].count("") > 100


# Order


def test_every_epoch_has_each_document_once_in_another_order():
    numbers = [i for i in range(1, 20) if i % 9]
    order = read_order(training_data(), 3 * len(numbers))
    epochs = [order[i : i + len(numbers)] for i in range(0, len(order), len(numbers))]
    assert all(sorted(epoch) == numbers for epoch in epochs)
    assert numbers not in epochs
    assert len(set(map(tuple, epochs))) == 3


def test_the_seed_decides_the_order():
    assert read_order(training_data(seed=1), 17) == read_order(training_data(seed=1), 17)
    assert read_order(training_data(seed=1), 17) != read_order(training_data(seed=7), 17)


def test_parts_have_each_document_of_the_stream_once():
    def read(data, part, count):
        return [BYTES.decode(tokens) for tokens in islice(data.documents(0, part), count)]

    epochs = read(training_data(), 0, 3 * len(DOCUMENTS))
    parts = [read(training_data(batch_size=6, parts=3), part, len(DOCUMENTS)) for part in range(3)]
    assert [text for texts in zip(*parts, strict=True) for text in texts] == epochs


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mode", ["packed", "document"])
def test_any_position_resumes_the_same_batches_across_epochs_and_windows(
    mode, parts, small_windows
):
    data = training_data(mode=mode, parts=parts)
    batches = first(data, 27)
    assert sum(position.documents for position in batches[24][1]) > 2 * len(DOCUMENTS)
    for i, (_, position) in enumerate(batches[:25]):
        assert_same(first(data, 2, position), batches[i + 1 : i + 3])


def test_rows_of_a_long_document_are_spread_over_batches_and_each_is_there_once(monkeypatch):
    monkeypatch.setattr(sequences, "BATCHES", 20)
    source = [chr(97 + i) * 32 * 8 for i in range(8)]  # each fills four batches of two rows
    batches = [batch for batch, _ in first(training_data(source), 40)]
    alike = [len(set(batch["inputs"][:, 1])) == 1 for batch in batches]
    assert np.mean(alike) < 0.5
    rows = [tuple(row) for batch in batches for row in batch["inputs"]]
    with closing(training_data(source).documents(0)) as documents:
        packed = sequences.packed_batches(documents, separator=256, batch_size=2, seq_len=32)
        unshuffled = [tuple(r) for batch, _ in islice(packed, 40) for r in batch["inputs"]]
    assert rows != unshuffled
    assert sorted(rows) == sorted(unshuffled)  # 40 batches are two windows


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_processes_read_their_parts_alone_and_their_rows_are_those_of_one_process(mode):
    def batches_of(read):
        tokenizer = Counting()
        sizes = {"batch_size": 8, "seq_len": 16, "parts": 4, "mode": mode}
        batches = first(TrainingData(DOCUMENTS, tokenizer, read=read, **sizes), 5)
        return [batch for batch, _ in batches], tokenizer.texts, batches[-1][1]

    whole, texts, positions = batches_of(None)
    left, right = batches_of((0, 1)), batches_of((3, 2))
    for batch, own, others in zip(whole, left[0], right[0], strict=True):
        for name, expected in batch.items():
            np.testing.assert_array_equal(own[name][:4], expected[:4])
            np.testing.assert_array_equal(others[name][4:], expected[4:])
            assert not own[name][4:].any()
            assert not others[name][:4].any()
    assert min(len(left[1]), len(right[1])) > len(texts) / 3
    assert sorted(left[1] + right[1]) == sorted(texts)
    assert positions == (*left[2][:2], *right[2][2:])


def test_worker_processes_give_the_same_batches_and_end_when_closed(small_windows):
    expected = first(training_data(parts=2), 20)
    for workers in (1, 2):
        data = training_data(parts=2, workers=workers)
        assert_same(first(data, 20), expected)
        assert_same(first(data, 9, expected[10][1]), expected[11:])
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_position_means_the_same_for_the_real_text(shared_data):
    source = load_text("c4", "train", shared_data)
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "t5_tokenizer.json")
    kinds = [
        TrainingData(source, tokenizer, batch_size=4, seq_len=256, workers=workers)
        for workers in (0, 2)
    ]
    expected = first(kinds[0], 40)
    assert all((batch["weights"] == 1).all() for batch, _ in expected)
    assert_same(first(kinds[1], 10, expected[29][1]), expected[30:])


def test_an_error_in_a_worker_is_raised_in_the_run():
    with pytest.raises(OSError, match="the disk is gone"):
        first(training_data(Broken(DOCUMENTS), workers=1), 1)
    assert not multiprocessing.active_children()


# Grain may be waiting for the group that the worker was to send.
@pytest.mark.filterwarnings("ignore:resource_tracker")
def test_a_worker_that_is_killed_ends_the_stream_with_an_error_that_says_so():
    with closing(training_data(workers=1).batches()) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(OSError, match=r"a process that reads and tok.*: resume the run, with"):
            collections.deque(batches, maxlen=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_text_that_a_tokenizer_cannot_encode_is_met_in_training(tmp_path, workers):
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "<unk>"}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    end = {"id": 0, "content": "</s>", "special": True, **dict.fromkeys(flags, False)}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [end], "model": model}))
    data = TrainingData(
        ["a"] * 200 + ["b"], load_tokenizer(path), batch_size=1, seq_len=2, workers=workers
    )
    with pytest.raises(ValueError, match=r"tokenizer\.json' cannot encode a text \(WordLevel"):
        first(data, 300)


def test_workers_end_with_a_run_that_is_killed():
    script = (
        "import time\n"
        "from train.data.loader import TrainingData\n"
        "from train.data.tokenizer import load_tokenizer\n"
        "if __name__ == '__main__':\n"
        "    data = TrainingData(['some text'] * 99, load_tokenizer('bytes'),\n"
        "                        batch_size=2, seq_len=8, workers=1)\n"
        "    batches = data.batches()\n"
        "    next(batches)\n"
        "    import multiprocessing\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
    )
    with run:
        workers = [int(pid) for pid in run.stdout.readline().split()]
        assert workers
        run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "padded"}, "mode='padded' is unknown: choose one of packed, document"),
        ({"batch_size": 0}, "batch_size=0: give at least 1"),
        ({"parts": 0}, "parts=0: give a divisor of batch_size=2"),
        ({"parts": 4}, "parts=4: give a divisor of batch_size=2"),
        ({"seq_len": 0}, "seq_len=0: give at least 1"),
        ({"workers": -1}, "workers=-1"),
        ({"workers": 1_000_000}, "workers=1000000: give the number of processes, 0 for none, "),
        ({"seed": -1}, "seed=-1"),
        ({"source": []}, "the text has no document"),
        ({"vocab_size": 256}, "token ids up to 256, beyond the model's vocabulary of 256"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        training_data(**settings)
    settings = {k: v for k, v in settings.items() if k not in ("workers", "seed", "parts")}
    if settings:
        source = settings.pop("source", DOCUMENTS)
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluation_batches(source, BYTES, **{"batch_size": 2, "seq_len": 32} | settings)


def test_text_without_a_token_is_refused_rather_than_read_for_ever():
    with pytest.raises(ValueError, match="every document of the training text is empty"):
        first(training_data(["", ""]), 1)
    with pytest.raises(ValueError, match="every document of the validation text is empty"):
        evaluation_batches(["", ""], BYTES, batch_size=2, seq_len=4)


def test_a_text_of_which_a_part_sees_only_empty_documents_for_many_epochs_is_read():
    data = training_data([""] * 40 + ["text"], batch_size=8, parts=8, seq_len=4, mode="document")
    assert all(batch["weights"].all() for batch, _ in first(data, 5))


def test_a_tokenizer_that_breaks_its_word_on_the_vocabulary_is_caught():
    class Lying:
        vocab_size, separator, begin = 200, 0, 0

        def encode(self, text):
            return np.array([1, 200], np.int32)

        def decode(self, ids):
            return ""

    data = TrainingData(["a"], Lying(), batch_size=1, seq_len=4)
    with pytest.raises(ValueError, match="token id 200 is beyond the model's vocabulary of 200"):
        first(data, 1)


# Evaluation


@pytest.mark.parametrize("mode", ["packed", "document"])
@pytest.mark.parametrize("max_tokens", [1, 64, 200, 201, None])
def test_evaluation_counts_the_tokens_asked_for_each_once(mode, max_tokens):
    batches = evaluation_batches(
        DOCUMENTS, BYTES, batch_size=2, seq_len=64, mode=mode, max_tokens=max_tokens
    )
    # Each document and its end, in order; rows of 64 cut none of them.
    expected = [i for document in DOCUMENTS if document for i in [*document.encode(), 256]]
    counted = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
    assert counted.tolist() == expected[:max_tokens]
    assert all(batch["targets"].shape == (2, 64) for batch in batches)


# Prefetching


def test_prefetching_keeps_the_order_and_works_ahead():
    put = []
    batches = ((batch, Position(batch)) for batch in range(10))
    with closing(prefetch(batches, lambda batch: put.append(batch) or -batch, size=3)) as ahead:
        assert next(ahead) == (0, Position(0))
        deadline = time.monotonic() + 10
        while len(put) < 4:  # the one handed out and three ready
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert [next(ahead) for _ in range(9)] == [(-i, Position(i)) for i in range(1, 10)]
        with pytest.raises(StopIteration):
            next(ahead)


def test_errors_ahead_are_raised_where_the_batch_is_asked_for():
    def batches():
        yield 1, Position(1)
        raise OSError("the disk is gone")

    ahead = prefetch(batches(), lambda batch: batch)
    assert next(ahead) == (1, Position(1))
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    with pytest.raises(ZeroDivisionError):
        next(prefetch(iter([(0, Position(0))]), lambda batch: 1 / batch))


def test_closing_prefetch_stops_its_thread_and_closes_the_batches():
    closed = []

    def batches():
        try:
            while True:
                yield 1, Position(1)
        finally:
            closed.append(True)

    ahead = prefetch(batches(), lambda batch: batch, size=2)
    next(ahead)
    ahead.close()
    assert closed == [True]
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_closing_prefetch_ends_the_workers():
    with closing(prefetch(training_data(workers=1).batches(), lambda batch: batch)) as ahead:
        next(ahead)
    assert not multiprocessing.active_children()
