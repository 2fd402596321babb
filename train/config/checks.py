"""What is accepted as a setting. Each error names the flag, its value and what is accepted."""

import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np

from galore_optax.projection.subspace import BY_PRODUCTS
from models.llama.axes import smaller_sides
from models.llama.config import SIZES
from train.config.flags import TrainingFlags
from train.config.optimizers import OPTIMIZERS, measurable
from train.config.settings import (
    Pretrain,
    Resolved,
    ResolvedFinetuneLM,
    ResolvedText,
    ResolvedTraining,
    flag,
)
from train.config.source import short_name, sizes
from train.config.weights import ADAPTERS

# Numbers of a run are float32; smaller ones than the smallest count as zero.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_AT_LEAST = {
    "rank": 1, "update_proj_gap": 1, "steps": 1, "warmup_steps": 0, "batch_size": 1,
    "accumulate": 1, "seq_len": 1, "eval_every": 1, "eval_tokens": 1, "save_every": 1,
    "keep": 1, "log_every": 1, "patience": 1, "max_skipped": 1, "workers": 0, "seed": 0,
    "gradient_rank": 1, "restart_every": 1, "restart_warmup": 0, "decay_steps": 1,
    "processes": 1, "process": 0, "data_parts": 1,
    "profile": 1, "sample_every": 1, "energy_every": 1, "leading": 1,
}  # fmt: skip
_POSITIVE = ("scale", "learning_rate", "clip_norm", "alpha", "eps")
_SHARES = ("b1", "b2", "dropout", "tracking")
_BITS = ("moment_bits", "projection_bits", "weight_bits", "embedding_bits")

# Settings that only some optimizers or adapters use.
OPTIONS = {name for t in (OPTIMIZERS, ADAPTERS) for row in t.values() for name in row.options}


def check_types(config: TrainingFlags) -> None:
    """Checks the fields' types: tyro has checked flags, a config.json or a program can have any."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is tuple:
            if type(value) is not tuple or not all(type(x) is str for x in value):
                raise ValueError(f"{flag(name)} {value!r}: expected a list of strings")
            continue
        accepted = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
        if get_origin(accepted[0]) is Literal:
            choices = get_args(accepted[0])
            if value not in choices and not (value is None and type(None) in accepted):
                raise ValueError(f"{flag(name)} {value!r}: choose one of {', '.join(choices)}")
        elif type(value) not in accepted and not (type(value) is int and float in accepted):
            kinds = " or ".join("null" if t is type(None) else t.__name__ for t in accepted)
            raise ValueError(f"{flag(name)} {value!r}: expected {kinds}")


def check_model(config: Pretrain) -> None:
    """Checks that --model names a size or a file."""
    if config.model is not None and not (config.model in SIZES or config.model.endswith(".json")):
        raise ValueError(
            f"--model {config.model!r}: choose one of {', '.join(SIZES)}, or give the path of a "
            "config.json of transformers"
        )


def check_adapter(config: TrainingFlags) -> None:
    """Checks that the optimizer can train the adapter."""
    recipe = OPTIMIZERS[config.optimizer]
    has_rank = "rank" in recipe.options
    if config.adapter not in (None, recipe.adapter) and (recipe.adapter or has_rank):
        others = [n for n, r in OPTIMIZERS.items() if not (r.adapter or "rank" in r.options)]
        raise ValueError(
            f"--adapter {config.adapter}: --optimizer {config.optimizer} has "
            f"{'a rank' if has_rank else 'an adapter'} of its own; choose one of "
            f"{', '.join(others)}, or leave --adapter out"
        )


def check_unused(config: TrainingFlags, used: Collection[str]) -> None:
    """Checks that no option is set that the optimizer and the adapter do not use."""
    for name in sorted(OPTIONS - set(used)):
        if getattr(config, name) is not None:
            users = [n for n, r in OPTIMIZERS.items() if name in r.options]
            users += [f"--adapter {n}" for n, r in ADAPTERS.items() if name in r.options]
            raise ValueError(
                f"{flag(name)} {getattr(config, name)} has no effect with --optimizer "
                f"{config.optimizer}: leave it out (or None), or choose one of {', '.join(users)}"
            )


def check_clip_and_schedule(config: TrainingFlags) -> None:
    """Checks that no setting of clipping and schedule is set that the others leave no use for."""
    if config.clip_norm is None and config.clip is not None:
        said = "--clip-norm none clips nothing; leave one of them out"
        raise ValueError(f"--clip {config.clip} has no effect: {said}")
    if config.schedule == "constant" and config.floor is not None:
        said = "--schedule constant never falls; choose cosine, linear or wsd"
        raise ValueError(f"--floor {config.floor} has no effect: {said}")
    if config.schedule != "wsd" and config.decay_steps is not None:
        said = f"--schedule {config.schedule} has no such part; choose wsd"
        raise ValueError(f"--decay-steps {config.decay_steps} has no effect: {said}")


def check_rate_of_fine_tuning(config: TrainingFlags) -> None:
    """Checks that there is a learning rate: some optimizers have one for pre-training alone."""
    if config.learning_rate is None and OPTIMIZERS[config.optimizer].learning_rate is not None:
        published = f"--optimizer {config.optimizer} has a published one for pre-training only"
        raise ValueError(f"--learning-rate is missing: {published}; give it, such as 2e-5")


def check_values(config: Resolved) -> None:
    """Checks each value, the values that contradict each other, and those against the model."""
    size, name = sizes(config)[0], short_name(config.model)
    texts = [("data_dir", config.data_dir), ("eval_data", config.eval_data)]
    apart = _apart(config.out, texts if config.data == "text" else [])
    own = itertools.chain(_text(config), apart, _by_layers(config))
    check_training(config, smaller_sides(size), size.max_length, name, own)


def check_finetuning(config: ResolvedFinetuneLM) -> None:
    """The same for a fine-tuning of a language model."""
    size, name = sizes(config)[0], short_name(config.model)
    texts = [(name, path) for name in ("data", "eval_data") for path in getattr(config, name)]
    own = itertools.chain(_apart(config.out, texts), _by_layers(config))
    check_training(config, smaller_sides(size), size.max_length, name, own)


def check_training(
    config: ResolvedTraining,
    sides: list[int],
    max_length: int,
    name: str,
    own: Iterable[str] = (),
) -> None:
    """The same for what all commands that train have, and errors of the command's `own`.

    `sides` are the smaller sides of the matrices of the model, whose name is `name`.
    """
    sized = _sizes(config, sides, max_length, name)
    for error in itertools.chain(_ranges(config), _conflicts(config), own, sized):
        raise ValueError(error)


def _ranges(c: ResolvedTraining) -> Iterator[str]:
    """An error for each value that is out of its range."""
    for name, least in _AT_LEAST.items():
        value = getattr(c, name, None)
        limit = 32 if name == "seed" else 31  # unsigned; the others are, or count in, int32
        if value is not None and value < least:
            yield f"{flag(name)} {value}: expected {least} or more"
        if value is not None and value >= 2**limit:
            yield f"{flag(name)} {value}: expected less than 2**{limit}"
    for name in _POSITIVE:
        value = getattr(c, name)
        if value is not None and not _SMALLEST <= value <= _LARGEST:
            limits = f"{_SMALLEST:.1e} to {_LARGEST:.1e}"
            yield f"{flag(name)} {value}: expected a positive number, {limits}"
    for name in _BITS:
        if getattr(c, name) not in (None, 4, 8):
            yield f"{flag(name)} {getattr(c, name)}: choose 4 or 8"
    for name in _SHARES:
        if (value := getattr(c, name)) is not None and not 0 <= value < 1:
            yield f"{flag(name)} {value}: expected a share from 0 to below 1"
    if c.floor is not None and not 0 <= c.floor <= 1:
        yield f"--floor {c.floor}: expected a share of --learning-rate, from 0 to 1"
    for name in ("weight_decay", "compensation"):
        value = getattr(c, name)
        if value is not None and not 0 <= value <= _LARGEST:
            yield f"{flag(name)} {value}: expected 0 or more, {_LARGEST:.1e} at most"
    for name in ("adapter_pattern", "train", "freeze"):
        try:
            re.compile(getattr(c, name) or "")
        except (re.error, OverflowError) as error:
            expected = "expected a regular expression, such as query|value"
            yield f"{flag(name)} {getattr(c, name)}: {error}; {expected}"


def _conflicts(c: ResolvedTraining) -> Iterator[str]:
    """An error for each pair of settings that contradict each other."""
    adapter, every, pause = c.adapter, c.restart_every, c.restart_warmup
    quantized = c.weight_bits is not None and adapter is None
    if c.stochastic_rounding and c.weight_dtype == "float32" and not quantized:
        advice = "leave it out, or choose --weight-dtype bfloat16"
        yield f"--stochastic-rounding: float32 weights need no rounding; {advice}"
    if c.side == "both" and OPTIMIZERS[c.optimizer].recovers:
        yield f"--side both: --optimizer {c.optimizer} needs a side that is not projected"
    if c.state_dtype is not None and c.moment_bits is not None:
        reason = f"moments have {c.moment_bits} bits, by --moment-bits"
        yield f"--state-dtype {c.state_dtype} has no effect: {reason}; leave one of them out"
    if c.gradient_rank is not None and c.rank is not None and c.gradient_rank >= c.rank:
        yield f"--gradient-rank {c.gradient_rank}: expected below --rank {c.rank}, the adapter's"
    if c.leading is not None and c.rank is not None and c.leading > c.rank:
        yield f"--leading {c.leading}: expected at most --rank {c.rank}"
    if every is not None and c.weight_bits == 4:
        reason = "4-bit weights lose what was learnt when a restart merges it into them"
        yield f"--weight-bits 4 with --adapter {adapter}: {reason}; choose 8, or leave it out"
    if every is not None and pause is not None and pause >= every:
        yield f"--restart-warmup {pause}: expected fewer steps than --restart-every {every}"
    # A resumed run may get fewer steps, and later more again.
    if every is not None and pause is not None and every >= c.steps and not c.resume:
        reason = f"with --restart-every {every} of --steps {c.steps} there is no restart"
        yield f"--restart-warmup {pause} has no effect: {reason}; leave it out"
    if c.warmup_steps >= c.steps:
        yield f"--warmup-steps {c.warmup_steps}: expected fewer than --steps {c.steps}"
    if c.decay_steps is not None and c.warmup_steps + c.decay_steps > c.steps:
        both = f"--warmup-steps {c.warmup_steps} and --decay-steps {c.decay_steps}"
        yield f"{both}: expected at most --steps {c.steps} together"
    if c.stagger and c.update_proj_gap == 1:
        yield "--stagger has no effect with --update-proj-gap 1: each step refreshes all matrices"
    yield from _measured(c)
    gap = c.update_proj_gap
    once = gap is not None and gap >= c.steps and not c.stagger
    if once and c.moments is not None and not c.resume:
        reason = f"with --update-proj-gap {gap} of --steps {c.steps} there is one refresh"
        yield f"--moments {c.moments} has no effect: {reason}, the first; leave it out"


def _measured(c: ResolvedTraining) -> Iterator[str]:
    """An error if --energy-every has nothing to measure."""
    users = [name for name, recipe in OPTIMIZERS.items() if measurable(name, recipe)]
    said = f"--energy-every {c.energy_every}"
    if c.energy_every is not None and c.optimizer not in users:
        choice = f"leave it out, or choose one of {', '.join(users)}"
        yield f"{said}: --optimizer {c.optimizer} has no orthonormal bases of gradients; {choice}"
    for name in ("accumulate_in_subspace", "compress_gradients"):
        if c.energy_every is not None and getattr(c, name):
            reason = "there is no whole gradient to measure"
            yield f"{said} with {flag(name)}: {reason}; leave one of them out"


def _by_layers(c: ResolvedText) -> Iterator[str]:
    """The same for the settings of `LayerwiseFlags`."""
    if c.layerwise and c.adapter is not None:
        reason = "the gradients of adapters are small, and frozen weights have none"
        none = f"--layerwise has no effect with --adapter {c.adapter}"
        yield f"{none}: {reason}; leave one of them out"
    for name in ("train", "freeze"):
        if c.layerwise and getattr(c, name) is not None:
            said = f"{flag(name)} {getattr(c, name)} with --layerwise"
            yield f"{said}: it trains all params; leave one of them out"
    if c.clip not in ("exact", None) and not c.layerwise:
        yield f"--clip {c.clip} has an effect with --layerwise only; any other step clips exactly"
    if c.layerwise and c.scan_layers is False:
        yield "--scan-layers False with --layerwise: its step is such a loop; leave one out"
    in_subspace = {n: r for n, r in OPTIMIZERS.items() if "update_proj_gap" in r.options}
    users = [name for name, recipe in in_subspace.items() if not recipe.recovers]
    for name in ("accumulate_in_subspace", "compress_gradients"):
        if getattr(c, name) and c.optimizer not in users:
            lacks = "needs whole gradients" if c.optimizer in in_subspace else "has no subspace"
            reason = f"--optimizer {c.optimizer} {lacks}"
            choice = f"leave it out or choose one of {', '.join(users)}"
            yield f"{flag(name)}: {reason}; {choice}"
    if c.compress_gradients and c.subspace not in BY_PRODUCTS:
        reason = f"--subspace {c.subspace} needs the gradient itself"
        yield f"--compress-gradients: {reason}; choose one of {', '.join(BY_PRODUCTS)}"
    if c.compress_gradients and c.adapter is not None:
        reason = "the gradients of adapters are small"
        yield f"--compress-gradients with --adapter {c.adapter}: {reason}; leave one of them out"
    if c.compress_bits not in (None, 8):
        yield f"--compress-bits {c.compress_bits}: choose 8, or leave it out"
    if c.compress_bits is not None and not c.compress_gradients:
        yield "--compress-bits 8 has no effect: give --compress-gradients, too, or leave it out"
    if c.compress_bits is not None and c.layerwise:
        reason = "a layer's sum is sent as it is"
        yield f"--compress-bits 8 with --layerwise: {reason}; leave one of them out"
    for name in ("accumulate_in_subspace", "compress_gradients"):
        if c.clip == "exact" and c.layerwise and getattr(c, name):
            reason = "the norm of the projected sum is not known before the new subspaces are"
            advice = "choose previous, or leave one of them out"
            yield f"--clip exact with --layerwise {flag(name)}: {reason}; {advice}"


def _text(c: Resolved) -> Iterator[str]:
    """The same for the data."""
    if c.batch_size % c.data_parts:
        yield f"--data-parts {c.data_parts}: expected a divisor of --batch-size {c.batch_size}"
    if c.data == "c4" and c.data_dir is None:
        advice = "`python -m train.prepare_c4` writes one; --data builtin needs none"
        yield f"--data c4 needs --data-dir, the folder of the data set: {advice}"
    if c.data == "text" and c.data_dir is None:
        yield "--data text needs --data-dir, a folder, a file or a pattern, such as 'texts/*.txt'"
    if c.data == "builtin" and c.data_dir is not None:
        choice = "choose --data c4 or text"
        yield f"--data-dir has no effect with --data builtin: leave it out, or {choice}"
    if c.data != "c4" and c.skip_unreadable:
        reason = f"--data {c.data} is read before the first step"
        yield f"--skip-unreadable has no effect: {reason}; leave it out"
    if c.data != "text" and c.eval_data is not None:
        advice = "leave it out, or choose --data text"
        yield f"--eval-data has no effect with --data {c.data}: {advice}"


def _apart(out: str, texts: Iterable[tuple[str, str | None]]) -> Iterator[str]:
    """An error if a run's own files would be read as text, once it is resumed."""
    for name, folder in texts:
        if folder is None or not os.path.isdir(folder):
            continue
        inside = os.path.relpath(os.path.realpath(out), os.path.realpath(folder))
        # Hidden folders are not read.
        if not inside.startswith(".") and f"{os.sep}." not in inside:
            reason = f"all files in {flag(name)} {folder} are read"
            yield f"--out {out}: {reason}, and a run's would be when it is resumed; name another"


def _sizes(c: ResolvedTraining, sides: list[int], max_length: int, name: str) -> Iterator[str]:
    """An error if length or rank exceed the model's sizes."""
    if c.seq_len > max_length:
        yield f"--seq-len {c.seq_len}: {name} takes at most {max_length} tokens"
    if c.rank is not None and c.adapter is None and c.rank >= max(sides):
        yield (
            f"--rank {c.rank}: a rank of {max(sides)} or more compresses no matrix of {name}; "
            f"choose at most {max(sides) - 1}, or an --optimizer without rank"
        )
    if c.rank is not None and c.adapter is not None and c.rank > min(sides):
        most = f"the smaller side of a matrix, {min(sides)} in {name}"
        yield f"--rank {c.rank}: an adapter's rank is at most {most}"
