"""The table of optimizers by name, each with the flags that it uses, and how a run builds one.

A new one goes into `OPTIMIZERS`, and its name into `Optimizer` of `train.config.flags`.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_optax
from galore_optax import GaLoreDimensionNumbers
from galore_optax.layerwise.unstacked import ParamAxes
from models.llama.axes import dimension_numbers, param_axes
from train.config.settings import ResolvedTraining


class Recipe(NamedTuple):
    """A row of the table."""

    make: Callable[..., optax.GradientTransformation]  # from the learning rate and the options
    # The settings that the optimizer uses, with their defaults. None: the default depends on the
    # model, or the feature is off.
    options: Mapping[str, Any]
    adapter: str | None = None  # the key in `train.config.weights.ADAPTERS` that it always uses
    # Selects the stacked leaves that are split into one leaf per layer, for optimizers that treat
    # each leaf separately, besides `_vectors` for moments of few bits. GaLore itself splits the
    # matrices that it projects.
    stacks: ParamAxes | None = None
    # Whether projected updates are made from the gradient itself (galore's `recover`).
    recovers: bool = False
    learning_rate: float | None = None  # the paper's; None: by model and family


def _cast(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """A function like `make` that takes the `state_dtype`, too, as GaLore's recipes do."""

    def made(learning_rate: Any, state_dtype: Any, **options: Any) -> Any:
        return galore_optax.cast_state(make(learning_rate, **options), state_dtype)

    return made


def _vectors(params: dict[str, Any]) -> Any:
    """Selects the layers' norms: matrices are split by GaLore, or each large enough to quantize."""
    axes = param_axes(params)
    return jax.tree.map(lambda n: n if n == 1 else None, axes, is_leaf=_is_none)


def _is_none(x: Any) -> bool:
    return x is None


def _is_head(params: Any) -> Any:
    """Selects the last layer: the head, or the embedding if that is the head, too."""
    names = ("head", "classifier", "embedding")
    last = next((name for name in names if name in params), None)
    return {name: jax.tree.map(lambda _, own=name == last: own, x) for name, x in params.items()}


def _all_matrices(params: Any) -> Any:
    """Dimension numbers of the layers' matrices, the embedding and the head (vocabulary, width)."""
    tables = {"embedding": GaLoreDimensionNumbers(0, 1), "head": GaLoreDimensionNumbers(1, 0)}
    return {**dimension_numbers(params), **{k: v for k, v in tables.items() if k in params}}


# The optimizers' arguments that have other names than the settings.
_ARGUMENTS = {"moment_bits": "bits", "gradient_rank": "rank"}
_OF_WEIGHTS = ("weight_bits", "embedding_bits", "stochastic_rounding")

# `train.config.resolve` has these defaults: they depend on the dtype of the weights.
_FLOATS = {"state_dtype": None}
_DECAY = {"weight_decay": 0.0, "stochastic_rounding": None}
_BETAS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
_ADAMW = {**_DECAY, **_BETAS}
_IN_SUBSPACE = {
    "update_proj_gap": None, "scale": None, "side": "smaller", "projection_bits": None,
    "subspace": "randomized", "moments": None, "stagger": False, "adaptive_refresh": False,
    **_DECAY,
}  # fmt: skip
_GALORE = {"rank": None, **_IN_SUBSPACE}
_GALORE_8BIT = {**_GALORE, **_BETAS, "moment_bits": 8}
_GALORE_FLOATS = {**_GALORE, **_FLOATS}
_Q_GALORE = {
    **_GALORE_8BIT, "projection_bits": 4, "adaptive_refresh": True, "weight_bits": 8,
    "embedding_bits": None, "stochastic_rounding": True,
}  # fmt: skip
_LORP = {"gradient_rank": None, **_IN_SUBSPACE, **_BETAS, "moment_bits": None, **_FLOATS}
_FIRA = {**_GALORE_FLOATS, **_BETAS, "moment_bits": None}
# Side and storage of the subspace, whose method is part of what these are.
_ALICE = {
    name: value for name, value in {**_FIRA, "scale": 0.3, "b2": 0.9}.items()
    if name not in ("subspace", "moments")
}  # fmt: skip
_APOLLO = {**_ALICE, "scale": 1.0, "b2": 0.999}
_ALICE |= {"compensation": 0.4, "tracking": 0.999, "leading": None}
_RACS = {"scale": 0.05, **_ADAMW, **_FLOATS}
_PLAIN = Recipe(_cast(optax.adamw), {**_ADAMW, **_FLOATS})
# As published code for language models has it: a given learning rate and a first moment.
_ADAFACTOR = partial(
    optax.adafactor,
    multiply_by_parameter_scale=False,
    momentum=0.9,
    dtype_momentum=None,  # pyrefly: ignore[bad-argument-type] (the state's)
)
_RACS_OF = partial(
    galore_optax.racs,
    weight_dimension_numbers=dimension_numbers,  # pyrefly: ignore[bad-argument-type]
)
_MUON_OF = partial(
    galore_optax.muon,
    weight_dimension_numbers=dimension_numbers,  # pyrefly: ignore[bad-argument-type]
)
_SCALE_OF = partial(
    galore_optax.scale_sgd, last_layer=_is_head, weight_dimension_numbers=_all_matrices
)
_GALORE_ADAFACTOR = partial(galore_optax.galore_adafactor, momentum=0.9)
OPTIMIZERS: Mapping[str, Recipe] = {
    "adamw": _PLAIN,
    "adamw8bit": Recipe(galore_optax.adamw8bit, {**_ADAMW, "moment_bits": 8}),
    "adafactor": Recipe(
        _cast(_ADAFACTOR), {"stochastic_rounding": None, **_FLOATS}, stacks=param_axes
    ),
    "galore-adamw": Recipe(galore_optax.galore_adamw, {**_GALORE_FLOATS, **_BETAS}),
    "galore-adamw8bit": Recipe(galore_optax.galore_adamw8bit, _GALORE_8BIT),
    "galore-adafactor": Recipe(_GALORE_ADAFACTOR, _GALORE_FLOATS, stacks=_vectors),
    "q-galore-adamw8bit": Recipe(galore_optax.q_galore_adamw8bit, _Q_GALORE),
    "gradnorm-lorp-adamw": Recipe(galore_optax.gradnorm_lorp_adamw, _LORP, adapter="gradnorm-lorp"),
    "fira-adamw": Recipe(galore_optax.fira_adamw, _FIRA, recovers=True),
    "apollo-adamw": Recipe(galore_optax.apollo_adamw, _APOLLO, recovers=True),
    "apollo-mini-adamw": Recipe(
        galore_optax.apollo_mini_adamw, {**_APOLLO, "rank": 1, "scale": 128**0.5}, recovers=True
    ),
    "alice": Recipe(galore_optax.alice, _ALICE, recovers=True, learning_rate=0.02),
    "racs": Recipe(_cast(_RACS_OF), _RACS, learning_rate=0.02),
    "scale": Recipe(_cast(_SCALE_OF), {**_ADAMW, **_FLOATS}),
    "muon": Recipe(_MUON_OF, {**_ADAMW, "moment_bits": None, **_FLOATS}),
    "lora-adamw": _PLAIN._replace(adapter="lora"),
    "relora-adamw": _PLAIN._replace(adapter="relora"),
    "qlora-adamw": _PLAIN._replace(adapter="qlora"),
}


def measurable(name: str, recipe: Recipe) -> bool:
    """Whether an optimizer's bases are orthonormal, and those of the weights' gradients."""
    # APOLLO's are random and not orthonormal; those of gradnorm-lorp-adamw are of factors.
    own = "update_proj_gap" in recipe.options and recipe.adapter is None
    return own and not name.startswith("apollo")


def learning_rate_schedule(config: ResolvedTraining) -> optax.Schedule:
    """Linear warm-up, then what `--schedule` names.

    Update t (from 0) of the warm-up uses (t + 1) / (warmup + 1) of the peak: never zero. After each
    restart of adapters such a warm-up leads back to the schedule (ReLoRA, arXiv:2307.05695,
    sec. 3).
    """
    schedule = _without_restarts(config)
    every, warmup = config.restart_every, config.restart_warmup
    if every is None or warmup is None:
        return schedule

    def restarted(count: Any) -> Any:
        rise = jnp.minimum((count % every + 1) / (warmup + 1), 1)
        return schedule(count) * jnp.where(count < every, 1, rise)

    return restarted


def _without_restarts(config: ResolvedTraining) -> optax.Schedule:
    peak, first, steps = config.learning_rate, config.warmup_steps, config.steps
    end = peak * (1 if config.floor is None else config.floor)
    start = peak / (first + 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, peak, first, steps, end)
    falls = {"linear": steps - first, "constant": 0, "wsd": config.decay_steps or 0}
    fall = falls[config.schedule]
    parts = [(first, start, peak), (steps - first - fall, peak, peak), (fall, peak, end)]
    parts = [(length, optax.linear_schedule(a, b, length)) for length, a, b in parts if length]
    ends = itertools.accumulate(length for length, _ in parts[:-1])
    return optax.join_schedules([part for _, part in parts], list(ends))


def make_recipe(config: ResolvedTraining, refreshes: bool = True) -> optax.GradientTransformation:
    """Makes the named optimizer without clipping; it treats each layer separately, in any step.

    Without `refreshes` it is for steps in which no subspace is refreshed.
    """
    recipe = OPTIMIZERS[config.optimizer]
    names = [name for name in recipe.options if name not in _OF_WEIGHTS]
    options = {_ARGUMENTS.get(name, name): getattr(config, name) for name in names}
    if "rank" in options:
        if options.pop("stagger"):
            options["update_proj_gap"] = galore_optax.Staggered(options["update_proj_gap"])
        if options.pop("adaptive_refresh"):
            options["update_proj_gap"] = galore_optax.Adaptive(options["update_proj_gap"])
        options["seed"] = config.seed
        if config.compress_gradients:
            options["sum_over"] = "data"
        if recipe.adapter is None:
            options["weight_dimension_numbers"] = dimension_numbers
    if config.optimizer == "muon":
        options["product_dtype"] = config.dtype
    tx = recipe.make(learning_rate_schedule(config), **options)
    stacks = recipe.stacks
    if recipe.adapter is None and options.get("bits") is not None:
        stacks = _vectors
    tx = tx if stacks is None else galore_optax.unstacked(tx, stacks)
    return tx if refreshes else galore_optax.without_refresh(tx)


def make_optimizer(config: ResolvedTraining) -> optax.GradientTransformationExtraArgs:
    """The named optimizer of gradients clipped by their global norm; see `make_recipe`."""
    return clipped(make_recipe(config), config.clip_norm)


def clipped(
    recipe: optax.GradientTransformation, norm: float | None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of gradients that are clipped to a global norm; None leaves them."""
    clip = optax.identity() if norm is None else optax.clip_by_global_norm(norm)
    return optax.chain(clip, recipe)
