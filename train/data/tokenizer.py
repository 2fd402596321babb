"""From text to token ids and back: plain bytes, or any `tokenizer.json`.

`separator` is the id of the token that ends a document, `begin` that of the token that begins one;
they may be equal. `vocab_size` is above all ids of texts; `content` differs between tokenizers that
give different ids.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from train.data.agreement import name_in, unknown_id
from train.data.separator import find_beginning, find_separator, spell_out


def load_tokenizer(name: str | Path, end_token: str | None = None) -> "Tokenizer":
    """The tokenizer "bytes", or that of a `tokenizer.json`; ValueError if it cannot be used.

    `end_token` is the name of the token that ends a document, which otherwise the files say.
    """
    if name != "bytes":
        return FileTokenizer(Path(name), end_token)
    if end_token is not None:
        advice = "leave it out, or give a tokenizer.json"
        raise ValueError(f"--end-token {end_token} has no effect with --tokenizer bytes: {advice}")
    return ByteTokenizer()


@contextmanager
def errors_named(message: Callable[[str], str]) -> Iterator[None]:
    """Raises what the package raises, plain Exceptions and Rust's panics, as ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no Exception
        raise ValueError(message(str(error))) from error


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a `tokenizer.json`, without what it says on lengths and on chance.

    ValueError if it cannot be read.
    """
    # One thread per process: Grain's workers run in parallel, and `tokenizers` warns of a fork
    # after its threads have started.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    give = "give 'bytes' or the path of a tokenizer.json of the package `tokenizers`"
    with errors_named(lambda said: f"tokenizer={str(path)!r} cannot be read ({said}): {give}"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # merges left out at random
        tokenizer.model.dropout = None
    return tokenizer


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; 256 separates documents."""

    vocab_size, separator, begin, content = 257, 256, 256, "bytes"
    special: tuple[str, ...] = ()

    def encode(self, text: str) -> Int[np.ndarray, " length"]:
        """Token ids of a text. Lone surrogates, which UTF-8 lacks, become '?'."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Int[np.ndarray, " length"]) -> str:
        """The text of the ids below 256; incomplete characters become '�'."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what a chat template has made: the same, as no byte is special."""
        return self.encode(text).tolist()


class FileTokenizer:
    """A `tokenizer.json`'s tokenizer, which can be pickled; no text gives its separator."""

    def __init__(self, path: Path, end_token: str | None = None):
        self.path, self._end_token = path, end_token
        tokenizer = read_tokenizer(path)
        self.separator = find_separator(tokenizer, path, end_token)
        self.begin = find_beginning(tokenizer, path, self.separator)
        self._name = str(name_in(tokenizer, self.separator))
        tokenizer.add_special_tokens([self._name])
        added = tokenizer.get_added_tokens_decoder().items()
        special = {i: token.content for i, token in added if token.special}
        spell_out(tokenizer, special)
        unknown = unknown_id(tokenizer, json.loads(tokenizer.to_str()))
        if unknown == self.separator:
            raise ValueError(self._reached("each unknown character"))
        ordinary = [i for i in tokenizer.get_vocab().values() if i not in special]
        self.vocab_size: int = 1 + max([self.separator, self.begin, unknown or 0, *ordinary])
        self.content = f"{sha256(path.read_bytes()).hexdigest()[:16]}, {self._name}"
        if self.begin != self.separator:
            self.content += f", after {name_in(tokenizer, self.begin)}"
        self.special = tuple(special.values())
        self._tokenizer = tokenizer

    def __reduce__(self):
        # Pickled by path: a pickled `tokenizers.Tokenizer` forgets encode_special_tokens.
        return FileTokenizer, (self.path, self._end_token)

    def encode(self, text: str) -> Int[np.ndarray, " length"]:
        """Token ids of a text, never the separator's; ValueError if the vocabulary lacks a part."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        with self._errors_named():
            found = self._tokenizer.encode(text, add_special_tokens=False)
        if self.separator not in (ids := found.ids):
            return np.array(ids, np.int32)
        # Unknown characters that were left out can make its name: then the text is cut within it.
        start, end = found.offsets[ids.index(self.separator)]
        if end - start < 2:
            raise ValueError(self._reached(f"{text[start:end]!r} in a text"))
        return np.concatenate([self.encode(text[: start + 1]), self.encode(text[start + 1 :])])

    def name_of(self, token: int) -> str:
        """The name of a token."""
        return str(name_in(self._tokenizer, token))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what a chat template has made: names of special tokens are these tokens."""
        with self._errors_named():
            return self.as_written.encode(text, add_special_tokens=False).ids

    @cached_property
    def as_written(self) -> Any:
        """The file's tokenizer, which reads names of special tokens in a text as these tokens.

        So it does those of the tokens that begin and end a document.
        """
        tokenizer = read_tokenizer(self.path)
        added = tokenizer.get_added_tokens_decoder()
        ends = (i for i in (self.begin, self.separator) if i not in added)
        tokenizer.add_special_tokens([self.name_of(i) for i in ends])
        return tokenizer

    def _reached(self, text: str) -> str:
        return (
            f"tokenizer={str(self.path)!r}: {text} gives {self._name}, the token that ends a "
            "document; name another with --end-token"
        )

    def decode(self, ids: Int[np.ndarray, " length"]) -> str:
        """The text of the ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _errors_named(self) -> AbstractContextManager[None]:
        give = "give one whose vocabulary has an unknown token, or all bytes"
        cannot = f"tokenizer={str(self.path)!r} cannot encode a text"
        return errors_named(lambda said: f"{cannot} ({said}): {give}")


Tokenizer = ByteTokenizer | FileTokenizer
