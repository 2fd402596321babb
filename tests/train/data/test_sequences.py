"""Rows hold the stream of documents, nothing lost or counted twice, from any position on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.sequences import (
    START,
    Position,
    check_token_ids,
    document_batches,
    limit_tokens,
    packed_batches,
)

SEPARATOR = 99
FIELDS = ("inputs", "targets", "positions", "segment_ids", "weights")
documents = st.lists(st.lists(st.integers(0, 50), max_size=12), min_size=1, max_size=8)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 9))


def pack(texts, size, start=START, make=packed_batches):
    arrays = [np.array(text, np.int32) for text in texts]
    batches = make(arrays, separator=SEPARATOR, batch_size=size[0], seq_len=size[1], start=start)
    return list(batches)


def flat(batches, field):
    """A field of all places that count, in order."""
    parts = [batch[field][batch["weights"] > 0] for batch, _ in batches]
    return np.concatenate(parts).tolist() if parts else []


@settings(deadline=None)
@given(documents, sizes)
def test_packed_rows_are_the_stream(texts, size):
    stream = [token for text in texts if text for token in [SEPARATOR, *text]]
    batches = pack(texts, size)
    assert flat(batches, "inputs") == stream
    assert flat(batches, "targets") == [*stream[1:], SEPARATOR][: len(stream)]


@settings(deadline=None)
@given(documents, sizes)
def test_packed_segments_and_positions_restart_with_documents_and_rows(texts, size):
    owner = [i for i, text in enumerate(texts) if text for _ in range(len(text) + 1)]
    batches = pack(texts, size)
    rows = [owner[i : i + size[1]] for i in range(0, len(owner), size[1])]
    segments, positions = [], []
    for row in rows:
        for i, (_, group) in enumerate(itertools.groupby(row)):
            length = len(list(group))
            segments += [i + 1] * length
            positions += range(length)
    assert flat(batches, "segment_ids") == segments
    assert flat(batches, "positions") == positions


@settings(deadline=None)
@given(documents, sizes)
def test_only_the_end_of_the_last_packed_batch_is_padding(texts, size):
    batches = pack(texts, size)
    weights = np.concatenate([[], *(batch["weights"].reshape(-1) for batch, _ in batches)])
    length = sum(len(text) + 1 for text in texts if text)
    assert len(weights) - length < size[0] * size[1]
    assert weights.tolist() == [1] * length + [0] * (len(weights) - length)
    for batch, _ in batches:
        np.testing.assert_array_equal(batch["segment_ids"] == 0, batch["weights"] == 0)


@settings(deadline=None)
@given(documents, sizes)
def test_batches_have_the_agreed_types_and_shapes(texts, size):
    for make in (packed_batches, document_batches):
        for batch, _ in pack(texts, size, make=make):
            assert {name: x.dtype.name for name, x in batch.items()} == {
                "inputs": "int32",
                "targets": "int32",
                "positions": "int32",
                "segment_ids": "int32",
                "weights": "float32",
            }
            assert {x.shape for x in batch.values()} == {size}
            assert batch["positions"].max() < size[1]


@settings(deadline=None)
@given(documents, sizes, st.sampled_from([packed_batches, document_batches]))
def test_batches_go_on_from_every_position(texts, size, make):
    uninterrupted = pack(texts, size, make=make)
    for i, (_, position) in enumerate(uninterrupted):
        resumed = pack(texts[position.documents :], size, position, make)
        rest = uninterrupted[i + 1 :]
        assert [p for _, p in resumed] == [p for _, p in rest]
        for (got, _), (expected, _) in zip(resumed, rest, strict=True):
            for field, value in expected.items():
                np.testing.assert_array_equal(got[field], value)


@pytest.mark.parametrize("make", [packed_batches, document_batches])
def test_a_token_that_begins_documents_is_an_input_and_the_separator_stays_the_target(make):
    texts = [np.array([1, 2, 3]), np.array([4])]
    sizes = {"separator": SEPARATOR, "batch_size": 1, "seq_len": 6}
    made, plain = (
        [batch for batch, _ in make(texts, **sizes, **begin)] for begin in ({"begin": 77}, {})
    )
    assert flat([(batch, 0) for batch in made], "inputs") == [77, 1, 2, 3, 77, 4]
    for field in FIELDS[1:]:
        assert [x[field].tolist() for x in made] == [x[field].tolist() for x in plain]


def test_packing_reads_no_further_than_the_batch():
    def stream():
        yield np.arange(3)
        raise AssertionError("a second document was asked for")

    batches = packed_batches(stream(), separator=SEPARATOR, batch_size=1, seq_len=4)
    batch, position = next(batches)
    assert batch["targets"].tolist() == [[0, 1, 2, SEPARATOR]]
    assert position == Position(1, 0)


@settings(deadline=None)
@given(documents, sizes)
def test_a_document_a_row_is_cut_or_padded(texts, size):
    length = size[1]
    texts = [text for text in texts if text]
    batches = pack(texts, size, make=document_batches)
    rows = {name: [row for batch, _ in batches for row in batch[name]] for name in FIELDS}
    assert len(rows["inputs"]) - len(texts) in range(size[0])
    for i, text in enumerate(texts):
        inputs, targets = [SEPARATOR, *text][:length], [*text, SEPARATOR][:length]
        count = len(inputs)
        assert rows["inputs"][i][:count].tolist() == inputs
        assert rows["targets"][i][:count].tolist() == targets
        assert rows["positions"][i][:count].tolist() == list(range(count))
        for field in ("weights", "segment_ids"):
            assert rows[field][i].tolist() == [1] * count + [0] * (length - count)
    for i in range(len(texts), len(rows["inputs"])):
        assert not rows["weights"][i].any()
        assert not rows["segment_ids"][i].any()


@settings(deadline=None)
@given(documents, sizes, st.integers(1, 60))
def test_a_limit_counts_exactly_the_tokens_asked_for(texts, size, limit):
    batches = pack(texts, size)
    limited = list(limit_tokens((batch for batch, _ in batches), limit))
    available = len(flat(batches, "targets"))
    assert sum(batch["weights"].sum() for batch in limited) == min(limit, available)
    kept = flat([(batch, None) for batch in limited], "targets")
    assert kept == flat(batches, "targets")[:limit]
    assert all(batch["weights"].any() for batch in limited)


def test_a_position_of_other_data_is_refused():
    with pytest.raises(ValueError, match=r"position \(0, 7\) is beyond the 4 tokens"):
        pack([[1, 2, 3]], (1, 2), Position(0, 7))
    with pytest.raises(ValueError, match="saved in packed mode"):
        pack([[1, 2, 3]], (1, 2), Position(0, 1), document_batches)


def test_an_id_beyond_the_vocabulary_is_named():
    ((batch, _),) = pack([[1, 50]], (1, 3))
    check_token_ids(batch, 100)
    with pytest.raises(ValueError, match="token id 99 is beyond the model's vocabulary of 99"):
        check_token_ids(batch, 99)
