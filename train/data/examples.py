"""From examples to batches for fine-tuning: whole examples in a row, and a loss on answers only.

An encoded example is its token ids from the token that begins it to that which ends it; a token
that is not to be predicted, such as a prompt's, is stored as ~id, which is negative.
"""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.chat import ChatTemplate
from train.data.files import Example
from train.data.sequences import START, Batch, Batches, Document, Position, Positions
from train.data.tokenizer import Tokenizer

# Texts to put before a piece: for most pieces one of them has no token in common with it.
_BEFORE = ("\n", ".", "a")

Pieces = Iterable[tuple[str, bool]]  # texts, and whether they are to be predicted


class Encoded(NamedTuple):
    """Examples as a model is trained on them, each with at most the length of a row and one."""

    examples: list[Document]
    cut: int  # examples whose end was cut off
    dropped: int  # examples that had nothing to predict within a row


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    template: Callable[[], ChatTemplate],
    seq_len: int,
) -> Encoded:
    """Encodes examples; `template` is called if one has messages.

    A text that is longer than a row is cut into several. What exceeds a row of another example is
    cut off. ValueError names an example that cannot be encoded.
    """
    result, cut, dropped = [], 0, 0
    for example in examples:
        if example.kind == "messages":
            template()  # an error of the template is not one of the example
        try:
            tokens = _encode(example, tokenizer, template)
        except ValueError as error:
            raise ValueError(f"{example.place}: {error}") from None
        if example.kind in ("plain", "text"):
            starts = range(0, len(tokens) - 1, seq_len)
            pieces = [tokens[i : i + seq_len + 1] for i in starts]
        else:
            pieces, cut = [tokens[: seq_len + 1]], cut + (len(tokens) > seq_len + 1)
        kept = [piece for piece in pieces if np.any(piece[1:] >= 0)]
        dropped += not kept
        result += kept
    return Encoded(result, cut, dropped)


def _encode(
    example: Example, tokenizer: Tokenizer, template: Callable[[], ChatTemplate]
) -> Document:
    end, begin = [tokenizer.separator], [~tokenizer.begin]
    if example.kind == "messages":
        pieces = _rendered(example, tokenizer, template())
        return np.array(_tokens(pieces, tokenizer.encode_rendered, tokenizer.separator), np.int32)
    texts = [str(text) for text in example.content]
    if example.kind == "prompt":
        pieces = zip(texts, (False, True), strict=True)
        tokens = _tokens(pieces, lambda text: tokenizer.encode(text).tolist(), tokenizer.separator)
        return np.array([*begin, *tokens], np.int32)
    if not texts[0].strip():
        return np.array(begin, np.int32)
    return np.array([*begin, *tokenizer.encode(texts[0]), *end], np.int32)


def _tokens(pieces: Pieces, encode: Callable[[str], list[int]], end: int) -> list[int]:
    """The tokens of pieces of one text.

    An answer counts up to the first end, which is appended to the last one if it has none.
    """
    text, ids, tokens = "", [], []
    answer: list[int] = []
    for piece, counts in pieces:
        text += piece
        whole = encode(text)
        # A token across the border is two, as in generation, which begins after the prompt.
        new = _rest(whole, ids)
        if new is None:
            new = _alone(piece, encode)
        ids += new
        if counts:
            answer = new
            until = new.index(end) + 1 if end in new else len(new)
            tokens += [*new[:until], *(~i for i in new[until:])]
        else:
            tokens += [~i for i in new]
    return tokens if end in answer else [*tokens, end]


def _rest(whole: list[int], ids: list[int]) -> list[int] | None:
    """What follows ids; None if they are not the beginning of `whole`."""
    return whole[len(ids) :] if whole[: len(ids)] == ids else None


def _alone(piece: str, encode: Callable[[str], list[int]]) -> list[int]:
    """The token ids of a piece within a text, without what a tokenizer puts before a text.

    A SentencePiece tokenizer, for instance, begins each text with a space.
    """
    for before in _BEFORE:
        if (new := _rest(encode(before + piece), encode(before))) is not None:
            return new
    return encode(piece)


def _rendered(example: Example, tokenizer: Tokenizer, template: ChatTemplate) -> Pieces:
    """What a chat template makes of messages, up to the last answer, cut around the answers."""
    messages = [{"role": str(m[0]), "content": str(m[1])} for m in example.content]
    _check_contents(messages, tokenizer)
    pieces, before = [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(messages[:number], answer=True)
        text = template.render(messages[: number + 1])
        if not (prompt.startswith(before) and text.startswith(prompt)):
            raise ValueError(
                f"the chat template writes what precedes `messages[{number}]` differently once "
                "more follows: end each example with its only answer, or give another template "
                "by --chat-template"
            )
        # Most templates write an answer as it is: only others are asked for another one.
        written = text != prompt and message["content"].strip() in text[len(prompt) :]
        other = {**message, "content": message["content"] + "a"}
        if not written and template.render([*messages[:number], other]) == text:
            raise ValueError(
                f"the chat template does not write `messages[{number}]`, which is to be learnt: "
                "give another by --chat-template"
            )
        pieces += [(prompt[len(before) :], False), (text[len(prompt) :], True)]
        before = text
    if not pieces:
        raise ValueError("no message has the role `assistant`: there is no answer to learn")
    return pieces


def chat_prompt(
    messages: Sequence[dict[str, str]], tokenizer: Tokenizer, template: ChatTemplate
) -> Document:
    """The token ids after which a model answers messages, each with `role` and `content`."""
    _check_contents(messages, tokenizer)
    return np.array(tokenizer.encode_rendered(template.render(messages, answer=True)), np.int32)


def _check_contents(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> None:
    """Raises ValueError if a message would give a special token."""
    for message in messages:
        if found := [name for name in tokenizer.special if name in message["content"]]:
            raise ValueError(
                f"a message contains {found[0]}, which would be a special token: remove it there"
            )


@dataclasses.dataclass(frozen=True)
class ExampleData:
    """An endless stream of batches of examples, reshuffled in each epoch."""

    examples: Sequence[Document]  # of `encode_examples`
    _: dataclasses.KW_ONLY
    batch_size: int  # rows, over all devices
    seq_len: int  # tokens in a row
    separator: int  # the token that pads a row
    packed: bool = True  # several examples in a row, without attention across; else one
    seed: int = 0  # of the order

    def batches(self, start: Positions | None = None) -> Generator[tuple[Batch, Positions]]:
        """Batches from a position on, each with the position after; the data have one part."""
        import grain

        # Grain shuffles with another seed in each epoch.
        order: Any = grain.MapDataset.range(len(self.examples)).shuffle(self.seed).repeat()
        (first,) = start or (START,)
        stream = (self.examples[order[i]] for i in itertools.count(first.documents))
        for batch, position in self.rows_of(stream, first):
            yield batch, (position,)

    def rows_of(self, examples: Iterable[Document], start: Position = START) -> Batches:
        """Batches of some examples in their order; the last one is padded."""
        sizes = {"batch_size": self.batch_size, "seq_len": self.seq_len}
        return example_batches(
            examples, separator=self.separator, packed=self.packed, start=start, **sizes
        )

    def steps(self, epochs: float) -> int:
        """The number of batches that have the examples of some epochs; at least one."""
        last = epochs * len(self.examples)
        positions = (position for _, (position,) in self.batches())
        return 1 + sum(1 for _ in itertools.takewhile(lambda p: p.documents < last, positions))


def example_batches(
    examples: Iterable[Document],
    *,
    separator: int,
    batch_size: int,
    seq_len: int,
    packed: bool,
    start: Position = START,
) -> Batches:
    """Whole examples in rows: each in the first row of the batch with room, if `packed`.

    A batch ends with the first example that fits into no row. Examples begin with number
    `start.documents`; they have at most seq_len + 1 tokens.
    """
    number, rows = start.documents, _empty_rows(batch_size)
    for example in examples:
        size = len(example) - 1
        used = (sum(len(x) - 1 for x in row) for row in rows)
        room = (seq_len - n if packed or not n else 0 for n in used)
        row = next((row for row, free in zip(rows, room, strict=True) if size <= free), None)
        if row is None:
            yield _batch(rows, separator, seq_len), Position(number)
            rows = _empty_rows(batch_size)
            row = rows[0]
        row.append(example)
        number += 1
    if rows[0]:
        yield _batch(rows, separator, seq_len), Position(number)


def _empty_rows(count: int) -> list[list[Document]]:
    return [[] for _ in range(count)]


def _batch(rows: list[list[Document]], separator: int, seq_len: int) -> Batch:
    shape = len(rows), seq_len
    batch = {
        "inputs": np.full(shape, separator, np.int32),
        "targets": np.full(shape, separator, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
    }
    for row, examples in enumerate(rows):
        at = 0
        for segment, example in enumerate(examples, 1):
            ids, size = np.where(example < 0, ~example, example), len(example) - 1
            place = row, slice(at, at + size)
            batch["inputs"][place], batch["targets"][place] = ids[:-1], ids[1:]
            batch["positions"][place] = np.arange(size)
            batch["segment_ids"][place] = segment
            batch["weights"][place] = example[1:] >= 0
            at += size
    return batch


def prompts_of(examples: Iterable[Document]) -> Iterator[tuple[Document, Document]]:
    """The prompt of each example that has one, and its first answer without the end."""
    for example in examples:
        counted = example[1:] >= 0
        first = 1 + int(np.argmax(counted))
        if first > 1:
            length = int(np.argmin(np.append(counted[first - 1 :], False)))
            yield ~example[:first], example[first : first + length]
