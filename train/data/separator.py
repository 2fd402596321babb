"""Which tokens of a `tokenizer.json` begin and end a document; no text gives special tokens."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.hugging_face.files import read_json
from train.data.agreement import (
    OF_TOKENIZER,
    check_agreement,
    gives,
    name_in,
    read_beside,
    token_name,
)

# Names of the token that ends a document, in common vocabularies.
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]", "[EOS]")

# The files of a model beside a tokenizer.json that say it, too.
_OF_MODEL = ("generation_config.json", "config.json")


def files_of(path: Path) -> list[Path]:
    """A tokenizer's file, and those that belong to one named tokenizer.json."""
    beside = [path.parent / name for name in (*OF_TOKENIZER, *_OF_MODEL, "chat_template.jinja")]
    return [path, *(p for p in beside if path.name == "tokenizer.json" and p.is_file())]


def find_separator(tokenizer: Any, path: Path, named: str | None) -> int:
    """Returns the id of the token that ends a document; ValueError unless there is just one.

    It is the token `named`. Without, it is what the post-processor appends and the files beside a
    tokenizer.json call eos_token; if none of them says it, the special token with one of the names
    above. The eos_token_id of a model's files must agree. Ordinary tokens do not count.
    """
    give = "name the right one with --end-token"
    if named is not None:
        if (found := tokenizer.token_to_id(named)) is None:
            raise ValueError(f"--end-token {named}: {path} has no such token; {give}")
        return found
    added = tokenizer.get_added_tokens_decoder().items()
    special = {token.content: i for i, token in added if token.special}
    # The other files belong to one of that name.
    beside = path.parent if path.name == "tokenizer.json" else None
    sources = _of_tokenizer(tokenizer, path)
    of_model = _of_model(beside)
    if not sources:
        known = {special[name] for name in END_TOKENS if name in special}
        sources["names of special tokens"] = known or {i for i in special.values() if of_model}
    sources |= of_model
    candidates = set.intersection(*sources.values())
    if len(candidates) == 1:
        return candidates.pop()
    if not candidates and len(sources) > 1:
        said = ", ".join(f"{_list(tokenizer, ids)} ({what})" for what, ids in sources.items())
        problem = f"contradictory ends of a document: {said}"
    elif candidates:
        problem = f"several tokens that could end a document: {_list(tokenizer, candidates)}"
    else:
        known = f"such as {END_TOKENS[0]} (special: {_list(tokenizer, {*special.values()})})"
        problem = f"no special token that is known to end a document, {known}"
    raise ValueError(f"tokenizer={str(path)!r} has {problem}; {give}")


def find_beginning(tokenizer: Any, path: Path, separator: int) -> int:
    """Returns the id of the token that begins a document: transformers puts it before a prompt.

    It is what the post-processor puts before a text, or else the separator. ValueError if the
    post-processor puts several tokens there, or an ordinary one that texts give, or if the files
    beside a tokenizer.json contradict it.
    """
    content = json.loads(tokenizer.to_str())
    first = _first_tokens(content["post_processor"])
    check_agreement(tokenizer, content, path, first)
    if len(first) > 1:
        names = _list(tokenizer, {*first})
        raise ValueError(
            f"tokenizer={str(path)!r} puts {len(first)} tokens before a text ({names}), and only "
            "one is supported: change its post_processor"
        )
    if first and first[0] not in tokenizer.get_added_tokens_decoder():
        name = str(name_in(tokenizer, first[0]))
        if gives(tokenizer, first[0], name):
            raise ValueError(
                f"tokenizer={str(path)!r} puts {name!r} before a text, an ordinary token that "
                "texts have, too: mark it as special, or change its post_processor"
            )
    return first[0] if first else separator


def first_and_last(post_processor: dict[str, Any] | None) -> tuple[list[int], int | None]:
    """The ids of the tokens that a post-processor puts before a text, and of the last after it."""
    return _first_tokens(post_processor), _last_token(post_processor)


def _of_tokenizer(tokenizer: Any, path: Path) -> dict[str, set[int]]:
    """The tokens that end a document by the files of a tokenizer."""
    last = _last_token(json.loads(tokenizer.to_str())["post_processor"])
    sources = {} if last is None else {"the post-processor": {last}}
    for name in OF_TOKENIZER:
        token = token_name(read_beside(path, name).get("eos_token"))
        if token is not None:
            found = tokenizer.token_to_id(token)
            if found is None:
                raise ValueError(
                    f"tokenizer={str(path)!r} has no token {token!r}, the eos_token in {name}; "
                    "name the token that ends a document with --end-token"
                )
            sources[name] = {found}
    return sources


def _of_model(beside: Path | None) -> dict[str, set[int]]:
    """The tokens that end a document by the files of a model, which may accept several."""
    sources = {}
    for name in _OF_MODEL:
        ids = _content(beside, name).get("eos_token_id")
        known = {
            i
            for i in (ids if isinstance(ids, list) else [ids])
            if type(i) is int and 0 <= i < 2**32
        }
        if known:
            sources[name] = known
    return sources


def _content(directory: Path | None, name: str) -> dict[str, Any]:
    exists = directory is not None and (directory / name).exists()
    return read_json(directory / name) if exists else {}


def _last_token(post_processor: dict[str, Any] | None) -> int | None:
    """The id of the token that a post-processor puts after a text, if any."""
    match post_processor:
        case {"type": "Sequence", "processors": parts}:
            found = [i for part in parts if (i := _last_token(part)) is not None]
            return found[-1] if found else None
        case {"type": "TemplateProcessing", "single": [*_, {"SpecialToken": {"id": name}}]}:
            return _ids(post_processor, name)[-1]
        case {"sep": [_, i]}:  # BertProcessing and RobertaProcessing
            return i
    return None


def _first_tokens(post_processor: dict[str, Any] | None) -> list[int]:
    """The ids of the tokens that a post-processor puts before a text."""
    match post_processor:
        case {"type": "Sequence", "processors": parts}:
            return [i for part in reversed(parts) for i in _first_tokens(part)]
        case {"type": "TemplateProcessing", "single": parts}:
            names = [part["SpecialToken"]["id"] for part in _until_text(parts)]
            return [i for name in names for i in _ids(post_processor, name)]
        case {"cls": [_, i]}:  # BertProcessing and RobertaProcessing
            return [i]
    return []


def _ids(post_processor: dict[str, Any], name: str) -> list[int]:
    """The ids of a special token of a template; the package lets one without a name be absent."""
    if name not in (known := post_processor["special_tokens"]):
        raise ValueError(f"a post_processor names the special token {name!r}, and has no ids of it")
    return known[name]["ids"]


def _until_text(parts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return itertools.takewhile(lambda part: "SpecialToken" in part, parts)


def _list(tokenizer: Any, ids: set[int]) -> str:
    names = [name_in(tokenizer, i) or f"id {i}" for i in sorted(ids)] or ["none"]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8))


def spell_out(tokenizer: Any, special: dict[int, str]) -> None:
    """Changes `tokenizer` so that a special token's name in a text is encoded as ordinary text."""
    tokenizer.encode_special_tokens = True
    # The model itself still finds those in its vocabulary (T5's lists them, merges may make them),
    # unless their first character is split off before.
    endings: dict[str, list[str]] = {}
    for i, name in special.items():
        if len(name) > 1 and gives(tokenizer, i, name):
            endings.setdefault(name[0], []).append(re.escape(name[1:]))
    if not endings:
        return
    from tokenizers import Regex, pre_tokenizers

    first = "|".join(f"{re.escape(c)}(?={'|'.join(rest)})" for c, rest in endings.items())
    split = pre_tokenizers.Split(Regex(first), "isolated")
    own = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*own, split])
