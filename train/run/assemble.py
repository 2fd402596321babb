"""All that a run needs before its first step, none of it on disk yet: data, model, programs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from galore_optax.adapters.base import split
from galore_optax.memory import tree_bytes
from models.llama.config import count_params
from train.config.settings import Resolved, lasting
from train.config.source import made_of, short_name
from train.data.loader import TrainingData, evaluation_batches
from train.data.sequences import Batch
from train.data.text import content_of, load_text
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.step.mesh import available_devices, check_batch, make_mesh
from train.step.programs import Programs, make_programs, model_config, vocabulary_note

Log = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Parts(Programs):
    """What a run computes with, and its data."""

    tokenizer: Tokenizer
    data: TrainingData
    evaluation: list[Batch]
    made_with: dict[str, Any]  # what must be equal when the run is resumed


def assemble(config: Resolved, log: Log) -> Parts:
    """Builds a run from its settings, checks what can be checked, and writes nothing."""
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)  # before the data are read
    _log_devices(config, mesh, log)

    tokenizer = load_tokenizer(config.tokenizer, config.end_token)
    model = model_config(config, tokenizer)
    prompt = 1 + len(tokenizer.encode(config.prompt))
    if prompt >= model.max_length:
        raise ValueError(f"--prompt of {prompt} tokens: the model takes {model.max_length}")
    common = {"seq_len": config.seq_len, "mode": config.sequences, "vocab_size": model.vocab_size}
    train_text = load_text(config.data, "train", config.data_dir)
    eval_text = load_text(config.data, "validation", config.data_dir)
    own = {name: getattr(config, name) for name in ("batch_size", "seed", "workers")}
    data = TrainingData(train_text, tokenizer, **own, **common)
    sizes = {"batch_size": config.batch_size // config.accumulate, "max_tokens": config.eval_tokens}
    evaluation = evaluation_batches(eval_text, tokenizer, **sizes, **common)
    eval_tokens = int(sum(batch["weights"].sum() for batch in evaluation))
    builtin = "the documentation of Python's standard library"
    source = builtin if config.data == "builtin" else f"C4 (c4/en) in {config.data_dir}"
    log(
        f"data: {source}, {len(train_text):,} documents to train on, "
        f"{len(eval_text):,} to evaluate on ({eval_tokens:,} tokens); tokenizer "
        f"{config.tokenizer}, {tokenizer.vocab_size:,} ids; {config.sequences} sequences"
    )
    if note := vocabulary_note(model, tokenizer):
        log(note)
    programs = make_programs(config, model, mesh)
    _log_programs(config, programs, log)
    made_with = {
        **lasting(config),
        **made_of(config, model),
        "content of the tokenizer": tokenizer.content,
        "content of the text": content_of(train_text),
    }
    own = {"tokenizer": tokenizer, "data": data, "evaluation": evaluation, "made_with": made_with}
    return Parts(**vars(programs), **own)


def _log_devices(config: Resolved, mesh: Mesh, log: Log) -> None:
    device = mesh.devices.flat[0]
    layout = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    available = len(available_devices())
    unused = f" of {available} (--mesh data={available} uses all)"
    same = "numbers to rounding (--deterministic: the same bits)"
    log(
        f"devices: {mesh.size}{unused if mesh.size < available else ''} x {device.device_kind} "
        f"({device.platform}){', mesh ' + layout if layout else ''}; a repeated or resumed run "
        f"gives the same {'bits' if device.platform == 'cpu' or config.deterministic else same}"
    )


def _log_programs(config: Resolved, programs: Programs, log: Log) -> None:
    params, optimizer = programs.abstract.params, programs.abstract.optimizer
    for note in programs.notes:
        log(f"sharding: {note}")
    log(
        f"model: {short_name(config.model)}, {count_params(programs.model):,} params, "
        f"{config.dtype}, {tree_bytes(params) / 1e6:,.1f} MB; attention by "
        f"{programs.model.attention}; "
        + ("random weights" if config.init is None else f"weights of {config.init}")
    )
    if config.adapter is not None:
        trained = sum(x.size for x in jax.tree.leaves(split(params)[0]))
        every = config.restart_every
        log(
            f"adapter: {config.adapter}, rank {config.rank}, {trained:,} params trained"
            + (f", merged and reset every {every} steps" if every else "")
        )
    rank = config.rank if config.gradient_rank is None else config.gradient_rank
    gap = config.update_proj_gap
    log(
        f"optimizer: {config.optimizer}, state of {tree_bytes(optimizer) / 1e6:,.1f} MB"
        + (f", rank {rank}, a subspace every {gap} steps" if gap else "")
    )
