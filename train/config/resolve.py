"""Fills in the settings that were left open: by model, by optimizer and from other settings."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from models.llama.axes import smaller_sides
from train.config import checks
from train.config.defaults import DEFAULTS, PAPER
from train.config.flags import TrainingFlags
from train.config.optimizers import OPTIMIZERS
from train.config.settings import NOT_STORED, Pretrain, Resolved, expand_home
from train.config.source import (
    check_command,
    read_settings,
    short_name,
    sizes,
    with_file,
    with_model,
)
from train.config.weights import ADAPTERS

Config = TypeVar("Config", bound=TrainingFlags)


def resolve(config: Pretrain) -> Resolved:
    """Fills in the defaults, and checks each value that can be checked without the data."""
    checks.check_types(config)
    checks.check_model(config)
    config = expand_home(config)
    checks.check_adapter(config)
    config = with_model(config)
    config, options = with_options(config)

    adapter = config.adapter is not None
    defaults = of_model(config, adapter)
    config = fill(config, options, defaults)
    if config.steps is None:
        raise ValueError(f"--steps has no default for {short_name(config.model)}: give it")

    others: dict[str, Any] = {
        "accumulate": fewest_parts(config.batch_size or 0, defaults["microbatch"]),
        "eval_every": max(1, config.steps // 10),
        "eval_tokens": 10_000_000 if config.data == "c4" else None,
        "out": default_out(config, config.model),
        "clip": default_clip(config),
        "data_parts": math.gcd(8, config.batch_size or 0),
    }
    config = fill_rest(fill_open(config, others), options, defaults["adamw_state"])
    config = with_file(config)
    resolved = Resolved(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    checks.check_values(resolved)
    # Absolute, so that a run can be resumed from another folder.
    data_dir = None if config.data_dir is None else os.path.abspath(config.data_dir)
    eval_data = None if config.eval_data is None else os.path.abspath(config.eval_data)
    return dataclasses.replace(resolved, data_dir=data_dir, eval_data=eval_data)


def with_options(config: Config) -> tuple[Config, dict[str, Any]]:
    """The settings with the optimizer's adapter, and the options that both use, with defaults.

    ValueError if the settings have an option that is not used.
    """
    recipe = OPTIMIZERS[config.optimizer]
    adapter = config.adapter or recipe.adapter
    config = dataclasses.replace(config, adapter=adapter)
    options = {**recipe.options, **(ADAPTERS[adapter].options if adapter else {})}
    checks.check_unused(config, options)
    checks.check_clip_and_schedule(config)
    return config, options


def fill(config: Config, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Config:
    """Fills in the options' defaults, and those of a row of `train.config.defaults`."""
    recipe = OPTIMIZERS[config.optimizer]
    family = "galore" if "update_proj_gap" in recipe.options else "full"
    if "weight_bits" in recipe.options:
        family = "q_galore"
    unused = checks.OPTIONS - set(options)
    # A recipe's own value goes before a model's.
    unused |= {name for name, value in options.items() if value is not None}
    used = {name: value for name, value in defaults.items() if name not in unused}
    rate = recipe.learning_rate or defaults[family]
    return fill_open(config, {**options, **used, "learning_rate": rate})


def fill_rest(config: Config, options: Mapping[str, Any], adamw_state: Any) -> Config:
    """Fills in what follows from other settings, of which steps and eval_every are known.

    `adamw_state` is the dtype of AdamW's moments of bfloat16 weights.
    """
    steps, adapter = config.steps or 0, config.adapter
    weight_dtype = config.weight_dtype or config.dtype
    others: dict[str, Any] = {
        "weight_dtype": weight_dtype,
        "warmup_steps": steps // 10,
        "floor": None if config.schedule == "constant" else 0.1,
        "decay_steps": max(1, steps // 5) if config.schedule == "wsd" else None,
        "save_every": config.eval_every,
        "log_every": max(1, steps // 50),
    }
    if "moments" in options and (config.stagger or steps > (config.update_proj_gap or 0)):
        others["moments"] = "rotate"
    if "stochastic_rounding" in options:
        others["stochastic_rounding"] = weight_dtype == "bfloat16"
    if "state_dtype" in options and config.moment_bits is None:
        whole = config.optimizer == "adamw" and adapter is None and weight_dtype == "bfloat16"
        others["state_dtype"] = adamw_state if whole else "float32"
    if "gradient_rank" in options:
        others["gradient_rank"] = max(1, (config.rank or 0) // 4)
    if "restart_every" in options:
        every = config.restart_every or max(1, steps // 5)
        others |= {"restart_every": every, "restart_warmup": every // 10 if every < steps else None}
    return fill_open(config, others)


def load(path: str | os.PathLike[str], kind: type[Config] = Pretrain) -> Config:
    """Reads a config.json of a kind of settings; raises ValueError if it cannot be read as one."""
    fields = read_settings(path)
    check_command(fields, path, kind.command)
    known = {f.name for f in dataclasses.fields(kind)} - set(NOT_STORED)
    if unknown := ", ".join(sorted(set(fields) - known)):
        raise ValueError(f"{path} is not a config.json of {kind.command}: unknown {unknown}")
    config = kind(**fields)
    checks.check_types(config)
    if isinstance(config, Pretrain):
        checks.check_model(config)
    return config


def settings_file(
    config: Config, folder: Callable[[Config], str | None] | None = None
) -> str | None:
    """The config.json whose settings the flags override: --config, or that of the resumed run.

    `folder` names that of a run without --out; by default that of a pre-training.
    """
    if config.config is not None or not config.resume:
        return config.config
    out = config.out
    if out is None and folder is not None:
        out = folder(config)
    elif out is None and isinstance(config, Pretrain):
        out = default_out(config, with_model(config).model)
    file = None if out is None else os.path.join(out, "config.json")
    return file if file is not None and os.path.isfile(file) else None


def fewest_parts(batch: int, rows: Any) -> int:
    """The fewest equal microbatches of at most `rows` rows (None: all); 1 for an empty batch."""
    most = min(rows or batch, batch)
    return next((batch // n for n in range(most, 0, -1) if batch % n == 0), 1)


def default_clip(config: TrainingFlags) -> str | None:
    """The norm by which a step clips, if it does."""
    projected = config.accumulate_in_subspace or config.compress_gradients
    in_subspace = config.layerwise and projected
    return None if config.clip_norm is None else "previous" if in_subspace else "exact"


def default_out(config: TrainingFlags, model: str | None) -> str:
    """The folder of a run of a model."""
    if config.resume and config.config is not None:
        return os.path.dirname(config.config) or "."
    named = config.adapter != OPTIMIZERS[config.optimizer].adapter
    parts = [short_name(model), *([config.adapter] if named and config.adapter else [])]
    return os.path.join("runs", "-".join([*parts, config.optimizer]))


def of_model(config: Pretrain, adapter: bool) -> dict[str, Any]:
    """The row of defaults for the model of a pre-training."""
    if (row := DEFAULTS.get(str(config.model))) is not None:
        return {**PAPER, **row}
    # The papers do not have it; the rank is theirs for most sizes.
    size, _ = sizes(config)
    rank = max(1, size.width // 4)
    return {
        **PAPER,
        "rank": min(rank, *smaller_sides(size)) if adapter else rank,
        "seq_len": min(PAPER["seq_len"], size.max_length),
        "microbatch": 16,
    }


def fill_open(config: Config, defaults: Mapping[str, Any]) -> Config:
    """Fills in defaults by name where a setting is None."""
    names = {f.name for f in dataclasses.fields(config)} & set(defaults)
    missing = {name: defaults[name] for name in names if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)
