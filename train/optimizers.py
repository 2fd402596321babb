"""Optimizers by name, and what every run has around them: schedule, clipping, skipped steps."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import optax

from galore_optax import galore_adafactor, galore_adamw

if TYPE_CHECKING:
    from train.config import Resolved


class Recipe(NamedTuple):
    """How a named optimizer is made, and which flags it listens to."""

    make: Callable[..., optax.GradientTransformation]
    options: tuple[str, ...]


def _adafactor(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    # As published code for language models has it: a given learning rate and a first moment.
    return optax.adafactor(learning_rate, multiply_by_parameter_scale=False, momentum=0.9)


def _galore_adafactor(learning_rate: optax.Schedule, **options: Any):
    # As optax's Adafactor does, leave small leaves whole: norms, stacked over the layers, would be
    # taken for matrices and factored across layers.
    return galore_adafactor(learning_rate, momentum=0.9, min_dim_size_to_factor=128, **options)


_GALORE = ("rank", "update_proj_gap", "scale", "weight_decay")
OPTIMIZERS: dict[str, Recipe] = {
    "adamw": Recipe(lambda rate, **options: optax.adamw(rate, **options), ("weight_decay",)),
    "adafactor": Recipe(_adafactor, ()),
    "galore-adamw": Recipe(galore_adamw, _GALORE),
    "galore-adafactor": Recipe(_galore_adafactor, _GALORE),
}


def learning_rate_schedule(config: "Resolved") -> optax.Schedule:
    """A linear rise over the warm-up steps, then a cosine to a tenth of the peak.

    Update t (from 0) of the warm-up uses (t + 1) / (warmup + 1) of the peak: none is wasted on a
    learning rate of zero.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate / 10,
    )


def make_recipe(
    config: "Resolved", dimension_numbers: Callable[[dict[str, Any]], Any]
) -> optax.GradientTransformation:
    """The named optimizer of a resolved configuration, which neither clips nor skips a step.

    Args:
        config: from `train.config.resolve`.
        dimension_numbers: from the params to which of them GaLore projects, and how.
    """
    recipe = OPTIMIZERS[config.optimizer]
    options = {name: getattr(config, name) for name in recipe.options}
    if "rank" in options:
        options |= {"weight_dimension_numbers": dimension_numbers, "seed": config.seed}
    return recipe.make(learning_rate_schedule(config), **options)


def make_optimizer(
    config: "Resolved", dimension_numbers: Callable[[dict[str, Any]], Any]
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a resolved configuration; a gradient that is not finite changes nothing.

    Args:
        config: from `train.config.resolve`.
        dimension_numbers: from the params to which of them GaLore projects, and how.
    """
    return optax.apply_if_finite(  # pyrefly: ignore[bad-return]
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            make_recipe(config, dimension_numbers),
        ),
        # Never gives up and applies one: the trainer stops after --max-skipped in a row.
        max_consecutive_errors=int(jnp.iinfo(jnp.int32).max),
    )
