"""Own text as documents or examples, some of them for validation."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache
from typing import TypeVar

from train.data.files import Example, read_examples, read_texts

T = TypeVar("T")

VALIDATION_EVERY = 20
"""One document, or page of the built-in text, in this many is for validation."""

# The most characters of a document of plain text, which may be a book, the unit of shuffling; and
# half of it up to a blank line.
_LENGTH = 8192


@cache
def own_documents(files: str, eval_files: str | None) -> dict[str, list[str]]:
    """The documents of each split, see `divided`, of a folder, a pattern, or one file.

    Files of plain text are cut into documents of a few pages. ValueError if a split has none, or a
    file cannot be read.
    """

    def documents(name: str) -> list[str]:
        texts = (cut(text) if plain else [text] for plain, text in read_texts([name]))
        return [document for text in texts for document in text if document.strip()]

    evaluation = None if eval_files is None else documents(eval_files)
    return divided(documents(files), evaluation, lambda text: text, files)


def own_examples(files: Sequence[str], eval_files: Sequence[str]) -> dict[str, list[Example]]:
    """The same of examples of any kind, in `files` and, unless there are none, `eval_files`."""

    def examples(names: Sequence[str]) -> Iterator[Example]:
        for example in read_examples(names):
            if example.kind == "plain":
                pieces = cut(str(example.content[0]))
                texts = (x for x in pieces if x.strip())
                yield from (example._replace(kind="text", content=(x,)) for x in texts)
            else:
                yield example

    evaluation = examples(eval_files) if eval_files else None
    return divided(examples(files), evaluation, lambda x: x[:2], ", ".join(files))


def divided(
    found: Iterable[T], evaluation: Iterable[T] | None, key: Callable[[T], Hashable], name: str
) -> dict[str, list[T]]:
    """What is for training and what for validation; all that has the same key is in one of them.

    `evaluation` is for validation, and left out of training; None takes each twentieth that was
    `found`, counted without repetitions. ValueError, with `name`, if one of them would be empty.
    """
    found = [*found]
    if not found:
        raise ValueError(f"{name}: there is no text in it")
    if evaluation is None:
        first = dict.fromkeys(map(key, found))
        held = {x for number, x in enumerate(first) if number % VALIDATION_EVERY == 0}
        validation = [x for x in found if key(x) in held]
    else:
        validation = [*evaluation]
        held = {key(x) for x in validation}
    train = [x for x in found if key(x) not in held]
    if not validation:
        raise ValueError("--eval-data: there is no text in it")
    if not train and evaluation is None:
        said = "one document, or several that are equal, cannot be trained and evaluated on"
        raise ValueError(f"{name}: {said}; give more, or other text with --eval-data")
    if not train:
        raise ValueError(f"{name}: --eval-data has all of it; nothing is left to train on")
    return {"train": train, "validation": validation}


def cut(text: str) -> Iterator[str]:
    """Cuts a text after a blank line, or after any line where there is none in half a document."""
    lines, size = [], 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        after_blank = bool(lines) and not lines[-1].strip()
        if lines and size + len(line) > (_LENGTH // 2 if after_blank else _LENGTH):
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield "".join(lines)
