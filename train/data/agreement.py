"""Checks that the files beside a tokenizer.json agree with it: only one of them would be used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.hugging_face.files import read_json

# The files of a tokenizer beside its tokenizer.json.
OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")

# Keys whose tokens a text, or a chat template, may name.
_NAMES = ("bos_token", "unk_token", "sep_token", "cls_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Keys that transformers' classes write into tokenizer.json, and where they are there: the type of
# a part, and its key.
_WRITTEN = {
    "add_prefix_space": ("ByteLevel", "add_prefix_space"),
    "do_lower_case": ("BertNormalizer", "lowercase"),
    "strip_accents": ("BertNormalizer", "strip_accents"),
    "tokenize_chinese_chars": ("BertNormalizer", "handle_chinese_chars"),
}


def check_agreement(tokenizer: Any, content: dict[str, Any], path: Path, first: list[int]) -> None:
    """Raises ValueError if a file beside a tokenizer.json contradicts it, naming both.

    `tokenizer` is made of its `content`, and puts the ids `first` before a text.
    """
    if path.name != "tokenizer.json":
        return  # the other files belong to one of that name
    for name in OF_TOKENIZER:
        beside = path.parent / name
        said = read_json(beside) if beside.exists() else {}
        for theirs, ours in _contradictions(tokenizer, content, said, first):
            raise ValueError(f"{beside} has {theirs}, and tokenizer.json {ours}: make them agree")


def _contradictions(
    tokenizer: Any, content: dict[str, Any], said: dict[str, Any], first: list[int]
) -> Iterator[tuple[str, str]]:
    """What a file says, and what tokenizer.json says instead."""
    special = {x["id"]: x["special"] for x in content["added_tokens"]}
    for key, token in (said.get("added_tokens_decoder") or {}).items():
        theirs, i = f"the added token {key} {token['content']!r}", int(key)
        if (ours := tokenizer.id_to_token(i)) != token["content"]:
            yield theirs, "no such id" if ours is None else f"{ours!r} there"
        elif special.get(i, False) != token.get("special", False):
            marked = ["ordinary", "special"]
            own = bool(token.get("special", False))
            yield f"{theirs} as {marked[own]}", f"as {marked[not own]}"
    for key, token in _named(said):
        if tokenizer.token_to_id(token) is None:
            yield f"{key} {token!r}", "no such token"
    begin = dict(_named(said)).get("bos_token")
    names = [str(tokenizer.id_to_token(i)) for i in first]
    # Without the key, bos_token is a name for templates: tokenizer.json says what begins a text.
    if said.get("add_bos_token") and first and begin is not None and begin not in names:
        yield f"bos_token {begin!r}", f"a post_processor that begins a text with {names[0]!r}"
    if "add_bos_token" in said and bool(said["add_bos_token"]) != bool(first):
        begins = f"begins a text with {names[0]!r}" if first else "begins a text with no token"
        yield f"add_bos_token {said['add_bos_token']}", f"a post_processor that {begins}"
    parts = [x for key in ("normalizer", "pre_tokenizer") for x in _parts(content[key])]
    for key, (kind, name) in _WRITTEN.items():
        found = {x.get(name) for x in parts if x["type"] == kind}
        if said.get(key) is not None and found and found != {said[key]}:
            yield f"{key} {said[key]}", f"{kind} with {name} {next(iter(found - {said[key]}))}"


def _named(said: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys and the names of their tokens."""
    found = [(key, said.get(key)) for key in _NAMES]
    for key in _LISTS:
        tokens = said.get(key) or ()
        found += [(key, x) for x in (tokens.values() if isinstance(tokens, dict) else tokens)]
    for key, token in found:
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            yield key, name


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer or of a pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [part, *(x for one in inner for x in _parts(one))]
