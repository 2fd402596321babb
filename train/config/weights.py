"""How a run holds its weights: as they are, in few bits, or with an adapter on each matrix."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from galore_optax import quantize_weights
from galore_optax.adapters.base import Adapter, adapt
from galore_optax.adapters.gradnorm_lorp import GradNormLoRP
from galore_optax.adapters.lora import DoRA, LoRA
from galore_optax.adapters.low_rank import LowRank
from galore_optax.quantization.nf4 import quantize_nf4

if TYPE_CHECKING:
    from train.config.resolve import Pretrain

Params = dict[str, Any]


class Kind(NamedTuple):
    """How a named adapter is made, and which flags it listens to.

    Attributes:
        create: from a weight, a key and those of the options that it has for arguments.
        options: fields of the settings.
        defaults: of the options that have others than None.
        keep: the share of the factors' moments that a restart keeps.
    """

    create: Callable[..., Adapter]
    options: tuple[str, ...]
    defaults: Mapping[str, Any] = MappingProxyType({})
    keep: float = 0.0


_FACTORS = ("rank", "adapter_pattern")
_LORA = (*_FACTORS, "weight_bits", "alpha", "dropout")
_RESTARTS = ("restart_every", "restart_warmup")
_NO_DROPOUT = MappingProxyType({"dropout": 0.0})
ADAPTERS: dict[str, Kind] = {
    "lora": Kind(LoRA.create, _LORA, _NO_DROPOUT),
    "dora": Kind(DoRA.create, _LORA, _NO_DROPOUT),
    "relora": Kind(LoRA.create, (*_LORA, *_RESTARTS), _NO_DROPOUT, keep=0.01),
    "qlora": Kind(LoRA.create, _LORA, MappingProxyType({**_NO_DROPOUT, "weight_bits": 4})),
    "low-rank": Kind(LowRank.create, _FACTORS),
    "gradnorm-lorp": Kind(GradNormLoRP.create, (*_FACTORS, "weight_bits", *_RESTARTS)),
}
_ARGUMENTS = ("rank", "alpha", "dropout")


def held_weights(
    config: "Pretrain",
    params: Params,
    dimension_numbers: Callable[[Params], Any],
    key: PRNGKeyArray,
) -> Params:
    """The params as a run holds them.

    Args:
        config: from `train.config.resolve.resolve`.
        params: the model's.
        dimension_numbers: from the params to which of them are matrices, which --weight-bits holds
            in so many bits; with an adapter those that have it. --embedding-bits is for embedding
            and head.
        key: of the adapters.

    Raises:
        ValueError: if the matrices cannot have such adapters.
    """
    if config.adapter is None:
        if config.weight_bits is None:
            return params
        which = jax.tree.map(
            lambda numbers: numbers is not None,
            dimension_numbers(params),
            is_leaf=lambda x: not isinstance(x, dict),
        )
        params = quantize_weights(params, which, bits=config.weight_bits)  # pyrefly: ignore
        if config.embedding_bits is not None:
            whole = quantize_weights(
                {name: params[name] for name in ("embedding", "head") if name in params},
                bits=config.embedding_bits,
            )
            params = {**params, **whole}  # pyrefly: ignore
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
