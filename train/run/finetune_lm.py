"""The parts of a run that fine-tunes a language model on examples."""

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from train.config.resume import lasting
from train.config.settings import ResolvedFinetuneLM
from train.config.source import chat_template_of, made_of, short_name
from train.data.chat import load_template
from train.data.examples import Encoded, ExampleData, encode_examples, prompts_of
from train.data.own import own_examples
from train.data.sequences import Document, check_token_ids
from train.data.text import content_of
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.run import directory as run_directory
from train.run import hosts
from train.run.assemble import TextParts, kept_files
from train.run.initial import checked_initial
from train.run.parts import Log, log_devices, log_programs
from train.run.trained import answer
from train.step.mesh import make_mesh
from train.step.microbatches import check_batch
from train.step.programs import abstract_params, make_programs, model_config
from train.step.state import Params

# Answers that are sampled at the end, and the most tokens of each.
_SAMPLES, _LENGTH = 3, 128


class Examples(NamedTuple):
    """A run's examples, encoded."""

    tokenizer: Tokenizer
    train: Encoded
    evaluation: Encoded


def count_steps(config: ResolvedFinetuneLM, epochs: float) -> int:
    """The steps that some epochs of a run take; reads and encodes its examples."""
    found = _examples_of(config)
    return _data(config, found.train, found.tokenizer).steps(epochs)


def assemble(config: ResolvedFinetuneLM, log: Log) -> "FinetuningParts":
    """Builds a run from its settings, checks what can be checked, and writes nothing."""
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)  # before the data are read
    log_devices(config, mesh, log)
    found = _examples_of(config)
    model = model_config(config, found.tokenizer)
    data = _data(config, found.train, found.tokenizer)
    rows = dataclasses.replace(data, batch_size=config.batch_size // config.accumulate)
    evaluation = [batch for batch, _ in rows.rows_of(found.evaluation.examples)]
    for documents in found[1:]:
        for document in documents.examples:
            check_token_ids({"inputs": document, "targets": ~document}, model.vocab_size)
    _log_examples(config, found, log)
    programs = make_programs(config, model, mesh)
    name = short_name(config.model)
    said = f"{name}, attention by {programs.model.attention}"
    log_programs(config, programs, said, f"weights of {config.init}", log)
    made_with = {
        **lasting(config),
        **made_of(config, model),
        "content of the tokenizer": found.tokenizer.content,
        "content of the examples": content_of([x.tobytes() for x in found.train.examples]),
        "content of the evaluation": content_of([x.tobytes() for x in found.evaluation.examples]),
    }
    return FinetuningParts(
        **vars(programs),
        name=name,
        initial=checked_initial(config, programs),
        data=data,
        made_with=made_with,
        sample_every=config.sample_every,
        kept=kept_files(config),
        config=config,
        tokenizer=found.tokenizer,
        evaluation=evaluation,
        held_out=found.evaluation.examples,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuningParts(TextParts):
    """What a run that fine-tunes a language model computes with."""

    held_out: Sequence[Document]  # the examples of the evaluation

    def sample(self, params: Params, log: Log) -> None:
        """Prints the model's answers to some prompts of the evaluation, beside the right ones."""
        if hosts.several():  # each has a part of the weights
            where = shlex.quote(str(run_directory.directory(self.config)))
            log(f"answers: python -m train.generate --run {where} --prompt ...")
            return
        graph, _ = abstract_params(self.config, self.model)
        model = nnx.merge(graph, params)  # not merged: the plan has no room for whole weights
        told = self.tokenizer.decode
        longest = self.model.max_length - 1
        pairs = [pair for pair in prompts_of(self.held_out) if len(pair[0]) <= longest]
        prompts: dict[bytes, Any] = {pair[0].tobytes(): pair for pair in pairs}  # each once
        if not prompts:
            begin = self.held_out[0][:9]
            prompts[b""] = np.where(begin < 0, ~begin, begin), None
        for prompt, right in itertools.islice(prompts.values(), _SAMPLES):
            new = min(_LENGTH, self.model.max_length - len(prompt))
            found = answer(model, self.tokenizer, prompt, max_new_tokens=new, temperature=0)
            expected = "" if right is None else f"\n  in the data: {told(right)}"
            log(f"prompt: {told(prompt)}\n  answer: {found}{expected}")

    def flops_per_token(self) -> float:
        """The operations to train on a token that is learnt, and to read those that are not."""
        assert isinstance(self.data, ExampleData)
        read = sum(len(x) - 1 for x in self.data.examples)
        learnt = sum(int(np.sum(x[1:] >= 0)) for x in self.data.examples)
        return super().flops_per_token() * read / learnt


def _examples_of(config: ResolvedFinetuneLM) -> Examples:
    named = config.tokenizer, config.end_token, config.chat_template
    return _examples(config.data, config.eval_data, *named, config.seq_len, _inherits(config))


def _inherits(config: ResolvedFinetuneLM) -> bool:
    """Whether the chat template is that of the run in --init, of which prompts make no use."""
    own = config.chat_template
    if own is None or (config.resume and config.config is not None):
        return True
    theirs = chat_template_of(config.init)
    both = [Path(path) for path in (own, theirs) if path is not None and Path(path).is_file()]
    return len(both) == 2 and both[0].read_bytes() == both[1].read_bytes()


@cache
def _examples(
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    tokenizer: str,
    end_token: str | None,
    chat_template: str | None,
    seq_len: int,
    inherits: bool,
) -> Examples:
    found = load_tokenizer(tokenizer, end_token)
    template = cache(lambda: load_template(found, chat_template))
    splits = own_examples(data, eval_data).values()
    if not inherits and all(x.kind != "messages" for examples in splits for x in examples):
        reason = "no example has `messages`"
        raise ValueError(f"--chat-template {chat_template} has no effect: {reason}; leave it out")
    train, evaluation = (encode_examples(examples, found, template, seq_len) for examples in splits)
    for encoded, what in ((train, "to learn from"), (evaluation, "for evaluation")):
        if not encoded.examples:
            raise ValueError(
                f"--data {' '.join(data)}: nothing {what} is left within --seq-len {seq_len}"
            )
    return Examples(found, train, evaluation)


def _data(config: ResolvedFinetuneLM, examples: Encoded, tokenizer: Tokenizer) -> ExampleData:
    own = {name: getattr(config, name) for name in ("batch_size", "seq_len", "seed")}
    packed = config.sequences == "packed"
    return ExampleData(examples.examples, **own, separator=tokenizer.separator, packed=packed)


def _log_examples(config: ResolvedFinetuneLM, found: Examples, log: Log) -> None:
    def counted(encoded: Encoded) -> str:
        learnt = sum(int(np.sum(x[1:] >= 0)) for x in encoded.examples)
        return f"{len(encoded.examples):,} ({learnt:,} tokens of answers and texts)"

    log(
        f"examples: {counted(found.train)} to learn from, {counted(found.evaluation)} to evaluate "
        f"on; tokenizer {config.tokenizer}, {found.tokenizer.vocab_size:,} ids; "
        f"{'several examples' if config.sequences == 'packed' else 'one example'} per row"
    )
    cut, dropped = (sum(getattr(x, name) for x in found[1:]) for name in ("cut", "dropped"))
    if cut or dropped:
        log(
            f"examples: {cut:,} are longer than --seq-len {config.seq_len} and cut off there; "
            f"{dropped:,} of all are left out, as they have nothing to learn within it"
        )
