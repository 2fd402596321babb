"""Pairs of texts as padded rows: lengths, order, types, what is truncated."""

import itertools

import numpy as np
import pytest
from small_glue import WORDS, write_encoder

from train.data.glue import Examples
from train.data.pairs import PairTokenizer, padded_length, pair_data


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_encoder(tmp_path_factory.mktemp("encoder") / "bert")
    return PairTokenizer(folder / "tokenizer.json", seq_len=40, vocab_size=24, token_types=2)


@pytest.fixture(scope="module")
def data(tokenizer):
    texts = [(" ".join(WORDS[: 1 + i]), "w3 w4") for i in range(10)]
    examples = Examples(texts, np.arange(10, dtype=np.int32))
    return pair_data(examples, tokenizer, batch_size=4, pad_id=1, seed=0)


def test_batches_are_padded_to_few_lengths():
    lengths = [padded_length(n, 512) for n in range(1, 513)]
    assert [*dict.fromkeys(lengths)] == [32, 64, 96, 128, 192, 256, 384, 512]
    assert all(a >= n for n, a in enumerate(lengths, 1))
    assert padded_length(33, 40) == 40


def test_a_pair_has_special_tokens_types_and_a_mask(data):
    batch = data.batch([1], size=2)
    assert batch["inputs"].shape == (2, 32)
    assert batch["inputs"][0, :8].tolist() == [0, 4, 5, 2, 7, 8, 2, 1]
    assert batch["token_types"][0, :8].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert batch["mask"].sum(axis=1).tolist() == [7, 0]
    assert batch["weights"].tolist() == [1, 0]
    assert batch["targets"].tolist() == [1, 0]


def test_each_epoch_has_every_example_once_in_another_order(data):
    stream = [int(x) for batch, _ in itertools.islice(data.batches(), 5) for x in batch["targets"]]
    assert sorted(stream[:10]) == sorted(stream[10:]) == [*range(10)]
    assert stream[:10] != stream[10:]


def test_a_stream_goes_on_from_any_position(data):
    whole = [*itertools.islice(data.batches(), 4)]
    for i, (_, position) in enumerate(whole[:3]):
        batch, after = next(data.batches(position))
        np.testing.assert_array_equal(batch["targets"], whole[i + 1][0]["targets"])
        assert after == whole[i + 1][1]


def test_an_evaluation_has_every_example_once_and_full_batches(data):
    found = data.evaluation(4)
    assert sorted(i for _, numbers in found for i in numbers) == [*range(10)]
    assert {batch["inputs"].shape[0] for batch, _ in found} == {4}
    assert sum(batch["weights"].sum() for batch, _ in found) == 10


def test_the_longer_text_is_truncated_and_a_model_of_one_type_gets_none(tokenizer):
    (row,) = tokenizer.rows([(" ".join(WORDS * 5), "w0 w1 w2")])
    assert len(row.ids) == 40
    assert row.ids[-4:].tolist() == [4, 5, 6, 2]
    one = PairTokenizer(tokenizer.path, seq_len=40, vocab_size=24, token_types=1)
    assert not one.rows([("w0", "w1")])[0].types.any()


def test_a_text_that_gives_the_padding_of_a_roberta_is_refused(tokenizer):
    roberta = PairTokenizer(tokenizer.path, seq_len=40, vocab_size=24, token_types=1, pad_id=5)
    assert len(roberta.rows([("w0", "w2")])) == 1
    with pytest.raises(ValueError, match=r"gives 'w1' for a text, the model's pad_token_id 5"):
        roberta.rows([("w0", "w2"), ("w0", "w1")])


def test_a_single_text_has_one_type(tokenizer):
    (row,) = tokenizer.rows([("w0 w1",)])
    assert row.ids.tolist() == [0, 4, 5, 2]
    assert not row.types.any()
