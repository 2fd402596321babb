"""Which settings of a config.json are left open, since the flags beside it say otherwise."""

import dataclasses
import os
from typing import Any, TypeVar

from train.config.checks import OPTIONS
from train.config.finetune_lm import of_source
from train.config.flags import TrainingFlags
from train.config.glue import NEVER, Finetune, defaults_of
from train.config.optimizers import OPTIMIZERS
from train.config.resolve import fill, fill_rest, of_model
from train.config.settings import FinetuneLM, Pretrain
from train.config.source import with_model
from train.config.weights import ADAPTERS

Config = TypeVar("Config", bound=TrainingFlags)

# Any of these has defaults of its own for others.
_CHOICES = ("optimizer", "adapter", "model", "task", "rank")
_DERIVED = ("learning_rate", "warmup_steps", "decay_steps", "log_every")
# What follows from the length of an epoch, which is the data's.
_OF_TASK = ("steps", "warmup_steps", "decay_steps", "eval_every", "save_every", "log_every")


def without_own_adapter(base: Config) -> Config:
    """The settings of a file without the adapter of their optimizer, which another lacks."""
    own = base.adapter == OPTIMIZERS[base.optimizer].adapter
    return dataclasses.replace(base, adapter=None) if own else base


def reopened(base: Config, config: Config) -> Config:
    """The settings `base` of a file without what has no use, or no room, in `config`.

    That is `base` with flags, which may replace model, schedule, clipping or steps. What they say
    again is as if `base` did not. What another optimizer, adapter, model, task or rank has another
    default for is left open, too, if `base` has its own default.
    """
    opened = set() if config.resume else _of_others(base, config)
    warmup, decay, steps = config.warmup_steps or 0, config.decay_steps or 0, config.steps
    if steps is not None and steps != base.steps:
        last = max(1, steps // 5) if config.schedule == "wsd" else 1
        opened |= {"warmup_steps"} if warmup + last > steps else set()
        opened |= {"decay_steps"} if warmup + decay > steps else set()
        if not config.resume and (config.update_proj_gap or 0) >= steps:
            opened |= {"moments"}
        if not config.resume and (config.restart_every or 0) >= steps:
            opened |= {"restart_warmup"}
    if config.schedule == "constant":
        opened |= {"floor"}
    if config.schedule != "wsd":
        opened |= {"decay_steps"}
    if config.clip_norm is None and config.clip is not None:
        opened |= {"clip"}
    if getattr(config, "epochs", None) is not None:
        opened |= {"steps"}
    if config.moment_bits is not None:
        opened |= {"state_dtype"}
    if config.weight_dtype != base.weight_dtype:  # float32 weights have no use for rounding
        opened |= {"stochastic_rounding"}
    # A file has both, even if they were those of its --init: other weights have their own.
    if not config.resume and _folder_of(config) not in (None, _folder_of(base)):
        opened |= {"model", "tokenizer"} & {f.name for f in dataclasses.fields(base)}
    left: dict[str, Any] = dict.fromkeys(opened)
    return dataclasses.replace(base, **left)


def _folder_of(config: TrainingFlags) -> str | None:
    """The folder with the weights to begin with, as one path."""
    init = getattr(config, "init", None)
    return None if init is None else os.path.abspath(os.path.expanduser(init))


def _of_others(base: TrainingFlags, config: TrainingFlags) -> set[str]:
    """The settings that `base` has by default, or that `config` cannot use, if they differ."""
    if all(getattr(base, name, None) == getattr(config, name, None) for name in _CHOICES):
        return set()
    _, used = _options(config)
    own: dict[str, Any] = {}
    if isinstance(config, FinetuneLM):
        own["init"] = config.init  # the file's may be gone
    base = dataclasses.replace(base, **own)
    opened = {k for k, x in _defaults(base).items() if getattr(base, k) == x} | OPTIONS - {*used}
    if getattr(base, "task", None) != getattr(config, "task", None):
        opened |= {*_OF_TASK, "restart_every", "restart_warmup", "moments"}
    return opened


def _options(config: Config) -> tuple[Config, dict[str, Any]]:
    """The settings with the optimizer's adapter, and the options of both; nothing is checked."""
    recipe = OPTIMIZERS[config.optimizer]
    adapter = config.adapter or recipe.adapter
    options = {**recipe.options, **(ADAPTERS[adapter].options if adapter else {})}
    return dataclasses.replace(config, adapter=adapter), options


def _defaults(config: TrainingFlags) -> dict[str, Any]:
    """What the settings would be by default, each beside the optimizer, model, task and rank."""
    config, options = _options(config)

    def filled(rank: int | None, steps: int | None) -> dict[str, Any]:
        row = _row(dataclasses.replace(config, rank=rank))
        fields = {f.name for f in dataclasses.fields(config)} - {"epochs"}
        left: dict[str, Any] = dict.fromkeys((OPTIONS | {*_DERIVED, *row}) & fields)
        some = dataclasses.replace(config, **left | {"rank": rank, "steps": steps})
        some = fill_rest(fill(some, options, row), options, row["adamw_state"])
        return {name: getattr(some, name) for name in left}

    own = filled(None, None)
    # The others follow from these two.
    rest = filled(None if config.rank == own["rank"] else config.rank, config.steps)
    return rest | {name: own[name] for name in ("rank", "steps") if name in own}


def _row(config: TrainingFlags) -> dict[str, Any]:
    """The row of defaults for the model or the task."""
    adapter = config.adapter is not None
    if isinstance(config, Finetune):
        return defaults_of(config, NEVER)
    if isinstance(config, FinetuneLM):
        source = with_model(Pretrain(init=config.init, tokenizer=config.tokenizer))
        return of_source(source, adapter)
    assert isinstance(config, Pretrain)
    return of_model(config, adapter)
