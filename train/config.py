"""Settings of a pre-training run: the flags, their defaults by model, and what is accepted."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from train.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from models.llama_config import LlamaConfig

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
    optimizer: Literal["adamw", "adafactor", "galore-adamw", "galore-adafactor"] = "galore-adamw"
    """What updates the weights."""
    rank: int | None = None
    """GaLore's rank, below the width of the model. By default the paper's for the model; 32 for
    tiny."""
    update_proj_gap: int | None = None
    """Steps between two of GaLore's subspaces. By default 200; 500 for llama-7b, 100 for tiny."""
    scale: float | None = None
    """GaLore's scale of the projected update. By default 0.25."""
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
    """Microbatches that a step's batch is cut into, one after the other, to save memory."""
    seq_len: int | None = None
    """Tokens in a sequence. By default the paper's 256; 128 for tiny."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, optimizer state and computation. With bfloat16 a change smaller than a 512th of a
    weight is lost, and AdamW's second moments hardly ever fall."""
    rematerialize: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    layerwise: bool = False
    """Update each layer as soon as the backward pass has its gradient: one layer's is in memory at
    a time."""
    clip: Literal["exact", "previous"] = "exact"
    """By which norm --layerwise clips: its own, for which there is a second backward pass, or that
    of the step before."""
    mesh: str | None = None
    """Devices, such as data=2,fsdp=4 (axes: data, fsdp, tensor). By default one device."""
    deterministic: bool = False
    """Only operations that give the same bits each time, on a GPU too."""
    eval_every: int | None = None
    """Steps between two evaluations. By default a tenth of the steps."""
    eval_tokens: int | None = None
    """Validation tokens to evaluate on. By default all; 10 million of C4."""
    save_every: int | None = None
    """Steps between two checkpoints. By default as --eval-every; the best is chosen among
    checkpoints of steps that are evaluated."""
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
    """Folder of the run. By default runs/MODEL-OPTIMIZER; with --resume that of --config."""
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
    eval_every: int
    save_every: int
    log_every: int
    out: str


# What each model's flags default to. GaLore's rank, gap and learning rate, and steps, batch and
# length: papers.md (GaLore, table 2 and recipe); AdamW's learning rates and all of `tiny` are ours.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "tiny": dict(
        rank=32, update_proj_gap=100, galore=0.02, full=0.001,
        steps=600, batch_size=16, seq_len=128, accumulate=1,
    ),
    "llama-60m": dict(rank=128, steps=10_000, accumulate=4),
    "llama-130m": dict(rank=256, steps=20_000, accumulate=8),
    "llama-350m": dict(rank=256, steps=60_000, accumulate=16),
    "llama-1b": dict(rank=512, steps=100_000, accumulate=32, full=0.0005),
    "llama-7b": dict(
        rank=1024, update_proj_gap=500, galore=0.005, full=0.0005, steps=150_000, accumulate=32
    ),
}  # fmt: skip
PAPER = dict(
    update_proj_gap=200, scale=0.25, galore=0.01, full=0.001,
    batch_size=512, accumulate=1, seq_len=256,
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
    from models.llama_config import SIZES

    _check_types(config)
    recipe = OPTIMIZERS[config.optimizer]
    for name in ("rank", "update_proj_gap", "scale", "weight_decay"):
        if getattr(config, name) is not None and name not in recipe.options:
            users = ", ".join(n for n, r in OPTIMIZERS.items() if name in r.options)
            raise ValueError(
                f"{flag(name)} {getattr(config, name)} is of no use to --optimizer "
                f"{config.optimizer}: leave it out (or None), or choose one of {users}"
            )
    defaults = {**PAPER, **DEFAULTS.get(config.model, {})}
    family = "galore" if "rank" in recipe.options else "full"
    defaults |= {"weight_decay": 0.0, "learning_rate": defaults[family]}
    for name in {"rank", "update_proj_gap", "scale", "weight_decay"} - set(recipe.options):
        defaults.pop(name, None)
    config = _fill(config, defaults)
    steps = config.steps or 0
    config = _fill(
        config,
        {
            "warmup_steps": steps // 10,
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
    return os.path.join("runs", f"{config.model}-{config.optimizer}")


def _fill(config: Pretrain, defaults: Mapping[str, Any]) -> Pretrain:
    names = {f.name for f in dataclasses.fields(config)} & set(defaults)
    return dataclasses.replace(
        config, **{name: defaults[name] for name in names if getattr(config, name) is None}
    )


def _check_types(config: Pretrain) -> None:
    """A config.json and Python callers can say anything; tyro has checked the command line."""
    from models.llama_config import SIZES

    for name, hint in get_type_hints(Pretrain).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            accepted = get_args(hint)
            if name == "model":  # a program may have added sizes of its own
                accepted = tuple({**dict.fromkeys(accepted), **SIZES})
            if value not in accepted:
                raise ValueError(f"{flag(name)} {value!r}: choose one of {', '.join(accepted)}")
            continue
        accepted = get_args(hint) or (hint,)
        fits = type(value) in accepted or (type(value) is int and float in accepted)
        if not fits:
            kinds = " or ".join("null" if t is type(None) else t.__name__ for t in accepted)
            raise ValueError(f"{flag(name)} {value!r}: expected {kinds}")


def _check_values(config: Resolved) -> None:
    at_least = {
        "rank": 1, "update_proj_gap": 1, "steps": 1, "warmup_steps": 0, "batch_size": 1,
        "accumulate": 1, "seq_len": 1, "eval_every": 1, "eval_tokens": 1, "save_every": 1,
        "keep": 1, "log_every": 1, "max_skipped": 1, "workers": 0, "seed": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{flag(name)} {value}: expected {least} or more")
        limit = 32 if name == "seed" else 31  # unsigned; the others are, or count in, int32
        if value is not None and value >= 2**limit:
            raise ValueError(f"{flag(name)} {value}: expected less than 2**{limit}")
    for name in ("scale", "learning_rate", "clip_norm"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{flag(name)} {value}: expected a positive number")
    decay = config.weight_decay
    if decay is not None and not (math.isfinite(decay) and decay >= 0):
        raise ValueError(f"--weight-decay {decay}: expected 0 or more")
    if config.clip != "exact" and not config.layerwise:
        raise ValueError(
            f"--clip {config.clip} is of use with --layerwise only; any other step clips exactly"
        )
    if config.warmup_steps >= config.steps:
        raise ValueError(
            f"--warmup-steps {config.warmup_steps}: expected fewer than --steps {config.steps}"
        )


def _check_model(config: Resolved, size: "LlamaConfig") -> None:
    from models.llama import largest_smaller_side

    if config.seq_len > size.max_length:
        raise ValueError(
            f"--seq-len {config.seq_len}: {config.model} takes at most {size.max_length} tokens"
        )
    side = largest_smaller_side(size)
    if config.rank is not None and config.rank >= side:
        raise ValueError(
            f"--rank {config.rank}: a rank of {side} or more compresses no matrix of "
            f"{config.model}; choose at most {side - 1}, or an --optimizer without rank"
        )
