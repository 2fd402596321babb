"""Settings of a pre-training run: the flags, their defaults by model, and what is accepted."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from train.config.optimizers import OPTIMIZERS
from train.config.weights import ADAPTERS

if TYPE_CHECKING:
    from models.llama.config import LlamaConfig

# Numbers of a run are float32; what is smaller than the smallest counts as zero.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

Model = Literal["tiny", "llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b"]


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pre-train a LLaMA. Without any flag: `tiny` with GaLore on text that Python ships."""

    model: Model = "tiny"
    """Architecture; the sizes are the GaLore paper's."""
    data: Literal["builtin", "c4"] = "builtin"
    """`builtin`: text that Python ships, about 2 MB. `c4`: C4 as TFDS has it, in --data-dir."""
    data_dir: str | None = None
    """Folder of the data set; `python -m train.prepare_c4` writes one."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a tokenizer.json."""
    sequences: Literal["packed", "document"] = "packed"
    """`packed`: no padding, no attention across documents. `document`: one document a row, cut or
    padded, as published."""
    optimizer: Literal[
        "adamw",
        "adamw8bit",
        "adafactor",
        "galore-adamw",
        "galore-adamw8bit",
        "galore-adafactor",
        "q-galore-adamw8bit",
        "gradnorm-lorp-adamw",
        "lora-adamw",
        "relora-adamw",
        "qlora-adamw",
    ] = "galore-adamw"
    """What updates the weights; the last four with the adapter of their name."""
    adapter: Literal["lora", "dora", "relora", "qlora", "low-rank", "gradnorm-lorp"] | None = None
    """What is trained in the place of the layers' matrices, which are frozen (low-rank: replaced);
    what has no adapter, such as embedding, norms and head, is trained as it is."""
    adapter_pattern: str | None = None
    """Regular expression for the paths of the matrices that get adapters, such as query|value. By
    default all."""
    rank: int | None = None
    """GaLore's rank, below the width of the model, or the adapter's. By default the paper's for the
    model; 32 for tiny."""
    gradient_rank: int | None = None
    """Rank that gradnorm-lorp-adamw projects the gradients of the adapter's factors to, below
    --rank. By default a quarter of it."""
    alpha: float | None = None
    """An adapter of LoRA or DoRA is scaled by alpha / rank. By default the rank."""
    dropout: float | None = None
    """Share of the inputs that such an adapter does not see in training. By default 0."""
    restart_every: int | None = None
    """Steps after which relora and gradnorm-lorp merge their adapters and begin anew. By default a
    fifth of the steps; never, if as many as --steps."""
    restart_warmup: int | None = None
    """Steps over which the learning rate rises again then. By default a tenth of
    --restart-every."""
    update_proj_gap: int | None = None
    """Steps between two of GaLore's subspaces. By default 200; 500 for llama-7b, 100 for tiny."""
    scale: float | None = None
    """GaLore's scale of the projected update. By default 0.25."""
    side: Literal["smaller", "larger", "left", "right"] | None = None
    """Which side of a matrix GaLore projects: the smaller, as published, by default; larger takes
    the least memory."""
    moment_bits: int | None = None
    """Bits that the 8-bit optimizers and gradnorm-lorp-adamw hold a moment in, 8 or 4. By default 8
    with those, else those of --dtype."""
    projection_bits: int | None = None
    """Bits that a number of GaLore's bases is held in, 4 or 8. By default those of --dtype; 4 with
    q-galore-adamw8bit."""
    adaptive_refresh: bool | None = None
    """Look for new subspaces more rarely where they have stopped turning. By default with
    q-galore-adamw8bit."""
    weight_bits: int | None = None
    """Bits that q-galore-adamw8bit, or an adapter, holds the matrices of the layers in, 8 or 4 (NF4
    with an adapter). By default 8 with q-galore-adamw8bit, 4 with qlora, else those of --dtype."""
    embedding_bits: int | None = None
    """Bits that q-galore-adamw8bit holds embedding and head in, 8 or 4. By default those of
    --dtype."""
    stochastic_rounding: bool | None = None
    """Round new weights up or down at random, such that no update is lost in the mean, where they
    have less bits than float32. By default with q-galore-adamw8bit."""
    learning_rate: float | None = None
    """Peak learning rate. By default the paper's for GaLore (tiny: 0.02), 0.001 or 0.0005 for
    others."""
    weight_decay: float | None = None
    """Decoupled weight decay of AdamW, times the learning rate. By default 0."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    steps: int | None = None
    """Updates of the weights. By default the paper's number for the model; 600 for tiny."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises; then a cosine takes it to a tenth. By default a
    tenth of the steps."""
    batch_size: int | None = None
    """Sequences in a step, over all devices and microbatches. By default the paper's 512; 16 for
    tiny."""
    accumulate: int | None = None
    """Microbatches that a step's batch is cut into, one after the other, to save memory. By default
    so many that none has more than 16 sequences of llama-7b, llama-1b, 32, 64 and 128 of the
    smaller ones."""
    accumulate_in_subspace: bool = False
    """Sum the microbatches' gradients in GaLore's subspace, a fraction of their size, where they
    are clipped by their norm there; a new subspace is found from the first microbatch. Of
    --layerwise this is about the layers."""
    seq_len: int | None = None
    """Tokens in a sequence. By default the paper's 256; 128 for tiny."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights, optimizer state and computation. With bfloat16 a change smaller than a 512th of a
    weight is lost, and AdamW's second moments hardly ever fall. By default float32; bfloat16 for
    llama-7b."""
    rematerialize: bool | None = None
    """Compute activations again in the backward pass instead of keeping them. By default for
    llama-7b."""
    layerwise: bool = False
    """Update each layer as soon as the backward pass has its gradient: one layer's is in memory at
    a time."""
    clip: Literal["exact", "previous"] | None = None
    """By which norm --layerwise clips: its own, for which there is a second backward pass, or that
    of the step before. By default exact; previous with --accumulate-in-subspace, which leaves no
    choice."""
    mesh: str | None = None
    """Devices, such as data=2,fsdp=4 (axes: data, fsdp, tensor). By default one device."""
    deterministic: bool = False
    """Only operations that give the same bits each time, on a GPU too."""
    eval_every: int | None = None
    """Steps between two evaluations. By default a tenth of the steps."""
    eval_tokens: int | None = None
    """Validation tokens to evaluate on. By default all; 10 million of C4."""
    save_every: int | None = None
    """Steps between two checkpoints; none is saved while steps are skipped. By default as
    --eval-every; the best is chosen among checkpoints of steps that are evaluated."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best."""
    log_every: int | None = None
    """Steps between two lines on the screen; metrics.jsonl has every step. By default a fiftieth
    of the steps."""
    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite, after which the run stops."""
    workers: int = 0
    """Processes that read and tokenize. 0: the training process does it."""
    prompt: str = "The "
    """Begins the text that is sampled at the end."""
    seed: int = 0
    """Of the weights, the order of the data and GaLore's random choices."""
    out: str | None = None
    """Folder of the run. By default runs/MODEL-OPTIMIZER, with an --adapter in the middle; with
    --resume that of --config."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; begin where there is none yet."""
    config: str | None = None
    """A config.json to take the settings from; other flags override it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved(Pretrain):
    """Settings with nothing left open but what the optimizer or the data has no use for."""

    learning_rate: float
    steps: int
    warmup_steps: int
    batch_size: int
    accumulate: int
    seq_len: int
    dtype: Literal["float32", "bfloat16"]
    rematerialize: bool
    eval_every: int
    save_every: int
    log_every: int
    clip: Literal["exact", "previous"]
    out: str


# What each model's flags default to. GaLore's and Q-GaLore's rank, gap and learning rate, steps,
# batch and length: papers.md; AdamW's learning rates and all of `tiny` are ours.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "tiny": dict(
        rank=32, update_proj_gap=100, galore=0.02, q_galore=0.02, full=0.001,
        steps=600, batch_size=16, seq_len=128, microbatch=None,
    ),
    "llama-60m": dict(rank=128, q_galore=0.015, steps=10_000, microbatch=128),
    "llama-130m": dict(rank=256, q_galore=0.015, steps=20_000, microbatch=64),
    "llama-350m": dict(rank=256, steps=60_000, microbatch=32),
    "llama-1b": dict(rank=512, steps=100_000, microbatch=16, full=0.0005),
    "llama-7b": dict(
        rank=1024, update_proj_gap=500, galore=0.005, q_galore=0.004, full=0.0005,
        steps=150_000, microbatch=16, dtype="bfloat16", rematerialize=True,
    ),
}  # fmt: skip
PAPER = dict(
    update_proj_gap=200, scale=0.25, galore=0.01, q_galore=0.01, full=0.001,
    batch_size=512, microbatch=None, seq_len=256, dtype="float32", rematerialize=False,
)  # fmt: skip

# How a run is invoked, not what it is: these are not in config.json.
NOT_STORED = ("out", "resume", "config")
# What a resumed run may change: none of it changes the updates but by rounding.
MAY_CHANGE = (
    "data_dir", "mesh", "workers", "rematerialize", "deterministic",
    "save_every", "keep", "log_every", "max_skipped", "prompt",
)  # fmt: skip


def resolve(config: Pretrain) -> Resolved:
    """Fills in what was left open, and checks every value that can be checked without the data.

    Raises:
        ValueError: names the flag, its value and what is accepted.
    """
    from models.llama.config import SIZES

    _check_types(config)
    recipe = OPTIMIZERS[config.optimizer]
    config = _with_adapter(config)
    kind = ADAPTERS[config.adapter] if config.adapter else None
    listened = {*recipe.options, *(kind.options if kind else ())}
    options = {name for part in (OPTIMIZERS, ADAPTERS) for r in part.values() for name in r.options}
    for name in sorted(options - listened):
        if getattr(config, name) is not None:
            users = [n for n, r in OPTIMIZERS.items() if name in r.options]
            users += [f"--adapter {n}" for n, r in ADAPTERS.items() if name in r.options]
            raise ValueError(
                f"{flag(name)} {getattr(config, name)} is of no use to --optimizer "
                f"{config.optimizer}: leave it out (or None), or choose one of {', '.join(users)}"
            )
    defaults = {**PAPER, **DEFAULTS.get(config.model, {})}
    family = "galore" if "scale" in recipe.options else "full"
    if "weight_bits" in recipe.options:
        family = "q_galore"
    defaults["learning_rate"] = defaults[family]
    for name in options - listened:
        defaults.pop(name, None)
    config = _fill(config, {**defaults, **recipe.defaults, **(kind.defaults if kind else {})})
    steps, batch = config.steps or 0, config.batch_size or 0
    most = min(int(defaults["microbatch"] or batch), batch)
    parts = (batch // n for n in range(most, 0, -1) if batch % n == 0)
    config = _fill(config, {"accumulate": next(parts, 1)})
    if "gradient_rank" in listened:
        config = _fill(config, {"gradient_rank": max(1, (config.rank or 0) // 4)})
    if "restart_every" in listened:
        config = _fill(config, {"restart_every": max(1, steps // 5)})
        config = _fill(config, {"restart_warmup": (config.restart_every or 0) // 10})
    config = _fill(
        config,
        {
            "warmup_steps": steps // 10,
            "clip": "previous" if config.layerwise and config.accumulate_in_subspace else "exact",
            "eval_every": max(1, steps // 10),
            "log_every": max(1, steps // 50),
            "eval_tokens": 10_000_000 if config.data == "c4" else None,
            "out": _default_out(config),
        },
    )
    config = _fill(config, {"save_every": config.eval_every})
    resolved = Resolved(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    _check_values(resolved)
    _check_model(resolved, SIZES[config.model])
    if config.data == "c4" and config.data_dir is None:
        raise ValueError(
            "--data c4 needs --data-dir, the folder of the data set: "
            "`python -m train.prepare_c4` writes one; --data builtin needs nothing"
        )
    if config.data == "builtin" and config.data_dir is not None:
        raise ValueError("--data-dir is of no use to --data builtin: leave it out, or --data c4")
    files = {name: getattr(config, name) for name in ("data_dir", "tokenizer")}
    return dataclasses.replace(
        resolved,  # absolute, so that a run can be resumed from another folder
        **{k: os.path.abspath(v) for k, v in files.items() if v is not None and v != "bytes"},
    )


def _with_adapter(config: Pretrain) -> Pretrain:
    """The settings with the adapter that comes with the optimizer's name."""
    own = OPTIMIZERS[config.optimizer].adapter
    if config.adapter in (None, own):
        return dataclasses.replace(config, adapter=own)  # pyrefly: ignore[bad-argument-type]
    has_rank = "rank" in OPTIMIZERS[config.optimizer].options
    if own is not None or has_rank:
        others = [n for n, r in OPTIMIZERS.items() if not (r.adapter or "rank" in r.options)]
        raise ValueError(
            f"--adapter {config.adapter}: --optimizer {config.optimizer} has "
            f"{'a rank' if has_rank else 'an adapter'} of its own; choose one of "
            f"{', '.join(others)}, or leave --adapter out"
        )
    return config


def flag(name: str) -> str:
    """A field's name as it is typed: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def to_json(config: Resolved) -> dict[str, Any]:
    """What config.json holds."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in NOT_STORED}


def load(path: str | os.PathLike[str]) -> Pretrain:
    """Reads a config.json.

    Raises:
        ValueError: if it is not one, or cannot be read.
    """
    try:
        fields = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"--config {path}: {error.strerror}; give the config.json of a run's folder"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    known = {f.name for f in dataclasses.fields(Pretrain)} - set(NOT_STORED)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a config.json of train.pretrain: it holds no object")
    if unknown := ", ".join(sorted(set(fields) - known)):
        raise ValueError(f"{path} is not a config.json of train.pretrain: unknown {unknown}")
    config = Pretrain(**fields)
    _check_types(config)
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What keeps `new` from going on where `old` stopped, a phrase for each field."""
    return [
        f"{flag(name)} {old.get(name)} (now {new.get(name)})"
        for name in sorted({*old, *new} - set(MAY_CHANGE))
        if old.get(name) != new.get(name)
    ]


def _default_out(config: Pretrain) -> str:
    if config.resume and config.config is not None:
        return os.path.dirname(config.config) or "."
    named = config.adapter != OPTIMIZERS[config.optimizer].adapter
    parts = [config.model, *([config.adapter] if named and config.adapter else [])]
    return os.path.join("runs", "-".join([*parts, config.optimizer]))


def _fill(config: Pretrain, defaults: Mapping[str, Any]) -> Pretrain:
    names = {f.name for f in dataclasses.fields(config)} & set(defaults)
    return dataclasses.replace(
        config, **{name: defaults[name] for name in names if getattr(config, name) is None}
    )


def _check_types(config: Pretrain) -> None:
    """A config.json and Python callers can say anything; tyro has checked the command line."""
    from models.llama.config import SIZES

    for name, hint in get_type_hints(Pretrain).items():
        value = getattr(config, name)
        accepted = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
        if get_origin(accepted[0]) is Literal:
            choices = get_args(accepted[0])
            if name == "model":  # a program may have added sizes of its own
                choices = tuple({**dict.fromkeys(choices), **SIZES})
            if value not in choices and not (value is None and type(None) in accepted):
                raise ValueError(f"{flag(name)} {value!r}: choose one of {', '.join(choices)}")
            continue
        fits = type(value) in accepted or (type(value) is int and float in accepted)
        if not fits:
            kinds = " or ".join("null" if t is type(None) else t.__name__ for t in accepted)
            raise ValueError(f"{flag(name)} {value!r}: expected {kinds}")


def _check_values(config: Resolved) -> None:
    at_least = {
        "rank": 1, "update_proj_gap": 1, "steps": 1, "warmup_steps": 0, "batch_size": 1,
        "accumulate": 1, "seq_len": 1, "eval_every": 1, "eval_tokens": 1, "save_every": 1,
        "keep": 1, "log_every": 1, "max_skipped": 1, "workers": 0, "seed": 0,
        "gradient_rank": 1, "restart_every": 1, "restart_warmup": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{flag(name)} {value}: expected {least} or more")
        limit = 32 if name == "seed" else 31  # unsigned; the others are, or count in, int32
        if value is not None and value >= 2**limit:
            raise ValueError(f"{flag(name)} {value}: expected less than 2**{limit}")
    for name in ("scale", "learning_rate", "clip_norm", "alpha"):
        value = getattr(config, name)
        if value is not None and not _SMALLEST <= value <= _LARGEST:
            raise ValueError(
                f"{flag(name)} {value}: expected a positive number, {_SMALLEST:.1e} to "
                f"{_LARGEST:.1e}"
            )
    for name in ("moment_bits", "projection_bits", "weight_bits", "embedding_bits"):
        value = getattr(config, name)
        if value not in (None, 4, 8):
            raise ValueError(f"{flag(name)} {value}: choose 4 or 8")
    held = config.weight_bits is not None and config.adapter is None
    if config.stochastic_rounding and config.dtype == "float32" and not held:
        raise ValueError(
            "--stochastic-rounding: float32 weights need no rounding; leave it out, or choose "
            "--dtype bfloat16"
        )
    if config.dropout is not None and not 0 <= config.dropout < 1:
        raise ValueError(f"--dropout {config.dropout}: expected a share from 0 to below 1")
    try:
        re.compile(config.adapter_pattern or "")
    except (re.error, OverflowError) as error:
        raise ValueError(
            f"--adapter-pattern {config.adapter_pattern}: {error}; expected a regular expression, "
            "such as query|value"
        ) from None
    gradient_rank, rank = config.gradient_rank, config.rank
    if gradient_rank is not None and rank is not None and gradient_rank >= rank:
        raise ValueError(
            f"--gradient-rank {gradient_rank}: expected less than --rank {rank}, the adapter's"
        )
    every, warmup = config.restart_every, config.restart_warmup
    if every is not None and config.weight_bits == 4:
        raise ValueError(
            f"--weight-bits 4 with --adapter {config.adapter}: merged into so few bits at a "
            "restart, what was learnt would be lost; choose 8, or leave it out"
        )
    if every is not None and warmup is not None and warmup >= every:
        raise ValueError(
            f"--restart-warmup {warmup}: expected fewer steps than --restart-every {every}"
        )
    decay = config.weight_decay
    if decay is not None and not 0 <= decay <= _LARGEST:
        raise ValueError(f"--weight-decay {decay}: expected 0 or more, {_LARGEST:.1e} at most")
    if config.layerwise and config.adapter is not None:
        raise ValueError(
            f"--layerwise is of no use with --adapter {config.adapter}: adapters' gradients are "
            "small, and frozen weights have none"
        )
    if config.clip != "exact" and not config.layerwise:
        raise ValueError(
            f"--clip {config.clip} is of use with --layerwise only; any other step clips exactly"
        )
    if config.accumulate_in_subspace and "scale" not in OPTIMIZERS[config.optimizer].options:
        users = ", ".join(n for n, r in OPTIMIZERS.items() if "scale" in r.options)
        raise ValueError(
            f"--accumulate-in-subspace: --optimizer {config.optimizer} has no subspace; leave it "
            f"out, or choose one of {users}"
        )
    if config.clip == "exact" and config.layerwise and config.accumulate_in_subspace:
        raise ValueError(
            "--clip exact with --layerwise --accumulate-in-subspace: the norm of what is summed is "
            "not known before the new subspaces are; choose previous, or leave one of them out"
        )
    if config.warmup_steps >= config.steps:
        raise ValueError(
            f"--warmup-steps {config.warmup_steps}: expected fewer than --steps {config.steps}"
        )


def _check_model(config: Resolved, size: "LlamaConfig") -> None:
    from models.llama.axes import smaller_sides

    if config.seq_len > size.max_length:
        raise ValueError(
            f"--seq-len {config.seq_len}: {config.model} takes at most {size.max_length} tokens"
        )
    if config.rank is None:
        return
    sides = smaller_sides(size)
    if config.adapter is None and config.rank >= max(sides):
        raise ValueError(
            f"--rank {config.rank}: a rank of {max(sides)} or more compresses no matrix of "
            f"{config.model}; choose at most {max(sides) - 1}, or an --optimizer without rank"
        )
    if config.adapter is not None and config.rank > min(sides):
        raise ValueError(
            f"--rank {config.rank}: an adapter's rank is at most the smaller side of a matrix, "
            f"{min(sides)} in {config.model}"
        )
