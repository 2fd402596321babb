"""Checks that the files beside a tokenizer.json agree with it: only one of them would be used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.hugging_face.files import read_json

# The files of a tokenizer beside its tokenizer.json.
OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")
_ADDED = "added_tokens.json"  # of transformers 4: ids by the names of tokens

# Keys of tokens, besides those that end with _token.
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
# How a token's name is found in a text.
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")
# Tokens that neither a text nor a chat template names: they need not be in tokenizer.json, nor be
# special there unless a text gives them.
_NEVER_WRITTEN = ("pad_token", "mask_token")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece has for it
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
        for theirs, ours in _contradictions(tokenizer, content, read_beside(path, name), first):
            raise _disagree(path.parent / name, theirs, "tokenizer.json", ours)
    one, other = (dict(_named(read_beside(path, name))) for name in OF_TOKENIZER)
    for key in one.keys() & other.keys() - {*_NEVER_WRITTEN, *_LISTS}:
        if one[key] != other[key]:
            theirs, ours = f"{key} {one[key]!r}", repr(other[key])
            raise _disagree(path.parent / OF_TOKENIZER[0], theirs, OF_TOKENIZER[1], ours)
    for name, token in read_beside(path, _ADDED).items():
        if (found := tokenizer.token_to_id(name)) != token:
            ours = "no such token" if found is None else f"it as {found}"
            raise _disagree(path.parent / _ADDED, f"{name!r} as {token}", "tokenizer.json", ours)


def _disagree(beside: Path, theirs: str, other: str, ours: str) -> ValueError:
    return ValueError(f"{beside} has {theirs}, and {other} {ours}: make them agree")


def read_beside(path: Path, name: str) -> dict[str, Any]:
    """The content of a file that belongs to a tokenizer.json; nothing if it is not there.

    ValueError if its tokens are not as transformers writes them.
    """
    beside = path.parent / name
    said = read_json(beside) if path.name == "tokenizer.json" and beside.exists() else {}
    for key, value in said.items():
        if name == _ADDED or value is None:
            continue
        right = True
        if key in _LISTS:
            tokens = value.values() if isinstance(value, dict) else value
            right = isinstance(value, dict | list) and None not in map(token_name, tokens)
        elif key == "added_tokens_decoder":
            right = isinstance(value, dict) and all(
                i.isdecimal() and isinstance(x, dict) and token_name(x) for i, x in value.items()
            )
        elif key.endswith("_token") and not key.startswith("add_"):
            right = token_name(value) is not None
        if not right:
            shown = repr(value)[:60]
            raise ValueError(f"{beside}: {key}={shown} is not a token, or tokens, with a name")
    return said


def own_settings(path: Path) -> dict[str, Any]:
    """What the files that belong to a tokenizer.json say, which agree; a null says nothing."""
    found: dict[str, Any] = {}
    for name in OF_TOKENIZER:
        said = read_beside(path, name)
        found |= {key: x for key, x in said.items() if found.get(key) is None}
    return found


def name_in(tokenizer: Any, token: int) -> str | None:
    """The name of a token; the package gives that of an added one as its normalizer changes it."""
    added = tokenizer.get_added_tokens_decoder()
    return added[token].content if token in added else tokenizer.id_to_token(token)


def unknown_id(tokenizer: Any, content: dict[str, Any]) -> int | None:
    """The id of what the vocabulary lacks, in a tokenizer made of its `content`."""
    model = content["model"]
    return model.get("unk_id", tokenizer.token_to_id(model.get("unk_token") or ""))


def gives(tokenizer: Any, token: int, name: str) -> bool:
    """Whether a text with a token's name in it gives the token."""
    around = [(a, b) for a in ("", " ", "a", "\n", "a ", ">") for b in ("", "a", " a")]
    for text in (f"{a}{name}{b}" for a, b in around):
        try:
            if token in tokenizer.encode(text, add_special_tokens=False).ids:
                return True
        except Exception:  # no vocabulary for a part of the text: see `FileTokenizer.encode`
            continue
    return False


def token_names(said: dict[str, Any]) -> dict[str, str]:
    """The names of tokens by their keys, such as bos_token."""
    listed = [said.get(key) for key in _LISTS]
    found = [said, *(tokens for tokens in listed if isinstance(tokens, dict))]
    tokens = {key: token_name(x) for part in found for key, x in part.items()}
    return {k: x for k, x in tokens.items() if k.endswith("_token") and x is not None}


def token_name(token: Any) -> str | None:
    """The name of a token, which files give as it is or in an object; None if there is none."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _contradictions(
    tokenizer: Any, content: dict[str, Any], said: dict[str, Any], first: list[int]
) -> Iterator[tuple[str, str]]:
    """What a file says, and what tokenizer.json says instead."""
    added = {x["id"]: x for x in content["added_tokens"]}
    for key, token in (said.get("added_tokens_decoder") or {}).items():
        theirs, i = f"the added token {key} {token['content']!r}", int(key)
        if (ours := name_in(tokenizer, i)) != token["content"]:
            yield theirs, "no such id" if ours is None else f"{ours!r} there"
        elif added.get(i, {}).get("special", False) != token.get("special", False):
            marked = ["ordinary", "special"]
            own = bool(token.get("special", False))
            yield f"{theirs} as {marked[own]}", f"as {marked[not own]}"
        for flag in _FLAGS if i in added else ():
            if token.get(flag, added[i][flag]) != added[i][flag]:
                yield f"{theirs} with {flag} {token[flag]}", f"with {flag} {added[i][flag]}"
    unknown = unknown_id(tokenizer, content)
    for key, token in _named(said):
        found, never = tokenizer.token_to_id(token), key in _NEVER_WRITTEN
        if found is None and not never:
            yield f"{key} {token!r}", "no such token"
        elif found is None or found in added or key == "unk_token":
            continue
        elif not never or (found != unknown and gives(tokenizer, found, token)):
            yield f"{key} {token!r}", "it as an ordinary token"
    if said.get("split_special_tokens"):
        yield "split_special_tokens True", "special tokens, whose names in a text are these tokens"
    begin = dict(_named(said)).get("bos_token")
    names = [str(name_in(tokenizer, i)) for i in first]
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
    # Which transformers reads instead: it makes a tokenizer of SentencePiece anew.
    begins, told = _puts_space(parts), said.get("add_prefix_space")
    if None not in (begins, told) and begins != told:
        yield f"add_prefix_space {told}", f"{'a' if begins else 'no'} space before a text"


def _puts_space(parts: list[dict[str, Any]]) -> bool | None:
    """Whether a tokenizer of SentencePiece puts a space before a text; None for another one."""
    schemes = [x.get("prepend_scheme") for x in parts if x["type"] == "Metaspace"]
    if schemes or any(x["type"] == "Prepend" for x in parts):
        return schemes != ["never"]
    spaces = (x["type"] == "Replace" and x["content"] == _SPACE for x in parts)
    return False if any(spaces) else None


def _named(said: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys and the names of their tokens, but for the token that ends a text."""
    yield from ((key, name) for key, name in token_names(said).items() if key != "eos_token")
    for key in _LISTS:
        tokens = said.get(key) or ()
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield key, str(token_name(token))


def _parts(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer or of a pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [part, *(x for one in inner for x in _parts(one))]
