"""Fills in and checks the settings of a fine-tuning of a language model."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, TypeVar

from models.llama.axes import smaller_sides
from train.config import checks
from train.config.defaults import FINETUNING
from train.config.resolve import (
    default_clip,
    default_out,
    fewest_parts,
    fill,
    fill_open,
    fill_rest,
    load,
    with_options,
)
from train.config.settings import (
    FinetuneLM,
    Pretrain,
    ResolvedFinetuneLM,
    expand_home,
)
from train.config.source import (
    chat_template_of,
    check_command,
    read_settings,
    sizes,
    with_model,
)
from train.config.weights import ADAPTERS_ONLY

Settings = TypeVar("Settings", bound=FinetuneLM)

# More steps than any that settings may say.
_MANY = 2**31 - 1


def resolve_finetuning(
    config: FinetuneLM, count_steps: Callable[[ResolvedFinetuneLM, float], int]
) -> ResolvedFinetuneLM:
    """Fills in the defaults, and checks each value that can be checked without the data.

    `count_steps` counts the steps of some epochs if the settings do not say them.
    """
    checks.check_types(config)
    config = expand_home(config)
    for name, what in (("init", "a folder with a model"), ("data", "the files to learn from")):
        if not getattr(config, name):
            raise ValueError(f"--{name} is needed: {what}")
    if config.epochs is not None and config.steps is not None:
        raise ValueError(f"--epochs {config.epochs} and --steps {config.steps}: leave one out")
    if config.epochs is not None and not 0 < config.epochs < 2**31:
        raise ValueError(f"--epochs {config.epochs}: expected a positive number")
    checks.check_adapter(config)
    named: dict[str, Any] = {n: getattr(config, n) for n in ("init", "tokenizer", "end_token")}
    # A resumed run has a copy of the model's sizes.
    own = read_settings(config.config).get("model") if config.resume and config.config else None
    source = with_model(Pretrain(**named, model=own, resume=config.resume, config=config.config))
    config, options = with_options(config)
    checks.check_rate_of_fine_tuning(config)

    defaults = of_source(source, config.adapter is not None)
    epochs = config.epochs or defaults["epochs"]
    named |= {name: getattr(source, name) for name in named}
    # Absolute, so that a run can be resumed from another folder.
    for name in ("data", "eval_data"):
        named[name] = tuple(map(os.path.abspath, getattr(config, name)))
    template = config.chat_template
    if template is None and config.tokenizer is None:
        template = chat_template_of(str(config.init))
    named["chat_template"] = None if template is None else os.path.abspath(template)
    config = dataclasses.replace(config, **named)
    config = fill(config, options, defaults)

    def resolved(steps: int) -> ResolvedFinetuneLM:
        known = dataclasses.replace(config, steps=steps)
        others: dict[str, Any] = {
            "accumulate": fewest_parts(known.batch_size or 0, defaults["microbatch"]),
            "eval_every": max(1, steps // 10),
            "out": default_out(known, source.model),
            "clip": default_clip(known),
        }
        known = fill_rest(fill_open(known, others), options, defaults["adamw_state"])
        fields: dict[str, Any] = {f.name: getattr(known, f.name) for f in dataclasses.fields(known)}
        fields |= {"epochs": None, "model": source.model}
        result = ResolvedFinetuneLM(**fields)
        checks.check_finetuning(result)
        return result

    return resolved(config.steps or count_steps(resolved(_MANY), epochs))


def of_source(source: Pretrain, adapter: bool) -> dict[str, Any]:
    """The row of defaults for fine-tuning the model of `source`."""
    size, _ = sizes(source)
    row: dict[str, Any] = dict(FINETUNING)
    row["seq_len"] = min(row["seq_len"], size.max_length)
    if not adapter:
        return row | {"rank": max(1, size.width // 4)}
    rates = dict.fromkeys(("full", "galore", "q_galore"), row["adapters"])
    rank = min(row["adapter_rank"], *smaller_sides(size))
    return row | rates | {"rank": rank, "train": ADAPTERS_ONLY}


def finetuning_folder(config: FinetuneLM) -> str | None:
    """The folder of a run without --out; None if it cannot be known, for want of --init."""
    if config.init is None:
        return None
    named: dict[str, Any] = {n: getattr(config, n) for n in ("init", "tokenizer", "end_token")}
    return default_out(config, with_model(Pretrain(**named)).model)


def load_finetuning(path: str | os.PathLike[str]) -> FinetuneLM:
    """Reads a config.json of train.finetune_lm; raises ValueError if it cannot be read as one."""
    fields = read_settings(path)
    check_command(fields, path, FinetuneLM.command)
    fields.pop("command", None)
    fields.pop("model", None)  # that of --init
    return _of_fields(FinetuneLM, fields, path)


def load_run(path: str | os.PathLike[str]) -> Pretrain | ResolvedFinetuneLM:
    """Reads a run's config.json, of whatever command that trains a language model."""
    fields = read_settings(path)
    if fields.get("command") != FinetuneLM.command:
        return load(path)
    fields.pop("command")
    return _of_fields(ResolvedFinetuneLM, {"out": os.path.dirname(path), **fields}, path)


def _of_fields(kind: type[Settings], fields: dict[str, Any], path: Any) -> Settings:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        config = kind(**fields)
    except TypeError as error:  # a field that is unknown, or missing
        raise ValueError(f"{path} is not a config.json of {kind.command}: {error}") from None
    checks.check_types(config)
    return config
