"""The settings of a fine-tuning on GLUE, with the published ones of each task and method."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from models.encoder.config import EncoderConfig, weight_table
from models.hugging_face.files import read_json
from models.hugging_face.roberta import read_config
from models.hugging_face.roberta_config import from_theirs
from models.llama.axes import sides_in
from train.config import checks
from train.config.flags import TrainingFlags
from train.config.optimizers import OPTIMIZERS
from train.config.resolve import fill, fill_rest, with_options
from train.config.settings import ResolvedTraining, expand_home, flag
from train.config.source import is_run

# What a run keeps of the model that it begins with, besides the weights.
TOKENIZER = "tokenizer.json"
FILES = ("config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")

# More steps than any run has: one that is resumed may get more than it had.
NEVER = 2**31 - 1

GlueTask = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]


@dataclasses.dataclass(frozen=True)
class GlueFlags:
    """Task and data."""

    task: GlueTask | None = None
    """Task of GLUE. Required."""
    data_dir: str | None = None
    """Folder of TFDS' data sets, with glue/mrpc in it, or of the official TSV files, with
    MRPC/train.tsv. Required."""
    init: str | None = None
    """Folder of transformers with the weights to begin with and their tokenizer.json: a RoBERTa or
    a BERT. Required."""
    epochs: int | None = None
    """Passes over the training data. Default: 30, as published; no use with --steps."""


@dataclasses.dataclass(frozen=True)
class Finetune(TrainingFlags, GlueFlags):
    """Fine-tune a RoBERTa or BERT on a task of GLUE, with the published settings."""

    command = "train.finetune"
    less_memory = (
        "try a larger --accumulate, a shorter --seq-len, --rematerialize, --dtype bfloat16 or an "
        "8-bit --optimizer"
    )
    train: str | None = None
    """Regular expression for the paths of the params that are trained besides adapters, such as
    layers|norm. Default: all; with an adapter pooler|classifier."""
    rank: int | None = None
    """Rank of GaLore, or of the adapter. Default: 8, of the two published ones."""
    update_proj_gap: int | None = None
    """Steps between two refreshes of GaLore's subspaces. Default: 500, as published."""
    scale: float | None = None
    """Factor of GaLore's projected updates. Default: 16 / --rank, as published for 4 and 8."""
    restart_every: int | None = None
    """Steps between two restarts of relora and gradnorm-lorp: adapters are merged and reset.
    Default: a fifth of --steps for relora; never for gradnorm-lorp."""
    learning_rate: float | None = None
    """Peak learning rate. Default: as published for GaLore with this task and rank; 2e-5 for AdamW
    and Adafactor; 4e-4 for adapters; none for optimizers that are published for pre-training."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "linear"
    """Learning rate after the warm-up: a line or a cosine down to --floor, constant, or constant
    with a line down to --floor in the last --decay-steps (wsd)."""
    floor: float | None = None
    """Share of --learning-rate with which --schedule ends. Default: 0."""
    steps: int | None = None
    """Updates of the weights. Default: those of --epochs."""
    batch_size: int | None = None
    """Examples per step. Default: 16, and 32 for CoLA, as published."""
    accumulate: int | None = None
    """Microbatches into which a step's batch is cut to save memory. Default: 1."""
    seq_len: int | None = None
    """Most tokens of an example; longer ones are truncated. Default: 512, as published, or what the
    model takes. A batch is padded to its own longest example."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the computation, and by default of weights, gradients and GaLore's bases. Default:
    float32."""
    state_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of moments that are not quantized. In bfloat16, as published with bfloat16 weights,
    second moments hardly ever fall. Default: float32."""
    rematerialize: bool | None = None
    """Recompute activations in the backward pass instead of storing them. Default: no."""
    eval_every: int | None = None
    """Steps between two evaluations. Default: an epoch's."""
    save_every: int | None = None
    """Steps between two checkpoints; none is saved while steps are skipped. Default: --eval-every.
    The best by the task's metric is chosen among those whose step is evaluated."""
    out: str | None = None
    """Folder of the run. Default: runs/TASK-OPTIMIZER, or runs/TASK-ADAPTER-OPTIMIZER with an
    --adapter; with --resume that of --config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedFinetune(ResolvedTraining, Finetune):
    """Settings of a fine-tuning with defaults filled in."""

    task: GlueTask
    data_dir: str
    init: str


# GaLore, arXiv:2403.03507, table 4's settings: learning rates by rank and task.
_RATES: Mapping[int, Mapping[str, float]] = {
    4: dict.fromkeys(get_args(GlueTask), 1e-5) | {"mrpc": 3e-5, "cola": 3e-5},
    8: {
        "mnli": 1e-5, "cola": 1e-5, "qnli": 1e-5, "stsb": 3e-5,
        "sst2": 2e-5, "mrpc": 2e-5, "qqp": 2e-5, "rte": 2e-5,
        "wnli": 2e-5,  # not published: as the other small tasks
    },
}  # fmt: skip


def resolve(config: Finetune, examples: int) -> ResolvedFinetune:
    """Fills in the defaults for a number of training examples, and checks each value."""
    checks.check_types(config)
    config = expand_home(config)
    check_given(config)
    resolved = resolve_for(config, examples, read_model(config))
    # Absolute, so that a run can be resumed from another folder.
    paths = {name: os.path.abspath(getattr(resolved, name)) for name in ("data_dir", "init")}
    return dataclasses.replace(resolved, **paths)


def resolve_for(config: Finetune, examples: int, model: EncoderConfig) -> ResolvedFinetune:
    """The same for a model, whose weights and data need not be there."""
    checks.check_types(config)
    checks.check_adapter(config)
    config, options = with_options(config)
    checks.check_rate_of_fine_tuning(config)

    row = defaults_of(config, model.max_length)
    config = fill(config, options, row)
    epoch = -(-examples // max(1, config.batch_size or 1))
    if config.steps is not None and config.epochs is not None:
        said = f"--steps {config.steps} says how long to train"
        raise ValueError(f"--epochs {config.epochs} has no effect: {said}; leave one of them out")
    epochs = 30 if config.epochs is None else config.epochs
    if epochs < 1:
        raise ValueError(f"--epochs {config.epochs}: expected 1 or more")
    steps = epochs * epoch if config.steps is None else config.steps
    others: dict[str, Any] = {
        "steps": steps,
        "eval_every": max(1, min(epoch, steps)),
        "accumulate": 1,
        "floor": None if config.schedule == "constant" else 0.0,
        "out": glue_folder(config),
    }
    if config.resume and config.config is not None:
        others["out"] = os.path.dirname(config.config) or "."
    missing = {name: x for name, x in others.items() if getattr(config, name) is None}
    # In config.json the steps say it, and a run is resumed by either flag.
    config = dataclasses.replace(config, **missing, epochs=None)
    config = fill_rest(config, options, row["adamw_state"])
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    resolved = ResolvedFinetune(**values)
    name = Path(config.init or "the model").name
    checks.check_training(resolved, sides_in(weight_table(model)), model.max_length, name)
    return resolved


def glue_folder(config: Finetune) -> str:
    """The folder of a run without --out."""
    named = config.adapter != OPTIMIZERS[config.optimizer].adapter
    adapter = [config.adapter] if named and config.adapter else []
    return os.path.join("runs", "-".join([str(config.task), *adapter, config.optimizer]))


def check_given(config: Finetune) -> None:
    """Raises ValueError if a setting is missing that has no default, or its folder is."""
    if config.task is None:
        raise ValueError(f"--task is missing: choose one of {', '.join(get_args(GlueTask))}")
    for name, what in (
        ("data_dir", "the folder of the task's data"),
        ("init", "a folder of transformers with a RoBERTa or BERT"),
    ):
        folder = getattr(config, name)
        if folder is None:
            raise ValueError(f"{flag(name)} is missing: give {what}")
        own = name == "init" and model_folder(config) != Path(folder)
        if not own and not os.path.isdir(folder):
            raise ValueError(f"{flag(name)} {folder}: there is no such folder; give {what}")
        if name == "init" and not own and is_run(folder):
            said = f"--init {folder} is a run: write its model with `python -m train.export`"
            raise ValueError(f"{said}, and give that folder")


def model_folder(config: Finetune) -> Path:
    """The folder with the model's sizes and its tokenizer: the run's own copy, or --init."""
    folder = os.path.dirname(config.config) if config.resume and config.config else None
    if config.out is None and folder is None:
        return Path(str(config.init))  # a `model` in the working directory is no run's
    own = Path(config.out or folder or ".") / "model"
    return own if (own / FILES[0]).is_file() else Path(str(config.init))


def read_model(config: Finetune) -> EncoderConfig:
    """The model that a run begins with; a run's own copy has its sizes alone."""
    folder = model_folder(config)
    if folder == Path(str(config.init)):
        return read_config(folder)
    return from_theirs(read_json(folder / FILES[0]), {})


def defaults_of(config: Finetune, max_length: int) -> dict[str, Any]:
    """The row of defaults for the task, the optimizer and the rank."""
    rank = 8 if config.rank is None else config.rank
    task, adapter = str(config.task), config.adapter is not None
    galore = _RATES[4 if rank <= 4 else 8][task]
    rates = {"galore": galore, "q_galore": galore, "full": 2e-5}
    if adapter:
        rates = dict.fromkeys(rates, 4e-4)
    return rates | {
        "rank": rank,
        "scale": 16 / max(1, rank),
        "update_proj_gap": 500,
        "batch_size": 32 if task == "cola" else 16,
        "seq_len": min(512, max_length),
        "dtype": "float32",
        "rematerialize": False,
        "adamw_state": "float32",
        **({"train": "pooler|classifier"} if adapter else {}),
        **({"restart_every": NEVER} if config.adapter == "gradnorm-lorp" else {}),
    }
