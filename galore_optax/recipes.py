"""Whole optimizers: GaLore around the inner optimizers of the papers, learning rate included."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import DTypeLike

from galore_optax import checks
from galore_optax.adapters.base import factor_dimension_numbers, is_adapter
from galore_optax.galore import galore
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers, matrices
from galore_optax.projection.leaf import Rank, projections
from galore_optax.projection.schedule import Adaptive
from galore_optax.quantization.state import cast_state, quantize_state
from galore_optax.stages import GaLore
from galore_optax.transformation import subspace_parts, transformation

Mask = optax.Params | Callable[[optax.Params], optax.Params]


def _with_options_of(*functions: Callable[..., Any]) -> Callable[[Any], Any]:
    """Puts functions' keyword options into the signature of a recipe that takes `**options`.

    `help` shows them then, and `optax.inject_hyperparams` finds them.
    """
    options = {k: p for f in functions for k, p in inspect.signature(f).parameters.items()}

    def decorate(recipe: Any) -> Any:
        signature = inspect.signature(recipe)
        own = {k: p for k, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        others = [p for k, p in options.items() if p.kind is p.KEYWORD_ONLY and k not in own]
        recipe.__signature__ = signature.replace(parameters=[*own.values(), *others])
        return recipe

    return decorate


def _adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    nesterov: bool = False,
    bits: int | None = None,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    learning_rate = checks.number_or_schedule(learning_rate, "learning_rate", such_as=0.01)
    b1 = checks.number(b1, "b1", least=0, below=1, such_as=0.9)
    b2 = checks.number(b2, "b2", least=0, below=1, such_as=0.999)
    eps = checks.number(eps, "eps", least=0, such_as=1e-8)
    eps_root = checks.number(eps_root, "eps_root", least=0, such_as=0.0)
    weight_decay = checks.number_or_schedule(weight_decay, "weight_decay", least=0, such_as=0.1)
    checks.choice(nesterov, "nesterov", (False, True))
    for name, dtype in {"mu_dtype": mu_dtype, "state_dtype": state_dtype}.items():
        if dtype is not None:
            checks.float_dtype(dtype, name)
        if dtype is not None and bits is not None:
            raise ValueError(
                f"{name}={checks.said(dtype)} with bits={bits}: moments in {bits} bits are "
                "computed in "
                "float32; leave one of them out"
            )
    if mask is not None:
        mask = checks.mask(mask, "mask")
    adamw = optax.adamw(
        learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )
    if bits is not None:
        return quantize_state(adamw, bits)
    return adamw if state_dtype is None else cast_state(adamw, state_dtype)


@_with_options_of(_adamw, galore)
def galore_adamw(
    learning_rate: optax.ScalarOrSchedule, rank: Rank, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """GaLore with AdamW: the recipe of the paper's pre-training runs.

    `galore_adamw8bit` is the same with `bits=8`, the paper's recipe for a 7B model.
    `q_galore_adamw8bit`, Q-GaLore, is that with bases in 4 bits and adaptive refreshes,
    `projection_bits=4, update_proj_gap=Adaptive(200)`; its weights are quantized by
    `quantize_weights`, and updated with stochastic rounding by `apply_updates`.

    Args:
        learning_rate: Learning rate or schedule. The papers pre-train with 0.01 (7B: 0.005),
            Q-GaLore with 0.015 to 0.004, by size.
        rank: Dimensions of the subspace; the paper uses a quarter to a half of the width.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        eps_root: Added to the second moment within the root.
        mu_dtype: Dtype of the first moment; None takes the params'.
        weight_decay: Decoupled weight decay or a schedule of it, times the learning rate, of the
            whole matrix and without the scale.
        mask: Which leaves decay: a tree of booleans, a prefix of the params' tree, or a function
            that returns one from params of the shapes that the moments have; None: all.
        nesterov: Whether the first moment is Nesterov's.
        bits: Stores the moments in 8 or 4 bits (`quantize_state`); None as floats.
        state_dtype: Dtype in which moments that are floats are stored and computed (`cast_state`);
            None takes the params'. With bfloat16 params give jnp.float32: second moments in
            bfloat16 cannot decay.
        **options: The other arguments of `galore`.

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.3, appendix C;
        Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, algorithm 1.

    Examples:
        >>> import jax, jax.numpy as jnp, galore_optax
        >>> params = grads = {"w": jnp.ones((64, 256))}
        >>> state = galore_optax.galore_adamw(0.01, rank=16, update_proj_gap=100).init(params)
        >>> state.inner[0].mu["w"].nbytes  # of 16 x 256 moments
        16384
        >>> galore_optax.galore_adamw8bit(0.01, rank=16).init(params).inner[0].mu["w"].nbytes
        4160

        Q-GaLore; gradients are with respect to the dequantized weights:

        >>> params = galore_optax.quantize_weights(params)
        >>> tx = galore_optax.q_galore_adamw8bit(0.01, rank=16)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> params = galore_optax.apply_updates(params, updates, jax.random.key(0))
    """
    of_adamw = {k: options.pop(k) for k in inspect.signature(_adamw).parameters if k in options}
    return galore(rank, _adamw(learning_rate, **of_adamw), **options)


def _partial(function: Any, name: str, **constants: Any) -> Any:
    """A recipe with other defaults, and a name and documentation of its own."""
    made = functools.partial(function, **constants)
    said = ", ".join(f"{key}={value!r}" for key, value in constants.items())
    made.__doc__ = f"`{function.__name__}` with {said}; see there."
    made.__name__ = name  # pyrefly: ignore
    return made


galore_adamw8bit = _partial(galore_adamw, "galore_adamw8bit", bits=8)
_q_galore = {"bits": 8, "projection_bits": 4, "update_proj_gap": Adaptive(200)}
q_galore_adamw8bit = _partial(galore_adamw, "q_galore_adamw8bit", **_q_galore)


@_with_options_of(_adamw)
def adamw8bit(
    learning_rate: optax.ScalarOrSchedule, *, bits: int = 8, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """AdamW at full rank with moments stored in 8 bits (`bits=4`: in 4).

    Options are those of `optax.adamw`, but for dtypes of moments; see `galore_adamw`.

    References:
        Dettmers et al., `8-bit Optimizers <https://arxiv.org/abs/2110.02861>`_, 2021.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import adamw8bit
        >>> state = adamw8bit(1e-3).init({"w": jnp.ones((64, 256))})
        >>> state[0].mu["w"].nbytes
        16640
    """
    checks.choice(bits, "bits", (8, 4))
    return _adamw(learning_rate, bits=bits, **options)


@_with_options_of(galore)
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    *,
    momentum: float | None = None,
    dtype_momentum: DTypeLike | None = None,
    decay_rate: float = 0.8,
    decay_offset: float = 0,
    eps: float = 1e-30,
    clipping_threshold: float | None = 1.0,
    min_dim_size_to_factor: int = 1,
    factored: bool = True,
    multiply_by_parameter_scale: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Mask | None = None,
    state_dtype: DTypeLike | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """GaLore with Adafactor at a given learning rate.

    By default without scaling by the parameter's size, as published.

    Args:
        learning_rate: Learning rate or schedule.
        rank: Dimensions of the subspace.
        momentum: Decay rate of a first moment; None keeps none. The paper's runs use 0.9.
        dtype_momentum: Dtype of the first moment; None takes the params'.
        decay_rate: Exponent of the second moment's decay, 1 - t ** -decay_rate.
        decay_offset: Steps by which t is less; the state's count must have passed it.
        eps: Added to the squared gradient.
        clipping_threshold: Largest root mean square of a leaf's update before the learning rate.
        min_dim_size_to_factor: Leaves whose second-largest axis is smaller keep a whole second
            moment. 1 factors every matrix, as published.
        factored: Whether second moments are factored at all.
        multiply_by_parameter_scale: Whether the update is multiplied by the root mean square of the
            (projected) weights.
        weight_decay: Decoupled weight decay, times the learning rate, of the whole matrix.
        weight_decay_rate: The same, not times the learning rate, as in `optax.adafactor`.
        weight_decay_mask: Which leaves decay, as `mask` in `galore_adamw`.
        state_dtype: As in `galore_adamw`.
        **options: The other arguments of `galore`.

    References:
        Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018; Zhao et al.,
        `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import galore_adafactor
        >>> tx = galore_adafactor(0.01, rank=8, momentum=0.9)
        >>> state = tx.init({"w": jnp.ones((64, 256))})
    """
    learning_rate = checks.number_or_schedule(learning_rate, "learning_rate", such_as=0.01)
    weight_decay = checks.number_or_schedule(weight_decay, "weight_decay", least=0, such_as=0.1)
    decay_rate = checks.number(decay_rate, "decay_rate", least=0, such_as=0.8)
    decay_offset = checks.number(decay_offset, "decay_offset", least=0, such_as=0)
    eps = checks.number(eps, "eps", least=0, such_as=1e-30)
    min_dim_size_to_factor = checks.whole(min_dim_size_to_factor, "min_dim_size_to_factor")
    checks.choice(factored, "factored", (True, False))
    checks.choice(multiply_by_parameter_scale, "multiply_by_parameter_scale", (False, True))
    if momentum is not None:
        momentum = checks.number(momentum, "momentum", least=0, below=1, such_as=0.9)
    if dtype_momentum is not None:
        checks.float_dtype(dtype_momentum, "dtype_momentum")
        if momentum is None:
            raise ValueError(
                f"dtype_momentum={checks.said(dtype_momentum)} needs momentum=, such as 0.9"
            )
    if clipping_threshold is not None:
        clipping_threshold = checks.number(
            clipping_threshold, "clipping_threshold", positive=True, such_as=1.0
        )
    steps = [
        optax.scale_by_factored_rms(
            factored, decay_rate, decay_offset, min_dim_size_to_factor, epsilon=eps
        )
    ]
    if clipping_threshold is not None:
        steps.append(optax.clip_by_block_rms(clipping_threshold))
    # The learning rate goes into the momentum, as published; decay stays out of it.
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if multiply_by_parameter_scale:
        steps.append(optax.scale_by_param_block_rms())
    if momentum is not None:
        steps.append(optax.ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_mask is not None:
        weight_decay_mask = checks.mask(weight_decay_mask, "weight_decay_mask")
    decays = [_product(-1, weight_decay, learning_rate)]
    if weight_decay_rate is not None:
        weight_decay_rate = checks.number_or_schedule(
            weight_decay_rate, "weight_decay_rate", least=0, such_as=1e-3
        )
        decays.append(_product(-1, weight_decay_rate))
    steps += [optax.add_decayed_weights(decay, weight_decay_mask) for decay in decays]
    inner = optax.chain(*steps)
    return galore(rank, inner if state_dtype is None else cast_state(inner, state_dtype), **options)


def _product(*factors: Any) -> Any:
    """The product of numbers, or of numbers and schedules."""
    if not any(map(callable, factors)):
        return math.prod(factors)
    return lambda count: math.prod(x(count) if callable(x) else x for x in factors)


@_with_options_of(galore_adamw)
def gradnorm_lorp_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of GradNormLoRP: AdamW, with GaLore on the gradients of an adapter's factors.

    The weights' part of the method, the weight-normalised adapter, is in the params
    (`GradNormLoRP`). Magnitudes, and params without an adapter, have AdamW's update at full size.

    Args:
        learning_rate: Learning rate or schedule.
        rank: The gradients' rank, below the adapter's, which the params have. A fraction is one of
            the adapter's.
        weight_dimension_numbers: As in `galore`; None projects the factors of every adapter, and if
            there is none (factors kept in arrays of your own) what it projects in `galore`.
        **options: The other arguments of `galore_adamw`.

    Raises:
        ValueError: As `galore` and `quantize_state`; at `init`, if `rank` is not below the smaller
            side of every factor, or the params contain the frozen weights.

    References:
        Huang et al., `GradNormLoRP <https://arxiv.org/abs/2412.19616>`_, 2024. Low-rank gradients
        are the paper's; that they are those of a and b, projected by GaLore, is reconstructed.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from galore_optax import GradNormLoRP, gradnorm_lorp_adamw, split
        >>> adapter = GradNormLoRP.create(jnp.ones((64, 256)), jax.random.key(0), rank=8)
        >>> trained, frozen = split({"w": adapter})
        >>> state = gradnorm_lorp_adamw(0.01, rank=4).init(trained)
        >>> state.bases["w"].b.shape, state.inner[0].mu["w"].b.shape
        ((8, 4), (4, 256))
    """
    given = weight_dimension_numbers
    numbers = _factors_or_matrices if given is None else given
    tx = galore_adamw(learning_rate, rank, weight_dimension_numbers=numbers, **options)
    return transformation(_OfFactors(**vars(subspace_parts(tx))))


class _OfFactors(GaLore):
    """GaLore for the factors of adapters, which it is to compress."""

    def init(self, params: optax.Params) -> Any:
        for path, x in jax.tree.leaves_with_path(params, is_leaf=is_adapter):
            if is_adapter(x) and x.base is not None:
                raise ValueError(
                    f"the params at {jax.tree_util.keystr(path)} contain the frozen weight; give "
                    "the first part of galore_optax.split(params)"
                )
        for plan in projections(params, self.numbers, self.rank, self.side):
            if plan is not None and max(plan.ranks, default=0) >= (least := min(plan.view.sizes)):
                raise ValueError(
                    f"rank={checks.said(self.rank)} compresses nothing of the factor at "
                    f"{plan.path}, whose "
                    f"shape is {plan.view.shape}: choose a gradient's rank below {least}, the "
                    "adapter's, or an adapter of higher rank"
                )
        return super().init(params)


def _factors_or_matrices(params: optax.Params) -> optax.Params:
    """The factors of adapters, or every matrix where there is no adapter."""
    if any(map(is_adapter, jax.tree.leaves(params, is_leaf=is_adapter))):
        return factor_dimension_numbers(params)
    return matrices(params)
