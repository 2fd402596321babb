"""How a run stores its weights: as arrays, quantized, or frozen with an adapter on each matrix."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from galore_optax import DoRA, GradNormLoRP, LoRA, LowRank, adapt, quantize_nf4, quantize_weights
from galore_optax.adapters.base import Adapter, Frozen, is_adapter, split
from galore_optax.quantization.array import is_quantized
from train.config.flags import TrainingFlags

Params = dict[str, Any]

ADAPTERS_ONLY = "(?!)"
"""The pattern of `--train` that matches no path."""


class Kind(NamedTuple):
    """A row of the table of adapters."""

    create: Callable[..., Adapter]  # from a weight, a key and those of `_ARGUMENTS` in the options
    options: Mapping[str, Any]  # the settings that it uses, with defaults
    keep: float = 0.0  # the share of the factors' moments that a restart keeps


_ARGUMENTS = ("rank", "alpha", "dropout")
_FACTORS = {"rank": None, "adapter_pattern": None}
_LORA = {**_FACTORS, "weight_bits": None, "alpha": None, "dropout": 0.0}
_RESTARTS = {"restart_every": None, "restart_warmup": None}
ADAPTERS: Mapping[str, Kind] = {
    "lora": Kind(LoRA.create, _LORA),
    "dora": Kind(DoRA.create, _LORA),
    "relora": Kind(LoRA.create, {**_LORA, **_RESTARTS}, keep=0.01),
    "qlora": Kind(LoRA.create, {**_LORA, "weight_bits": 4}),
    "low-rank": Kind(LowRank.create, _FACTORS),
    "gradnorm-lorp": Kind(GradNormLoRP.create, {**_FACTORS, "weight_bits": None, **_RESTARTS}),
}


def split_params(config: TrainingFlags, params: Params) -> tuple[Params, Frozen]:
    """Splits params into what --train and --freeze leave to be trained, and the rest."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_adapter)
    adapted = {_name(path) for path, x in leaves if is_adapter(x)}

    def trains(name: str) -> bool:
        chosen = name in adapted or re.search(config.train or "", name)
        return bool(chosen) and not (config.freeze and re.search(config.freeze, name))

    return split(params, trains=trains)


def check_trained(config: TrainingFlags, params: Params) -> None:
    """Raises ValueError if --train or --freeze match no param, or leave none to be trained."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda x: is_adapter(x) or is_quantized(x))
    names = [_name(path) for path, _ in leaves]
    for option, pattern in (("--train", config.train), ("--freeze", config.freeze)):
        found = pattern in (None, ADAPTERS_ONLY) or any(re.search(pattern, x) for x in names)
        if not found:
            raise ValueError(f"{option} {pattern} matches no param; these are {', '.join(names)}")
    if not jax.tree.leaves(split_params(config, params)[0]):
        raise ValueError("--train and --freeze leave no param to be trained")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def stored_weights(
    config: TrainingFlags,
    params: Params,
    dimension_numbers: Callable[[Params], Any],
    key: PRNGKeyArray,
) -> Params:
    """The params as a run stores them.

    Without an adapter `--weight-bits` quantizes the matrices that `dimension_numbers` finds, and
    `--embedding-bits` embedding and head; with one, the matrices that get adapters, whose random
    factors come from `key`.
    """
    if config.adapter is None:
        if config.weight_bits is None:
            return params
        numbers = dimension_numbers(params)
        which = jax.tree.map(
            lambda n: n is not None, numbers, is_leaf=lambda n: type(n) is not dict
        )
        params = quantize_weights(params, which, bits=config.weight_bits)  # pyrefly: ignore
        if config.embedding_bits is not None:
            ends = {name: params[name] for name in ("embedding", "head") if name in params}
            params |= quantize_weights(ends, bits=config.embedding_bits)  # pyrefly: ignore
        return params
    kind = ADAPTERS[config.adapter]
    arguments = {name: getattr(config, name) for name in _ARGUMENTS if name in kind.options}

    def create(weight: Any, key: PRNGKeyArray) -> Adapter:
        if config.weight_bits == 4:
            weight = quantize_nf4(weight)
        elif config.weight_bits == 8:
            weight = quantize_weights(weight, True)
        return kind.create(weight, key, **arguments)

    return adapt(params, create, key, pattern=config.adapter_pattern or "")
