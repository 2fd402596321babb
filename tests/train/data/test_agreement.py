"""Files beside a tokenizer.json that contradict it are refused, and both are named."""

import json

import pytest
from tokenizer_file import with_first, write_tokenizer

from train.data.pairs import PairTokenizer
from train.data.tokenizer import load_tokenizer

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "<b>": 4}
BEGINS = {"post_processor": with_first("<s>", 1)}
BERT = {
    "normalizer": {
        "type": "BertNormalizer", "lowercase": True, "strip_accents": None, "clean_text": True,
        "handle_chinese_chars": True,
    }
}  # fmt: skip
BYTES = {
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        ],
    }
}
# Of SentencePiece: a space before a text, and none.
SPACED = {"normalizer": {"type": "Prepend", "prepend": "\u2581"}}
UNSPACED = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
}


def metaspace(scheme: str) -> dict:
    kind = {"type": "Metaspace", "replacement": "\u2581", "split": False}
    return {"pre_tokenizer": kind | {"prepend_scheme": scheme}}


UNREACHED = {"type": "WordLevel", "vocab": WORDS | {"a b": 5}, "unk_token": "<unk>"}


def added(**tokens) -> dict:
    known = {name: {"content": x, "special": x != "a"} for name, x in tokens.items()}
    return {"added_tokens_decoder": {name[1:]: x for name, x in known.items()}}


def flags(**said) -> dict:
    return {"added_tokens_decoder": {"2": {"content": "</s>", "special": True, **said}}}


def written(folder, said, settings, name="tokenizer_config.json"):
    path = write_tokenizer(folder / "tokenizer.json", WORDS, ["<s>", "</s>"], ["a"], **settings)
    (folder / name).write_text(json.dumps(said))
    return path


@pytest.mark.parametrize(
    ("said", "settings", "says"),
    [
        (added(_1="<x>"), {}, r"the added token 1 '<x>', and tokenizer.json '<s>' there"),
        (added(_9="<x>"), {}, r"added token 9 '<x>', and tokenizer.json no such id"),
        (added(_4="<b>"), {}, r"added token 4 '<b>' as special, and tokenizer.json as ordinary"),
        ({"bos_token": "<bos>"}, {}, r"bos_token '<bos>', and tokenizer.json no such token"),
        ({"additional_special_tokens": ["<im>"]}, {}, r"additional_special_tokens '<im>', and"),
        ({"extra_special_tokens": {"x": "<im>"}}, {}, r"extra_special_tokens '<im>', and"),
        (
            {"bos_token": {"content": "a"}, "add_bos_token": True}, BEGINS,
            r"'a', and .* begins a text with '<s>'",
        ),
        ({"add_bos_token": False}, BEGINS, r"add_bos_token False, and .* a text with '<s>'"),
        ({"add_bos_token": True}, {}, r"add_bos_token True, and .* begins a text with no token"),
        # Which transformers would make special, or read as the file says.
        ({"sep_token": "<b>"}, {}, r"sep_token '<b>', and .* it as an ordinary token"),
        ({"pad_token": "<b>"}, {}, r"pad_token '<b>', and .* it as an ordinary token"),
        ({"mask_token": "<b>"}, {}, r"mask_token '<b>', and .* it as an ordinary token"),
        ({"image_token": "<im>"}, {}, r"image_token '<im>', and .* no such token"),
        ({"model_specific_special_tokens": {"x": "<im>"}}, {}, r"'<im>', and .* no such token"),
        (flags(rstrip=True), {}, r"'</s>' with rstrip True, and .* with rstrip False"),
        (flags(normalized=True), {}, r"'</s>' with normalized True, and .* with normalized False"),
        ({"split_special_tokens": True}, {}, r"split_special_tokens True, and"),
        # Which cannot be understood.
        ({"bos_token": 1}, {}, r"bos_token=1 is not a token"),
        ({"bos_token": {"id": 1}}, {}, r"bos_token=\{'id': 1\} is not a token"),
        ({"added_tokens_decoder": [1]}, {}, r"added_tokens_decoder=\[1\] is not a token"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, {}, "added_tokens_decoder=.* not a"),
        ({"additional_special_tokens": True}, {}, "additional_special_tokens=True is not a"),
        ({"do_lower_case": False}, BERT, r"do_lower_case False, and .* with lowercase True"),
        ({"strip_accents": True}, BERT, r"strip_accents True, and .* with strip_accents None"),
        ({"add_prefix_space": False}, BYTES, r"False, and .*ByteLevel with add_prefix_space True"),
        ({"add_prefix_space": False}, SPACED, r"add_prefix_space False, and .* a space before"),
        ({"add_prefix_space": False}, metaspace("first"), r"e False, and .* a space before a text"),
        ({"add_prefix_space": True}, UNSPACED, r"add_prefix_space True, and .* no space before"),
        ({"add_prefix_space": True}, metaspace("never"), r"True, and .* no space before a text"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_tokenizer_json_is_refused(tmp_path, said, settings, says):
    path = written(tmp_path, said, settings)
    with pytest.raises(ValueError, match=rf"{path.parent}/tokenizer_config\.json(:| has) .*{says}"):
        load_tokenizer(path, "</s>")
    with pytest.raises(ValueError, match=says):
        PairTokenizer(path, 8, 5, 1).rows([("a", "a")])


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        (added(_1="<s>", _3="a"), {}),
        ({"bos_token": "<s>", "add_bos_token": True, "pad_token": "<pad>"}, BEGINS),
        ({"bos_token": "<s>", "add_bos_token": False}, {}),
        ({"pad_token": "a b"}, {"model": UNREACHED}),  # an ordinary token that no text gives
        ({"bos_token": "a"}, BEGINS),  # as an export of ours, if a template names it
        ({"do_lower_case": True, "strip_accents": None, "add_prefix_space": False}, BERT),
        ({"add_prefix_space": True}, SPACED),
        ({"add_prefix_space": False}, UNSPACED),
        ({"add_prefix_space": None}, metaspace("never")),
    ],
)
def test_files_that_agree_or_say_what_nothing_reads_are_taken(tmp_path, said, settings):
    assert load_tokenizer(written(tmp_path, said, settings), "</s>").separator == 2


def test_another_file_of_the_tokenizer_counts_too_and_those_of_another_name_do_not(tmp_path):
    path = written(tmp_path, {"bos_token": "<bos>"}, {}, "special_tokens_map.json")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json has bos_token"):
        load_tokenizer(path)
    assert load_tokenizer(path.rename(tmp_path / "mine.json")).separator == 2


def test_the_files_beside_a_tokenizer_agree_with_each_other(tmp_path):
    path = written(tmp_path, {"bos_token": "<s>"}, {})
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "</s>", "pad_token": "x"}')
    with pytest.raises(
        ValueError, match=r"config\.json has bos_token '<s>', and special_.* '</s>'"
    ):
        load_tokenizer(path, "</s>")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    added = tmp_path / "added_tokens.json"  # of transformers 4
    for token, says in (("<s>", "'<s>' as 3, and .* it as 1"), ("<new>", "as 3, .* no such token")):
        added.write_text(json.dumps({token: 3}))
        with pytest.raises(ValueError, match=says):
            load_tokenizer(path, "</s>")
    added.write_text('{"<s>": 1}')
    assert load_tokenizer(path, "</s>").separator == 2
