"""All that a run needs before its first step, none of it on disk yet: data, model, programs."""

import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from models.llama.config import flops_per_token
from train.config.resume import lasting
from train.config.settings import Resolved, ResolvedText
from train.config.source import made_of, short_name, sizes
from train.data.loader import TrainingData, evaluation_batches
from train.data.separator import files_of
from train.data.sequences import Batch
from train.data.text import SkippingUnreadable, content_of, load_text
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.run import directory as run_directory
from train.run import hosts
from train.run.initial import checked_initial
from train.run.metrics import read_metrics
from train.run.parts import Evaluation, Log, Parts, log_devices, log_programs
from train.run.trained import sample_text
from train.step.mesh import make_mesh, own_rows
from train.step.microbatches import check_batch
from train.step.programs import abstract_params, make_programs, model_config, vocabulary_note
from train.step.state import Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextParts(Parts):
    """What a run that trains a language model computes with."""

    config: ResolvedText
    tokenizer: Tokenizer
    evaluation: list[Batch]

    def evaluate(self, params: Params, stopped: Callable[[], bool]) -> Evaluation | None:
        """The mean loss of all tokens, and the perplexity."""
        sums = self.run_evaluation(params, self.evaluation, stopped)
        if sums is None:
            return None
        losses, tokens = zip(*sums, strict=True)
        mean = float(np.sum(losses, dtype=np.float64) / np.sum(tokens))
        perplexity = math.exp(mean) if mean < 700 else math.inf
        said = f"loss {mean:.4f}, perplexity {perplexity:,.2f}"
        return Evaluation({"eval_loss": mean, "eval_perplexity": perplexity}, said)

    def leave(self, state: TrainState, log: Log) -> dict[str, Any]:
        """Prints samples; the summary has the last evaluation."""
        self.keep_sample(state.params, int(state.step), log)
        lines = read_metrics(run_directory.directory(self.config))
        last = [line for line in lines if "eval_loss" in line][-1]
        return {name: value for name, value in last.items() if name != "step"}

    def keep_sample(self, params: Params, step: int, log: Log) -> None:
        """Prints a sample, and writes it into samples/ of the run."""
        lines: list[str] = []
        self.sample(params, lines.append)
        folder = run_directory.directory(self.config) / "samples"
        folder.mkdir(exist_ok=True)
        text = "\n".join(lines)
        run_directory.write_at_once(folder / f"{step}.txt", text + "\n")
        log(text)

    def sample(self, params: Params, log: Log) -> None:
        """Prints a sample of text, or how to make one if processes share the weights."""
        config, tokenizer = self.config, self.tokenizer
        assert isinstance(config, Resolved)
        if hosts.several():  # each has a part of the weights
            command = ["python", "-m", "train.generate"]
            command += ["--run", str(run_directory.directory(config)), "--prompt", config.prompt]
            log(f"sample: {shlex.join(command)}")
            return
        graph, _ = abstract_params(config, self.model)
        model = nnx.merge(graph, params)  # not merged: the plan has no room for whole weights
        new = max(1, config.seq_len - 1 - len(tokenizer.encode(config.prompt)))
        how = {"max_new_tokens": new, "temperature": 0.5, "seed": config.seed}
        log(f"sample: {sample_text(model, tokenizer, config.prompt, **how)}")

    def flops_per_token(self) -> float:
        """The operations to train on one token."""
        return flops_per_token(self.model, self.config.seq_len)

    def less_memory(self, available: int) -> str:
        """What to do if a step takes more than the bytes of a device."""
        found = f"`{plan_command(self.config, available)}` finds what fits"
        return f"{self.config.less_memory}; {found}"


def kept_files(config: ResolvedText) -> dict[str, dict[str, Path]]:
    """The tokenizer's files, and the model's config.json: `train.config.source.with_copies`."""
    kept = {}
    if config.tokenizer != "bytes":
        kept["tokenizer"] = {path.name: path for path in files_of(Path(config.tokenizer))}
    if sizes(config)[1]:
        kept["model"] = {f"{short_name(config.model)}.json": Path(config.model)}
    if template := getattr(config, "chat_template", None):
        kept["chat_template"] = {Path(template).name: Path(template)}
    return kept


def plan_command(config: ResolvedText, available: int) -> str:
    """The command that finds what fits into the bytes of a device."""
    return f"python -m train.plan --model {config.model} --card {available / 2**30:.3g}"


def assemble(config: Resolved, log: Log) -> TextParts:
    """Builds a run from its settings, checks what can be checked, and writes nothing."""
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)  # before the data are read
    log_devices(config, mesh, log)

    tokenizer = load_tokenizer(config.tokenizer, config.end_token)
    model = model_config(config, tokenizer)
    prompt = 1 + len(tokenizer.encode(config.prompt))
    if prompt >= model.max_length:
        raise ValueError(f"--prompt of {prompt} tokens: the model takes {model.max_length}")
    common = {"seq_len": config.seq_len, "mode": config.sequences, "vocab_size": model.vocab_size}
    where = config.data_dir, config.eval_data
    train_text = load_text(config.data, "train", *where)
    eval_text = load_text(config.data, "validation", *where)
    own = {name: getattr(config, name) for name in ("batch_size", "seed", "workers")}
    if config.skip_unreadable and hosts.several():
        reason = "a file that one of several processes cannot read gives it other rows"
        raise ValueError(f"--skip-unreadable: {reason}; leave it out")
    source = SkippingUnreadable(train_text) if config.skip_unreadable else train_text
    parts = config.data_parts
    read = sorted({row * parts // config.batch_size for row in own_rows(mesh, config.batch_size)})
    data = TrainingData(source, tokenizer, parts=parts, read=read, **own, **common)
    sizes = {"batch_size": config.batch_size // config.accumulate, "max_tokens": config.eval_tokens}
    evaluation = evaluation_batches(eval_text, tokenizer, **sizes, **common)
    eval_tokens = int(sum(batch["weights"].sum() for batch in evaluation))
    sources = {
        "builtin": "the documentation of Python's standard library",
        "c4": f"C4 (c4/en) in {config.data_dir}",
        "text": str(config.data_dir),
    }
    log(
        f"data: {sources[config.data]}, {len(train_text):,} documents to train on, "
        f"{len(eval_text):,} to evaluate on ({eval_tokens:,} tokens); tokenizer "
        f"{config.tokenizer}, {tokenizer.vocab_size:,} ids; {config.sequences} sequences"
    )
    if note := vocabulary_note(model, tokenizer):
        log(note)
    programs = make_programs(config, model, mesh)
    said = f"{short_name(config.model)}, attention by {programs.model.attention}"
    weights = "random weights" if config.init is None else f"weights of {config.init}"
    log_programs(config, programs, said, weights, log)
    made_with = {
        **lasting(config),
        **made_of(config, model),
        "content of the tokenizer": tokenizer.content,
        "content of the text": content_of(source),
        "content of the validation text": content_of(eval_text),
    }
    return TextParts(
        **vars(programs),
        name=short_name(config.model),
        initial=checked_initial(config, programs),
        data=data,
        made_with=made_with,
        sample_every=config.sample_every,
        kept=kept_files(config),
        config=config,
        tokenizer=tokenizer,
        evaluation=evaluation,
    )
