"""From text to token ids and back: plain bytes, or any `tokenizer.json`.

`separator` is the id of the token between two documents; `vocab_size` is above all ids of texts.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Int

# Names of the token that ends a document, in common vocabularies.
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]", "[EOS]")


def load_tokenizer(name: str | Path) -> "Tokenizer":
    """The tokenizer "bytes", or that of a `tokenizer.json`; ValueError if it cannot be used."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name))


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; 256 separates documents."""

    vocab_size, separator = 257, 256

    def encode(self, text: str) -> Int[np.ndarray, " length"]:
        """Token ids of a text. Lone surrogates, which UTF-8 lacks, become '?'."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Int[np.ndarray, " length"]) -> str:
        """The text of the ids below 256; incomplete characters become '�'."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A `tokenizer.json`'s tokenizer, which can be pickled; no text gives a special token."""

    def __init__(self, path: Path):
        # One thread per process: Grain's workers run in parallel, and `tokenizers` warns of a fork
        # after its threads have started.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self.path = path
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(
                f"tokenizer={str(path)!r} cannot be read ({error}): give 'bytes' or the path of a "
                "tokenizer.json of the package `tokenizers`"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab()
        found = [vocabulary[token] for token in END_TOKENS if token in vocabulary]
        if not found:
            needed = f"one of {' '.join(END_TOKENS)} is needed"
            raise ValueError(f"tokenizer={str(path)!r} has no token that ends a document: {needed}")
        self.separator: int = found[0]
        added = tokenizer.get_added_tokens_decoder().items()
        special = {i: token.content for i, token in added if token.special}
        with self._errors_named():
            _spell_out_special_tokens(tokenizer, special)
        ordinary = [i for i in vocabulary.values() if i not in special]
        self.vocab_size: int = 1 + max([self.separator, *ordinary])
        self._tokenizer = tokenizer

    def __reduce__(self):
        # Pickled by path: a pickled `tokenizers.Tokenizer` forgets encode_special_tokens.
        return FileTokenizer, (self.path,)

    def encode(self, text: str) -> Int[np.ndarray, " length"]:
        """Token ids of a text; raises ValueError if the vocabulary has none for a part of it."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        with self._errors_named():
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Int[np.ndarray, " length"]) -> str:
        """The text of the ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Raises the package's plain Exceptions as ValueError that names the file."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"tokenizer={str(self.path)!r} cannot encode a text ({error}): give one whose "
                "vocabulary has an unknown token, or all bytes"
            ) from error


Tokenizer = ByteTokenizer | FileTokenizer


def _spell_out_special_tokens(tokenizer, special: dict[int, str]) -> None:
    """Changes `tokenizer` so that the names of special tokens in a text are text."""
    tokenizer.encode_special_tokens = True
    # A Unigram or word vocabulary that lists its special tokens (T5's does) still finds them,
    # unless their first character is split off before.
    endings: dict[str, list[str]] = {}
    for i, name in special.items():
        if len(name) > 1 and i in tokenizer.encode(name, add_special_tokens=False).ids:
            endings.setdefault(name[0], []).append(re.escape(name[1:]))
    if not endings:
        return
    from tokenizers import Regex, pre_tokenizers

    first = "|".join(f"{re.escape(c)}(?={'|'.join(rest)})" for c, rest in endings.items())
    split = pre_tokenizers.Split(Regex(first), "isolated")
    own = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*own, split])
