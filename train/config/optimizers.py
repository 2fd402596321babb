"""Optimizers by name, and what every run has around them: schedule, clipping, skipped steps."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import (
    AdaptiveRefresh,
    adamw8bit,
    galore_adafactor,
    galore_adamw,
    galore_adamw8bit,
    gradnorm_lorp_adamw,
    q_galore_adamw8bit,
    unstacked,
)
from galore_optax.layerwise.unstacked import ParamAxes
from galore_optax.transformation import SubspaceTransformation
from models.llama.axes import dimension_numbers, param_axes

if TYPE_CHECKING:
    from train.config.resolve import Resolved


class Recipe(NamedTuple):
    """How a named optimizer is made, and which flags it listens to.

    Attributes:
        make: from the schedule of the learning rate and the options to the optimizer.
        options: fields of the settings, those of `_OF_WEIGHTS` being about the weights.
        defaults: of the options that have others than None.
        adapter: that of `train.config.weights.ADAPTERS` which comes with the name.
        stacks: what of the layers, stacked in a leaf, are to be leaves of their own to it: it does
            something by leaf. GaLore sees to matrices that it projects; None is nothing.
    """

    make: Callable[..., optax.GradientTransformation]
    options: tuple[str, ...]
    defaults: Mapping[str, Any] = MappingProxyType({})
    adapter: str | None = None
    stacks: ParamAxes | None = None


def _adafactor(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    # As published code for language models has it: a given learning rate and a first moment.
    return optax.adafactor(learning_rate, multiply_by_parameter_scale=False, momentum=0.9)


def _galore_adafactor(learning_rate: optax.Schedule, **options: Any) -> SubspaceTransformation:
    return galore_adafactor(learning_rate, momentum=0.9, **options)


def _vectors(params: dict[str, Any]) -> Any:
    """The layers' norms alone: matrices are projected, or large enough for 8 bits each."""
    axes = param_axes(params)
    return jax.tree.map(lambda n: n if n == 1 else None, axes, is_leaf=lambda n: n is None)


# What an optimizer's own arguments are named in the settings, where they are not named alike.
_ARGUMENTS = {"moment_bits": "bits", "gradient_rank": "rank"}
_OF_WEIGHTS = ("weight_bits", "embedding_bits", "stochastic_rounding")

_DECAY = MappingProxyType({"weight_decay": 0.0, "stochastic_rounding": False})
_GALORE = (
    "rank", "update_proj_gap", "scale", "side", "weight_decay", "projection_bits",
    "adaptive_refresh", "stochastic_rounding",
)  # fmt: skip
_GALORE_DEFAULTS = MappingProxyType({**_DECAY, "adaptive_refresh": False, "side": "smaller"})
_EIGHT_BITS = MappingProxyType({**_GALORE_DEFAULTS, "moment_bits": 8})
_Q_GALORE = MappingProxyType({
    **_EIGHT_BITS, "projection_bits": 4, "adaptive_refresh": True, "weight_bits": 8,
    "stochastic_rounding": True,
})  # fmt: skip
_ADAMW = Recipe(
    lambda rate, **options: optax.adamw(rate, **options),
    ("weight_decay", "stochastic_rounding"),
    _DECAY,
)
OPTIMIZERS: dict[str, Recipe] = {
    "adamw": _ADAMW,
    "adamw8bit": Recipe(
        adamw8bit,
        ("weight_decay", "moment_bits", "stochastic_rounding"),
        MappingProxyType({**_DECAY, "moment_bits": 8}),
        stacks=_vectors,
    ),
    "adafactor": Recipe(
        _adafactor,
        ("stochastic_rounding",),
        MappingProxyType({"stochastic_rounding": False}),
        stacks=param_axes,
    ),
    "galore-adamw": Recipe(galore_adamw, _GALORE, _GALORE_DEFAULTS),
    "galore-adamw8bit": Recipe(
        galore_adamw8bit, (*_GALORE, "moment_bits"), _EIGHT_BITS, stacks=_vectors
    ),
    "galore-adafactor": Recipe(_galore_adafactor, _GALORE, _GALORE_DEFAULTS, stacks=_vectors),
    "q-galore-adamw8bit": Recipe(
        q_galore_adamw8bit,
        (*_GALORE, "moment_bits", "weight_bits", "embedding_bits"),
        _Q_GALORE,
        stacks=_vectors,
    ),
    "gradnorm-lorp-adamw": Recipe(
        gradnorm_lorp_adamw,
        ("gradient_rank", *_GALORE[1:], "moment_bits"),
        _GALORE_DEFAULTS,
        adapter="gradnorm-lorp",
    ),
    "lora-adamw": _ADAMW._replace(adapter="lora"),
    "relora-adamw": _ADAMW._replace(adapter="relora"),
    "qlora-adamw": _ADAMW._replace(adapter="qlora"),
}


def learning_rate_schedule(config: "Resolved") -> optax.Schedule:
    """A linear rise over the warm-up steps, then a cosine to a tenth of the peak.

    Update t (from 0) of the warm-up uses (t + 1) / (warmup + 1) of the peak: none is wasted on a
    learning rate of zero. After each restart of adapters it rises again in the same manner, to
    where the cosine is by then (ReLoRA, arXiv:2307.05695, section 3).
    """
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate / 10,
    )
    every, warmup = config.restart_every, config.restart_warmup
    if every is None or warmup is None:
        return cosine

    def restarted(count: Any) -> Any:
        rise = jnp.minimum((count % every + 1) / (warmup + 1), 1)
        return cosine(count) * jnp.where(count < every, 1, rise)

    return restarted


def make_recipe(config: "Resolved") -> optax.GradientTransformation:
    """The named optimizer of a resolved configuration, which neither clips nor skips a step.

    What it does by leaf it does by layer, in the ordinary step as with `--layerwise`.
    """
    recipe = OPTIMIZERS[config.optimizer]
    options = {
        _ARGUMENTS.get(name, name): getattr(config, name)
        for name in recipe.options
        if name not in _OF_WEIGHTS
    }
    if "rank" in options:
        options["adaptive_refresh"] = AdaptiveRefresh() if config.adaptive_refresh else None
        options["seed"] = config.seed
        if recipe.adapter is None:
            options["weight_dimension_numbers"] = dimension_numbers
    tx = recipe.make(learning_rate_schedule(config), **options)
    return tx if recipe.stacks is None else unstacked(tx, recipe.stacks)


def make_optimizer(config: "Resolved") -> optax.GradientTransformationExtraArgs:
    """The optimizer of a resolved configuration; a gradient that is not finite changes nothing."""
    return optax.apply_if_finite(  # pyrefly: ignore[bad-return]
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            make_recipe(config),
        ),
        # Never gives up and applies one: the trainer stops after --max-skipped in a row.
        max_consecutive_errors=int(jnp.iinfo(jnp.int32).max),
    )
