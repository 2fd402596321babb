"""What a resumed run may change, and how its settings are compared with those that it had."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.config.flags import TrainingFlags
from train.config.settings import Pretrain, flag, to_json
from train.config.source import short_name

# No number of the run depends on these, beyond rounding; what the files hold is compared.
MAY_CHANGE = {
    "data_dir": "the data set has moved; its content is compared",
    "data": "of train.finetune_lm: the files have moved; their content is compared",
    "eval_data": "the same for the text to evaluate on",
    "tokenizer": "the same tokenizer at another path; the run uses its own copy without",
    "chat_template": "the same for the template of chats",
    "mesh": "other devices",
    "workers": "processes that read",
    "skip_unreadable": "what follows where a document cannot be read",
    "rematerialize": "memory against time",
    "scan_layers": "compile time against time",
    "deterministic": "the same bits each time on a GPU",
    "eval_every": "steps between evaluations",
    "save_every": "steps between checkpoints",
    "keep": "checkpoints that are kept",
    "log_every": "steps between lines",
    "patience": "when the run ends early",
    "track": "where metrics are sent",
    "max_skipped": "when the run gives up",
    "sample_every": "steps between samples of text",
    "energy_every": "steps between measurements of subspaces",
    "prompt": "of samples",
}
# These change the steps that follow, and nothing before them.
FROM_HERE = {
    "steps": "more steps, or fewer that are not done yet, with a shorter warm-up if it took all of "
    "them; a finished run goes on",
    "accumulate": "memory against time; the same numbers to rounding, except dropped inputs, and "
    "new subspaces with --accumulate-in-subspace",
    "learning_rate": "the peak, by which all later learning rates are multiplied",
    "schedule": "later learning rates are those of a run that had it from its first step",
    "warmup_steps": "the same",
    "floor": "the same",
    "decay_steps": "the same",
}
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Pretrain)}
# More steps give these a use, which they did not have: null in the config.json of before.
_OPENED = ("moments", "restart_warmup")
# Null in the config.json of versions whose checkpoints are refused, with the reason.
_NEW = ("data_parts",)


def table() -> str:
    """A table of the flags that may be given to a run with --resume, in Markdown."""
    rows = [("flag", "what changes"), ("---", "---")]
    rows += [(f"`{flag(name)}`", text) for name, text in {**FROM_HERE, **MAY_CHANGE}.items()]
    return "".join(f"| {name} | {text} |\n" for name, text in rows)


def lasting(config: TrainingFlags) -> dict[str, Any]:
    """The settings that a run's checkpoints must agree with."""
    fields = _compared(to_json(config))
    return {k: v for k, v in fields.items() if k not in _OPENED and not _free(k, v)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that keep a run with `new` from resuming one with `old`, a phrase for each."""
    return [
        f"{flag(name)} {before} (now {after})"
        for name, (before, after) in changes(old, new).items()
        if not _free(name, after) and not (name in (*_OPENED, *_NEW) and before is None)
    ]


def _free(name: str, value: Any) -> bool:
    """Whether a setting may change; `data` where it is files, not the kind of a source."""
    return name in {**MAY_CHANGE, **FROM_HERE} and not (name == "data" and isinstance(value, str))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, each with its value in both."""
    old, new = _compared(old), _compared(new)
    names = sorted({*old, *new})
    pairs = {n: (old.get(n, default_of(n)), new.get(n, default_of(n))) for n in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def default_of(name: str) -> Any:
    """The default of a setting, which a run had that is older than the setting."""
    return _DEFAULTS.get(name)


def _compared(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a model's name for its path: checkpoints have its sizes."""
    return {k: short_name(v) if k == "model" else v for k, v in fields.items()}
