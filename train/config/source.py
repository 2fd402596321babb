"""Which model a run trains: a size by its name, of a config.json, or of the weights in --init."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.hugging_face.files import read_json
from models.hugging_face.llama_config import from_theirs, to_theirs
from models.llama.config import SIZES, LlamaConfig, TokenIds
from train.config.settings import HISTORY, Pretrain, ResolvedText, read_fields


class _Folder(NamedTuple):
    """What a folder of --init says of the model in it."""

    model: str  # a name in SIZES, or the path of a config.json of transformers
    tokenizer: str | None
    end_token: str | None


def with_model(config: Pretrain) -> Pretrain:
    """Fills in the model and the tokenizer, from --init where it is given, with absolute paths.

    ValueError if --init is no folder with a model, or if --model has other sizes.
    """
    model, tokenizer, end_token = config.model, config.tokenizer, config.end_token
    if model is not None and model not in SIZES:
        model = os.path.abspath(model)
        if not os.path.isfile(model):
            raise ValueError(f"--model {model}: there is no such file")
    if config.init is not None:
        config = dataclasses.replace(config, init=os.path.abspath(config.init))
    # A resumed run has its own copies, and weights in its checkpoints: --init may be gone.
    resumed = config.resume and config.config is not None
    if config.init is not None and not (resumed and model is not None and tokenizer is not None):
        found = _folder(Path(str(config.init)))
        if model is None:
            model = found.model
        _check_same(config, model, found.model)
        if tokenizer is None:
            tokenizer, end_token = found.tokenizer, end_token or found.end_token
        if tokenizer is None:
            raise ValueError(
                f"--init {config.init} has no tokenizer.json: give the model's with --tokenizer"
            )
    model, tokenizer = model or "tiny", tokenizer or "bytes"
    # Absolute, so that a run can be resumed from another folder.
    tokenizer = tokenizer if tokenizer == "bytes" else os.path.abspath(tokenizer)
    return dataclasses.replace(config, model=model, tokenizer=tokenizer, end_token=end_token)


def is_run(folder: str) -> bool:
    """Whether a folder is a run of this trainer; False: a model of transformers.

    ValueError if it is neither.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"--init {folder} has no config.json: name a folder with a model")
    content = read_json(path)
    if "model_type" not in content and "optimizer" not in content:
        raise ValueError(
            f"--init {folder}: its config.json is neither transformers' (no model_type) nor a "
            "run's (no optimizer); name a folder with a model"
        )
    return "model_type" not in content


def check_command(fields: Mapping[str, Any], path: str | os.PathLike[str], command: str) -> None:
    """Raises ValueError if a config.json is transformers', or of a run of another command."""
    if "model_type" in fields:
        said = f"{Path(path).parent} is a model of transformers, not a run"
        raise ValueError(f"{said}: give it to a command with --init")
    begun = Pretrain.command if "optimizer" in fields else command
    found = fields.get("command", "train.finetune" if "task" in fields else begun)
    if found != command:
        said = f"{path} is of a run of {found}, not of {command}"
        raise ValueError(f"{said}; `python -m {found} --resume` goes on with it")


def sizes(config: Pretrain | ResolvedText) -> tuple[LlamaConfig, bool]:
    """Returns the sizes of a run's model, and whether they include its vocabulary.

    A preset leaves the vocabulary to the tokenizer.
    """
    model = config.model or "tiny"
    return _read(model), model not in SIZES


def with_file(config: Pretrain) -> Pretrain:
    """Has the config.json of transformers in --init say the sizes, if a preset's name did."""
    resumed = config.resume and config.config is not None
    if config.init is None or config.model not in SIZES or resumed or is_run(config.init):
        return config
    return dataclasses.replace(config, model=os.path.join(config.init, "config.json"))


def made_of(config: Pretrain | ResolvedText, model: LlamaConfig) -> dict[str, Any]:
    """What a checkpoint must agree with besides the settings: sizes that these name by a file."""
    known = config.init is None and config.model in SIZES
    sizes = dataclasses.replace(model, token_ids=TokenIds())
    return {} if known else {"sizes of the model": to_theirs(sizes)}


def short_name(model: str | None) -> str:
    """The name of a model: of a config.json, that of its folder."""
    if model is None or model in SIZES:
        return model or "tiny"
    path = Path(model).absolute()
    return path.parent.name if path.name == "config.json" else path.stem


def _folder(folder: Path) -> _Folder:
    if not is_run(str(folder)):
        tokenizer = folder / "tokenizer.json"
        beside = str(tokenizer) if tokenizer.is_file() else None
        return _Folder(str(folder / "config.json"), beside, None)
    run = read_settings(folder / "config.json")
    if "command" not in run:  # train.finetune_lm has one
        check_command(run, folder / "config.json", Pretrain.command)
    return _Folder(run["model"], run["tokenizer"], run.get("end_token"))


def chat_template_of(init: str) -> str | None:
    """The chat template that the run in a folder was given; None of a model of transformers."""
    if not is_run(init):
        return None
    return read_settings(Path(init) / "config.json").get("chat_template")


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a run's config.json, without their history; see `with_copies`."""
    fields = with_copies(Path(path).parent, read_fields(path))
    return {name: value for name, value in fields.items() if name != HISTORY}


def with_copies(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, with the copies in its folder as the paths of what it needs."""
    if not isinstance(fields.get("model"), str | None):
        raise ValueError(f"{folder / 'config.json'}: model={fields['model']!r} must be a string")
    own = {
        name: folder / name / Path(str(fields.get(name))).name
        for name in ("tokenizer", "chat_template")
    }
    own["model"] = folder / "model" / f"{short_name(fields.get('model'))}.json"
    return {**fields, **{k: str(path.absolute()) for k, path in own.items() if path.is_file()}}


def _check_same(config: Pretrain, model: str, found: str) -> None:
    """Raises ValueError if --model and --init have other sizes."""
    ours, theirs = dataclasses.asdict(_read(model)), dataclasses.asdict(_read(found))
    for name, value in ours.items():
        # A preset's vocabulary is the tokenizer's.
        free = (name == "vocab_size" and (model in SIZES or found in SIZES)) or name == "token_ids"
        if value != theirs[name] and not free:
            raise ValueError(
                f"--model {config.model} has {name}={value}, but the model in --init "
                f"{config.init} has {name}={theirs[name]}: leave --model out"
            )


def _read(model: str) -> LlamaConfig:
    """The sizes of a name in SIZES or of a config.json."""
    return SIZES[model] if model in SIZES else from_theirs(read_json(Path(model)), {})
