"""Text becomes token ids and text again; no text gives a special token."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_file import with_first, write_tokenizer

from train.data.text import load_text
from train.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def t5_file(shared_data):
    return shared_data / "tokenizers" / "t5_tokenizer.json"


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


def test_the_token_that_a_post_processor_puts_first_begins_a_document(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    special, path = ["<s>", "</s>"], tmp_path / "tokenizer.json"
    plain = load_tokenizer(write_tokenizer(path, vocabulary, special), "</s>")
    assert plain.begin == plain.separator == 2
    first = with_first("<s>", 1)
    settings = {"post_processor": {"type": "Sequence", "processors": [first]}}
    tokenizer = load_tokenizer(write_tokenizer(path, vocabulary, special, **settings), "</s>")
    assert (tokenizer.begin, tokenizer.separator) == (1, 2)
    assert tokenizer.content.endswith(", </s>, after <s>")
    assert tokenizer.encode("<s> a").tolist() == [0, 0, 3]  # no text gives it
    first["single"].insert(0, first["single"][0])
    write_tokenizer(path, vocabulary, special, post_processor=first)
    with pytest.raises(ValueError, match="puts 2 tokens before a text"):
        load_tokenizer(path, "</s>")
    write_tokenizer(path, vocabulary, special, post_processor=with_first("a", 3))
    with pytest.raises(ValueError, match="puts 'a' before a text, an ordinary token that texts"):
        load_tokenizer(path, "</s>")


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


def ends_with(name, i):
    """The post-processor that appends a token."""
    last = {"SpecialToken": {"id": name, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {name: {"id": name, "ids": [i], "tokens": [name]}}
    pair = [text, {"Sequence": {"id": "B", "type_id": 0}}]
    rule = {"single": [text, last], "pair": pair, "special_tokens": special}
    return {"post_processor": {"type": "TemplateProcessing", **rule}}


WORDS = {"<unk>": 0, "<eos>": 1, "</s>": 2, "a": 3, "<|endoftext|>": 4, "<|im_end|>": 5, "[SEP]": 6}


def separator(tmp_path, special, beside=None, end_token=None, **settings):
    """The name of the token that ends a document with these files beside a tokenizer.json."""
    path = write_tokenizer(tmp_path / "tokenizer.json", WORDS, special, **settings)
    for name, content in (beside or {}).items():
        (tmp_path / name).write_text(json.dumps(content))
    found = load_tokenizer(path, end_token).separator
    return next(name for name, i in WORDS.items() if i == found)


BERT = {"type": "BertProcessing", "sep": ["[SEP]", 6], "cls": ["<unk>", 0]}
CONFIG, MAP, MODEL, GENERATION = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
)


@pytest.mark.parametrize(
    ("expected", "special", "beside", "settings"),
    [
        ("<eos>", ["<eos>"], {}, {}),  # and not </s>, an ordinary token
        ("<eos>", ["<eos>"], {}, {"ordinary": ["</s>"]}),  # as Gemma's
        ("[SEP]", ["[SEP]", "<unk>"], {}, {}),
        ("</s>", ["</s>", "<eos>"], {}, ends_with("</s>", 2)),
        ("[SEP]", ["[SEP]", "<eos>", "<unk>"], {}, {"post_processor": BERT}),
        ("<eos>", ["</s>", "<eos>"], {CONFIG: {"eos_token": "<eos>"}}, {}),
        ("<eos>", ["</s>"], {CONFIG: {"eos_token": {"content": "<eos>"}}}, {}),  # made special
        ("<|im_end|>", ["<|im_end|>", "<|endoftext|>"], {MAP: {"eos_token": "<|im_end|>"}}, {}),
        ("<|endoftext|>", ["</s>", "<|endoftext|>"], {MODEL: {"eos_token_id": 4}}, {}),
        ("<|im_end|>", ["<|im_end|>"], {GENERATION: {"eos_token_id": [3, 5]}}, {}),
        ("<eos>", ["<eos>"], {MODEL: {"eos_token_id": -1}, CONFIG: {"eos_token": None}}, {}),
    ],
)  # fmt: skip
def test_what_is_marked_special_and_the_files_decide_what_ends_a_document(
    tmp_path, expected, special, beside, settings
):
    assert separator(tmp_path, special, beside, **settings) == expected


@pytest.mark.parametrize(
    ("message", "special", "beside", "settings"),
    [
        ("no special token that is known to end a document", [], {}, {}),
        (r"such as </s> \(special: <unk>, <\|im_end\|>\); name", ["<|im_end|>", "<unk>"], {}, {}),
        ("several tokens that could end a document: <eos>, </s>;", ["</s>", "<eos>"], {}, {}),
        (
            r"ends of a document: </s> \(the post-processor\), <eos> \(tokenizer_config\.json\)",
            ["</s>", "<eos>"],
            {CONFIG: {"eos_token": "<eos>"}},
            ends_with("</s>", 2),
        ),
        (
            r"</s> \(tokenizer_config\.json\), <eos> \(special_tokens_map\.json\); name",
            ["</s>", "<eos>"],
            {CONFIG: {"eos_token": "</s>"}, MAP: {"eos_token": "<eos>"}},
            {},
        ),
        (
            r"</s> \(names of special tokens\), <eos>, id 9 \(generation_config\.json\)",
            ["</s>"],
            {GENERATION: {"eos_token_id": [1, 9]}},
            {},
        ),
        (r"a \(config\.json\)", ["<|im_end|>"], {MODEL: {"eos_token_id": 3}}, {}),
        ("no token '<end>', the eos_token in", ["</s>"], {CONFIG: {"eos_token": "<end>"}}, {}),
    ],
)
def test_unclear_ends_of_a_document_are_refused_until_the_flag_names_one(
    tmp_path, message, special, beside, settings
):
    with pytest.raises(ValueError, match=rf"{message}.*--end-token"):
        separator(tmp_path, special, beside, **settings)
    assert separator(tmp_path, special, beside, "[SEP]", **settings) == "[SEP]"


def test_files_beside_a_tokenizer_of_another_name_are_not_its_own(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token": "<eos>"}))
    path = write_tokenizer(tmp_path / "mine.json", WORDS, ["</s>", "<eos>"], **ends_with("</s>", 2))
    assert load_tokenizer(path).separator == 2


def test_a_named_end_of_a_document_must_be_in_the_vocabulary(tmp_path):
    path = write_tokenizer(tmp_path / "tokenizer.json", WORDS, ["</s>"])
    with pytest.raises(ValueError, match=r"--end-token <end>: .* has no such token"):
        load_tokenizer(path, "<end>")
    with pytest.raises(ValueError, match="--end-token </s> has no effect with --tokenizer bytes"):
        load_tokenizer("bytes", "</s>")
    chosen = pickle.loads(pickle.dumps(load_tokenizer(path, "[SEP]")))
    assert chosen.separator == 6
    assert chosen.encode("a [SEP] </s>").tolist() == [3, 0, 0, 0, 0]


MERGED = {c: i for i, c in enumerate("abes/<>|o")} | {"</": 9, "s>": 10, "</s>": 11, "<eos>": 12}


@pytest.mark.parametrize("end_token", [None, "</s>"])
@pytest.mark.parametrize("normalizer", [None, {"type": "Lowercase"}, {"type": "NFKC"}])
def test_merges_that_make_an_end_of_a_document_do_not_end_one(tmp_path, end_token, normalizer):
    merges = [["<", "/"], ["s", ">"], ["</", "s>"]]
    model = {"type": "BPE", "vocab": MERGED, "merges": merges}
    path = write_tokenizer(
        tmp_path / "tokenizer.json",
        MERGED,
        ["<eos>"],
        model=model,
        pre_tokenizer=None,
        normalizer=normalizer,
    )
    tokenizer = load_tokenizer(path, end_token)
    assert tokenizer.separator == (12 if end_token is None else 11)
    for text in ("a</s>b", "</s></s>", "</S>", "\uff1c/s\uff1e", "<eos>", "a</s"):
        assert tokenizer.separator not in tokenizer.encode(text)
    if end_token is None:
        assert 11 in tokenizer.encode("a</s>b")


def test_an_end_of_a_document_that_a_text_can_give_is_refused(tmp_path):
    unknown = {"type": "WordLevel", "vocab": WORDS, "unk_token": "</s>"}
    path = write_tokenizer(tmp_path / "unknown.json", WORDS, ["</s>"], model=unknown)
    with pytest.raises(ValueError, match=r"each unknown character gives </s>.*--end-token"):
        load_tokenizer(path)
    replace = {"type": "Replace", "pattern": {"String": "%%"}, "content": "z"}
    words = {"<unk>": 0, "z": 1, "a": 2}
    path = write_tokenizer(tmp_path / "one.json", words, normalizer=replace)
    with pytest.raises(ValueError, match=r"'%+' in a text gives z, the token that ends"):
        load_tokenizer(path, "z").encode("a %%")  # one character cannot be cut


def test_characters_that_are_left_out_do_not_make_an_end_of_a_document(tmp_path):
    model = {"type": "BPE", "vocab": MERGED, "merges": [["<", "/"], ["s", ">"], ["</", "s>"]]}
    path = write_tokenizer(
        tmp_path / "tokenizer.json", MERGED, ["</s>"], model=model, pre_tokenizer=None
    )
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("a<\u200b/\u200bs>b<?/s>")
    assert [tokenizer.name_of(i) for i in ids] == [
        "a",
        "<",
        "/",
        "s>",
        "b",
        "<",
        "/",
        "s>",
    ]


def test_the_unknown_token_counts_to_the_vocabulary(tmp_path):
    words = {"a": 0, "</s>": 1, "<unk>": 2}
    path = write_tokenizer(tmp_path / "tokenizer.json", words, ["</s>", "<unk>"])
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("b").max() < tokenizer.vocab_size == 3


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "<unk>"},
        {"type": "Unigram", "vocab": [["</s>", 0.0], ["a", -1.0]], "unk_id": None},
        {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": [], "unk_token": "<unk>"},
    ],
)
def test_text_that_a_vocabulary_cannot_encode_names_the_file(tmp_path, model):
    path = write_tokenizer(tmp_path / "tokenizer.json", {"</s>": 0}, ["</s>"], model=model)
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


def test_merges_are_never_left_out_at_random(tmp_path):
    merges = [["a", "b"], ["ab", "c"]]
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "dropout": 0.9}
    path = write_tokenizer(tmp_path / "tokenizer.json", vocabulary, ["</s>"], model=model)
    tokenizer = load_tokenizer(path)
    for _ in range(8):
        assert tokenizer.encode_rendered("abc") == [5] == tokenizer.encode("abc").tolist()


def test_names_of_added_tokens_are_those_of_the_file_even_where_it_normalizes_them(tmp_path):
    """As in Llama 1's: the package itself names the token of id 2 "▁</s>"."""
    path = write_tokenizer(
        tmp_path / "tokenizer.json", {"<unk>": 0, "<s>": 1, "</s>": 2, "▁a": 3}, ["<s>", "</s>"],
        normalizer={"type": "Prepend", "prepend": "▁"}, post_processor=with_first("<s>", 1),
    )  # fmt: skip
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["normalized"] = True
    path.write_text(json.dumps(content))
    said = {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": said}))
    tokenizer = load_tokenizer(path)
    assert [tokenizer.name_of(i) for i in (1, 2)] == ["<s>", "</s>"]
    assert (tokenizer.special, tokenizer.vocab_size) == (("<s>", "</s>"), 4)


def test_a_template_may_write_an_end_of_a_document_that_the_file_does_not_mark(tmp_path):
    """transformers marks the eos_token of tokenizer_config.json."""
    path = write_tokenizer(tmp_path / "tokenizer.json", {"<unk>": 0, "</s>": 1, "a": 2}, ["<unk>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert load_tokenizer(path).encode_rendered("a</s>") == [2, 1]


def test_a_panic_of_the_package_is_an_error_that_names_the_file(tmp_path):
    model = {
        "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "</s>": 3}, "merges": [["a", "b"]],
        "continuing_subword_prefix": "long",
    }  # fmt: skip
    path = write_tokenizer(tmp_path / "t.json", {"</s>": 3}, ["</s>"], model=model)
    with pytest.raises(ValueError, match=r"t\.json' cannot be read \("):
        load_tokenizer(path)
