"""What is accepted as a setting. Each error names the flag, its value and what is accepted."""

import itertools
import re
from collections.abc import Collection, Iterator
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np

from models.llama.config import SIZES, LlamaConfig
from models.llama.model import smaller_sides
from train.config.optimizers import OPTIMIZERS
from train.config.settings import Pretrain, Resolved, flag
from train.config.weights import ADAPTERS

# Numbers of a run are float32; smaller ones than the smallest count as zero.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_AT_LEAST = {
    "rank": 1, "update_proj_gap": 1, "steps": 1, "warmup_steps": 0, "batch_size": 1,
    "accumulate": 1, "seq_len": 1, "eval_every": 1, "eval_tokens": 1, "save_every": 1,
    "keep": 1, "log_every": 1, "max_skipped": 1, "workers": 0, "seed": 0,
    "gradient_rank": 1, "restart_every": 1, "restart_warmup": 0,
}  # fmt: skip
_POSITIVE = ("scale", "learning_rate", "clip_norm", "alpha")
_BITS = ("moment_bits", "projection_bits", "weight_bits", "embedding_bits")

# Settings that only some optimizers or adapters use.
OPTIONS = {name for t in (OPTIMIZERS, ADAPTERS) for row in t.values() for name in row.options}


def check_types(config: Pretrain) -> None:
    """Checks the fields' types: a config.json or Python code can pass any, tyro has checked its."""
    for name, hint in get_type_hints(Pretrain).items():
        value = getattr(config, name)
        accepted = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
        if get_origin(accepted[0]) is Literal:
            choices = get_args(accepted[0])
            if name == "model":  # a program may have added sizes of its own
                choices = tuple({**dict.fromkeys(choices), **SIZES})
            if value not in choices and not (value is None and type(None) in accepted):
                raise ValueError(f"{flag(name)} {value!r}: choose one of {', '.join(choices)}")
        elif type(value) not in accepted and not (type(value) is int and float in accepted):
            kinds = " or ".join("null" if t is type(None) else t.__name__ for t in accepted)
            raise ValueError(f"{flag(name)} {value!r}: expected {kinds}")


def check_adapter(config: Pretrain) -> None:
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


def check_unused(config: Pretrain, used: Collection[str]) -> None:
    """Checks that no option is set that the optimizer and the adapter do not use."""
    for name in sorted(OPTIONS - set(used)):
        if getattr(config, name) is not None:
            users = [n for n, r in OPTIMIZERS.items() if name in r.options]
            users += [f"--adapter {n}" for n, r in ADAPTERS.items() if name in r.options]
            raise ValueError(
                f"{flag(name)} {getattr(config, name)} has no effect with --optimizer "
                f"{config.optimizer}: leave it out (or None), or choose one of {', '.join(users)}"
            )


def check_values(config: Resolved) -> None:
    """Checks each value, and the values that contradict each other."""
    for wrong, message in itertools.chain(_ranges(config), _conflicts(config)):
        if wrong:
            raise ValueError(message)


def _ranges(config: Resolved) -> Iterator[tuple[bool, str]]:
    """For each value that has a range: whether it is outside, and the error."""
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        limit = 32 if name == "seed" else 31  # unsigned; the others are, or count in, int32
        if value is not None:
            yield value < least, f"{flag(name)} {value}: expected {least} or more"
            yield value >= 2**limit, f"{flag(name)} {value}: expected less than 2**{limit}"
    for name in _POSITIVE:
        value = getattr(config, name)
        yield (
            value is not None and not _SMALLEST <= value <= _LARGEST,
            f"{flag(name)} {value}: expected a positive number, {_SMALLEST:.1e} to {_LARGEST:.1e}",
        )
    for name in _BITS:
        value = getattr(config, name)
        yield value not in (None, 4, 8), f"{flag(name)} {value}: choose 4 or 8"
    dropout, decay = config.dropout, config.weight_decay
    yield (
        dropout is not None and not 0 <= dropout < 1,
        f"--dropout {dropout}: expected a share from 0 to below 1",
    )
    yield (
        decay is not None and not 0 <= decay <= _LARGEST,
        f"--weight-decay {decay}: expected 0 or more, {_LARGEST:.1e} at most",
    )
    try:
        re.compile(config.adapter_pattern or "")
    except (re.error, OverflowError) as error:
        yield (
            True,
            f"--adapter-pattern {config.adapter_pattern}: {error}; expected a regular expression, "
            "such as query|value",
        )


def _conflicts(c: Resolved) -> Iterator[tuple[bool, str]]:
    """For each pair of settings that can contradict each other: whether they do, and the error."""
    quantized = c.weight_bits is not None and c.adapter is None
    yield (
        bool(c.stochastic_rounding) and c.dtype == "float32" and not quantized,
        "--stochastic-rounding: float32 weights need no rounding; leave it out, or choose "
        "--dtype bfloat16",
    )
    yield (
        None not in (c.gradient_rank, c.rank) and (c.gradient_rank or 0) >= (c.rank or 0),
        f"--gradient-rank {c.gradient_rank}: expected less than --rank {c.rank}, the adapter's",
    )
    yield (
        c.restart_every is not None and c.weight_bits == 4,
        f"--weight-bits 4 with --adapter {c.adapter}: weights of 4 bits lose what was learnt when "
        "a restart merges it into them; choose 8, or leave it out",
    )
    yield (
        None not in (c.restart_every, c.restart_warmup)
        and (c.restart_warmup or 0) >= (c.restart_every or 0),
        f"--restart-warmup {c.restart_warmup}: expected fewer steps than --restart-every "
        f"{c.restart_every}",
    )
    yield (
        c.warmup_steps >= c.steps,
        f"--warmup-steps {c.warmup_steps}: expected fewer than --steps {c.steps}",
    )
    yield (
        c.layerwise and c.adapter is not None,
        f"--layerwise has no effect with --adapter {c.adapter}: the gradients of adapters are "
        "small, and frozen weights have none; leave one of them out",
    )
    yield (
        c.clip != "exact" and not c.layerwise,
        f"--clip {c.clip} has an effect with --layerwise only; any other step clips exactly",
    )
    users = [name for name, recipe in OPTIMIZERS.items() if "scale" in recipe.options]
    yield (
        c.accumulate_in_subspace and c.optimizer not in users,
        f"--accumulate-in-subspace: --optimizer {c.optimizer} has no subspace; leave it out, or "
        f"choose one of {', '.join(users)}",
    )
    yield (
        c.clip == "exact" and c.layerwise and c.accumulate_in_subspace,
        "--clip exact with --layerwise --accumulate-in-subspace: the norm of the projected sum is "
        "not known before the new subspaces are; choose previous, or leave one of them out",
    )
    yield (
        c.data == "c4" and c.data_dir is None,
        "--data c4 needs --data-dir, the folder of the data set: `python -m train.prepare_c4` "
        "writes one; --data builtin needs none",
    )
    yield (
        c.data == "builtin" and c.data_dir is not None,
        "--data-dir has no effect with --data builtin: leave it out, or choose --data c4",
    )


def check_model(config: Resolved, size: LlamaConfig) -> None:
    """Checks length and rank against the model's sizes."""
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
