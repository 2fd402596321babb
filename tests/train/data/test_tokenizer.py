"""Text becomes token ids and text again; no text gives a special token."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.text import load_text
from train.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def t5_file(shared_data):
    return shared_data / "tokenizers" / "t5_tokenizer.json"


def write_tokenizer(path, vocabulary, special=(), **settings):
    """A word-level tokenizer.json, whose vocabulary lists the special tokens too."""
    added = [
        {
            "id": vocabulary[name],
            "content": name,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for name in special
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    path.write_text(json.dumps(content | settings))
    return path


@settings(deadline=None)
@given(st.text())
def test_bytes_give_the_text_back(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_decode_broken_and_special_ids():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.separator, tokenizer.vocab_size) == (256, 257)
    assert tokenizer.decode(np.array([104, 256, 105, 0xC3, 300])) == "hi�"


def test_half_a_surrogate_pair_is_no_error(t5_file):
    assert load_tokenizer("bytes").encode("a\ud800").tolist() == [97, 63]
    assert load_tokenizer(t5_file).encode("a\ud800").size


def test_t5_needs_the_papers_vocabulary(t5_file):
    tokenizer = load_tokenizer(t5_file)
    assert tokenizer.vocab_size == 32_000
    assert tokenizer.separator == 1  # </s>


def test_t5_gives_the_ids_of_the_file_as_it_is(t5_file, shared_data):
    import tokenizers

    tokenizer, plain = load_tokenizer(t5_file), tokenizers.Tokenizer.from_file(str(t5_file))
    for text in load_text("c4", "validation", shared_data):
        expected = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == expected


def test_t5_spells_out_special_tokens_in_a_text(t5_file):
    import tokenizers

    names = [
        token.content
        for token in tokenizers.Tokenizer.from_file(str(t5_file))
        .get_added_tokens_decoder()
        .values()
    ]
    assert len(names) == 103
    tokenizer = load_tokenizer(t5_file)
    for candidate in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        for text in (" ".join(names), "".join(names), *names):
            ids = candidate.encode(text)
            assert ids.max() < 32_000
            assert tokenizer.separator not in ids
    assert (
        tokenizer.decode(tokenizer.encode("see <extra_id_0> now")) == "see extra_id_0> now"
    )  # no '<'


def test_a_words_vocabulary_does_not_give_special_tokens_either(tmp_path):
    path = write_tokenizer(
        tmp_path / "tokenizer.json", {"<unk>": 0, "<eos>": 3, "hello": 1, "eos>": 2}, ["<eos>"]
    )
    tokenizer = load_tokenizer(path)
    assert (tokenizer.separator, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.encode("hello <eos> hello").tolist() == [1, 0, 2, 1]


def test_what_a_file_says_on_length_and_added_tokens_is_not_applied(tmp_path):
    truncation = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    ending = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    path = write_tokenizer(
        tmp_path / "tokenizer.json",
        {"<unk>": 0, "</s>": 1, "a": 2},
        ["</s>"],
        truncation=truncation,
        padding=padding,
        post_processor=ending,
    )
    assert load_tokenizer(path).encode("a a a").tolist() == [2, 2, 2]


def test_a_vocabulary_without_an_end_of_document_is_refused(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json", {"<unk>": 0, "a": 1})
    with pytest.raises(ValueError, match=r"no token that ends a document.*</s> <\|endoftext\|>"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "<unk>"},
        {"type": "Unigram", "vocab": [["</s>", 0.0], ["a", -1.0]], "unk_id": None},
        {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": [], "unk_token": "<unk>"},
    ],
)
@pytest.mark.parametrize("special", [[], ["</s>"]])
def test_text_that_a_vocabulary_cannot_encode_names_the_file(tmp_path, model, special):
    path = write_tokenizer(tmp_path / "tokenizer.json", {"</s>": 0}, special, model=model)
    with pytest.raises(ValueError, match=r"tokenizer='.*/tokenizer\.json' cannot encode") as caught:
        load_tokenizer(path).encode("a b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "not json", "{}", '{"model": 1}', "\x00\xff"])
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json' cannot be read") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)  # a folder
