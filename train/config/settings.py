"""The settings of a pre-training run, and its config.json."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

from models.hugging_face.files import without_duplicates
from train.config.flags import HostFlags, LayerwiseFlags, TrainingFlags
from train.config.text_flags import OwnTextFlags, SampleFlags, TextFlags, TextRunFlags

# How a run is started, not what it is: these are not in config.json. The steps say the epochs.
NOT_STORED = (
    "out", "resume", "config", "epochs", "processes", "process", "coordinator", "launcher",
    "profile",
)  # fmt: skip
# In config.json beside the settings: a list of what was changed when the run was resumed.
HISTORY = "history"


@dataclasses.dataclass(frozen=True)
class Pretrain(SampleFlags, TextRunFlags, LayerwiseFlags, HostFlags, TrainingFlags, TextFlags):
    """Pre-train a LLaMA. Without any flag: `tiny` with GaLore on text that ships with Python."""

    command = "train.pretrain"
    less_memory = (
        "try a smaller --batch-size or a larger --accumulate, a shorter --seq-len, --layerwise, "
        "--rematerialize, --dtype bfloat16, an 8-bit --optimizer or a smaller --model"
    )


@dataclasses.dataclass(frozen=True)
class FinetuneLM(SampleFlags, LayerwiseFlags, HostFlags, TrainingFlags, OwnTextFlags):
    """Fine-tune a LLaMA on your own text, on prompts with completions, or on chats.

    Of prompts and chats only the answers are learnt.
    """

    rank: int | None = None
    """Rank of GaLore, below the width of the model, or of the adapter. Default: a quarter of the
    width; 16 for an adapter."""
    scale: float | None = None
    """Factor of projected updates and of racs. Default: 2, or as published for the optimizer."""
    update_proj_gap: int | None = None
    """Steps between two refreshes of GaLore's subspaces. Default: 200."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 2e-5, with an adapter 2e-4; none for optimizers that are
    published for pre-training alone."""
    steps: int | None = None
    """Updates of the weights. Default: as many as --epochs take."""
    batch_size: int | None = None
    """Rows per step, over all devices and microbatches. Default: 16."""
    accumulate: int | None = None
    """Microbatches into which a step's batch is cut to save memory. Default: the fewest of at most
    4 rows."""
    seq_len: int | None = None
    """Tokens per row. Default: 512, or as many as the model takes."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the computation, and by default of weights, gradients and GaLore's bases. Default:
    float32."""
    train: str | None = None
    """Regular expression for the paths of the params that are trained besides adapters, such as
    layers|norm; paths are like layers/mlp/up, where all layers are one array. Default: all; with an
    adapter none."""

    command = "train.finetune_lm"
    less_memory = (
        "try a smaller --batch-size or a larger --accumulate, a shorter --seq-len, --layerwise, "
        "--rematerialize, --dtype bfloat16, or an 8-bit --optimizer or one with an adapter"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedTraining(TrainingFlags):
    """Settings with defaults filled in: None only where the optimizer or the data have no use."""

    learning_rate: float
    steps: int
    warmup_steps: int
    batch_size: int
    accumulate: int
    seq_len: int
    dtype: Literal["float32", "bfloat16"]
    weight_dtype: Literal["float32", "bfloat16"]
    rematerialize: bool
    eval_every: int
    save_every: int
    log_every: int
    out: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved(ResolvedTraining, Pretrain):
    """Settings of a pre-training with defaults filled in."""

    model: str
    tokenizer: str
    data_parts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedFinetuneLM(ResolvedTraining, FinetuneLM):
    """Settings of a fine-tuning of a language model with defaults filled in."""

    init: str
    model: str
    tokenizer: str


ResolvedText = Resolved | ResolvedFinetuneLM


def expand_home(config: Any) -> Any:
    """A command's settings with ~ in the fields of paths as the home folder.

    ValueError for an empty path, as of a shell's variable that is not set, and for one that is not
    UTF-8, of which Orbax and `tokenizers` can read and write no file.
    """
    own = {name: getattr(config, name, None) for name in _PATHS}
    for name, value in own.items():
        for path in value if isinstance(value, tuple) else [value]:
            if path == "":
                raise ValueError(f"{flag(name)} is empty: name a file or a folder, or leave it out")
            if path is not None and str(path) != str(path).encode(errors="replace").decode():
                raise ValueError(f"{flag(name)} {path!r} is not text in UTF-8: rename it")
    paths = {name: os.path.expanduser(p) for name, p in own.items() if isinstance(p, str)}
    files = {
        name: tuple(map(os.path.expanduser, p)) for name, p in own.items() if isinstance(p, tuple)
    }
    return dataclasses.replace(config, **paths, **files)


# Fields of any command that name a file or a folder.
_PATHS = (
    "model",
    "data_dir",
    "tokenizer",
    "out",
    "config",
    "init",
    "run",
    "gpu",
    "dump",
    "plot",
    "data",
    "eval_data",
    "chat_template",
)


def flag(name: str) -> str:
    """A field's name as typed on the command line: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


def to_json(config: TrainingFlags) -> dict[str, Any]:
    """The content of config.json."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_STORED}
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    named = {"command": config.command} if isinstance(config, FinetuneLM) else {}
    return named | fields


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the fields of a config.json; raises ValueError if it cannot be read as one."""
    try:
        fields = json.loads(Path(path).read_text("utf-8"), object_pairs_hook=without_duplicates)
    except OSError as error:
        advice = "give the config.json of a run's folder"
        raise ValueError(f"{path} cannot be read ({error.strerror}): {advice}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a config.json of train.pretrain: it holds no object")
    changes = fields.get(HISTORY, [])
    if not isinstance(changes, list) or not all(
        isinstance(x, dict) and isinstance(x.get("changed"), dict) and "step" in x for x in changes
    ):
        raise ValueError(f"{path}: {HISTORY} is not a list of what was changed: delete it")
    return fields
