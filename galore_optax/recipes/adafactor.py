"""GaLore around Adafactor."""

import math
from typing import Any

import optax
from jax.typing import DTypeLike

from galore_optax import checks
from galore_optax.galore import galore
from galore_optax.projection.leaf import Rank
from galore_optax.quantization.state import cast_state
from galore_optax.recipes.options import Mask, with_options_of


@with_options_of(galore)
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
        weight_decay_mask: Which leaves decay, as `mask` in `galore_adamw`; a function is given the
            matrices of a stack one by one, in a tuple.
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
