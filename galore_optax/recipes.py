"""Whole optimizers: GaLore around the inner optimizers of the papers, learning rate included."""

import functools
from typing import Any

import jax
import optax

from galore_optax import checks
from galore_optax.adapters.base import factor_dimension_numbers, is_adapter
from galore_optax.galore import galore
from galore_optax.projection.dimension_numbers import (
    GaLoreDimensionNumbers,
    WeightDimensionNumbers,
)
from galore_optax.projection.leaf import Rank, projections
from galore_optax.projection.moments import MomentsFunction
from galore_optax.projection.schedule import Adaptive, RefreshGap
from galore_optax.projection.subspace import FindSubspace
from galore_optax.quantization.state import quantize_state
from galore_optax.stages import GaLore
from galore_optax.transformation import subspace_parts, transformation


def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    *,
    update_proj_gap: RefreshGap = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bits: int | None = None,
    subspace: str | FindSubspace = "randomized",
    side: str = "smaller",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moments: str | MomentsFunction | None = None,
    projection_bits: int | None = None,
    seed: int = 0,
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
        update_proj_gap: When subspaces are refreshed, as in `galore`.
        scale: Factor on the update of projected leaves (α).
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, of the whole matrix and without the scale.
        bits: Stores the moments in 8 or 4 bits (`quantize_state`); None as floats.
        subspace: As in `galore`, like the following.
        side: Which side is projected.
        weight_dimension_numbers: Which leaves are matrices.
        moments: What becomes of the moments at a refresh.
        projection_bits: Stores the bases in 4 or 8 bits.
        seed: Of the random numbers.

    Raises:
        ValueError: As `galore` and `quantize_state`.

    References:
        Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, algorithm 2, section 4.3
        and appendix C; Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024,
        algorithm 1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from galore_optax import (
        ...     apply_updates, galore_adamw, galore_adamw8bit, q_galore_adamw8bit, quantize_weights
        ... )
        >>> params = {"w": jnp.ones((64, 256))}
        >>> state = galore_adamw(0.01, rank=16, update_proj_gap=100).init(params)
        >>> state.inner[0].mu["w"].nbytes  # of 16 x 256 moments
        16384
        >>> galore_adamw8bit(0.01, rank=16).init(params).inner[0].mu["w"].nbytes
        4160

        Q-GaLore with quantized weights:

        >>> params, tx = quantize_weights(params), q_galore_adamw8bit(0.01, rank=16)
        >>> grads = {"w": jnp.ones((64, 256))}  # with respect to the dequantized weight
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> params = apply_updates(params, updates, jax.random.key(0))
    """
    return galore(
        rank,
        _adamw(learning_rate, b1, b2, eps, weight_decay, bits),
        update_proj_gap=update_proj_gap,
        scale=scale,
        subspace=subspace,
        side=side,
        weight_dimension_numbers=weight_dimension_numbers,
        moments=moments,
        projection_bits=projection_bits,
        seed=seed,
    )


def _partial(function: Any, name: str, **constants: Any) -> Any:
    """A recipe with other defaults, which has a name and documentation of its own."""
    made = functools.partial(function, **constants)
    said = ", ".join(f"{key}={value!r}" for key, value in constants.items())
    made.__doc__ = f"`{function.__name__}` with {said}; see there."
    made.__name__ = name  # pyrefly: ignore
    return made


galore_adamw8bit = _partial(galore_adamw, "galore_adamw8bit", bits=8)
q_galore_adamw8bit = _partial(
    galore_adamw,
    "q_galore_adamw8bit",
    bits=8,
    projection_bits=4,
    update_proj_gap=Adaptive(200),
)


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bits: int = 8,
) -> optax.GradientTransformationExtraArgs:
    """AdamW at full rank with moments stored in 8 bits.

    Args:
        learning_rate: Learning rate or schedule.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        bits: Of a moment, 8 or 4, as in `quantize_state`.

    Raises:
        ValueError: As `quantize_state`.

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
    return _adamw(learning_rate, b1, b2, eps, weight_decay, bits)


def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    *,
    update_proj_gap: RefreshGap = 200,
    scale: float = 0.25,
    momentum: float | None = None,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    clipping_threshold: float | None = 1.0,
    min_dim_size_to_factor: int = 1,
    weight_decay: float = 0.0,
    subspace: str | FindSubspace = "randomized",
    side: str = "smaller",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    moments: str | MomentsFunction | None = None,
    projection_bits: int | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore with Adafactor at a given learning rate (no scaling by the parameter's size).

    Args:
        learning_rate: Learning rate or schedule.
        rank: Dimensions of the subspace.
        update_proj_gap: When subspaces are refreshed, as in `galore`.
        scale: Factor on the update of projected leaves (α).
        momentum: Decay rate of a first moment; None keeps none. The paper's runs use 0.9.
        decay_rate: Exponent of the second moment's decay, 1 - t ** -decay_rate.
        eps: Added to the squared gradient.
        clipping_threshold: Largest root mean square of a leaf's update before the learning rate.
        min_dim_size_to_factor: Leaves whose second-largest axis is smaller keep a whole second
            moment. 1 factors every matrix, as published.
        weight_decay: Decoupled weight decay, times the learning rate, of the whole matrix.
        subspace: As in `galore`, like the following.
        side: Which side is projected.
        weight_dimension_numbers: Which leaves are matrices.
        moments: What becomes of the moments at a refresh.
        projection_bits: Stores the bases in 4 or 8 bits.
        seed: Of the random numbers.

    Raises:
        ValueError: As `galore`.

    References:
        Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018; Zhao et al.,
        `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import galore_adafactor
        >>> tx = galore_adafactor(0.01, rank=8, momentum=0.9)
        >>> state = tx.init({"w": jnp.ones((64, 256))})
    """
    checks.number_or_schedule(learning_rate, "learning_rate", such_as=0.01)
    checks.number(weight_decay, "weight_decay", least=0, such_as=0.1)
    checks.number(decay_rate, "decay_rate", least=0, such_as=0.8)
    checks.number(eps, "eps", least=0, such_as=1e-30)
    checks.whole(min_dim_size_to_factor, "min_dim_size_to_factor")
    if momentum is not None:
        checks.number(momentum, "momentum", least=0, below=1, such_as=0.9)
    if clipping_threshold is not None:
        checks.number(clipping_threshold, "clipping_threshold", least=0, such_as=1.0)
    steps = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, epsilon=eps, min_dim_size_to_factor=min_dim_size_to_factor
        )
    ]
    if clipping_threshold is not None:
        steps.append(optax.clip_by_block_rms(clipping_threshold))
    # The learning rate goes into the momentum, as published; decay stays out of it.
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if momentum is not None:
        steps.append(optax.ema(momentum, debias=False))
    if callable(learning_rate):
        steps.append(optax.add_decayed_weights(lambda count: -weight_decay * learning_rate(count)))
    else:
        steps.append(optax.add_decayed_weights(-weight_decay * learning_rate))
    return galore(
        rank,
        optax.chain(*steps),
        update_proj_gap=update_proj_gap,
        scale=scale,
        subspace=subspace,
        side=side,
        weight_dimension_numbers=weight_dimension_numbers,
        moments=moments,
        projection_bits=projection_bits,
        seed=seed,
    )


def gradnorm_lorp_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    update_proj_gap: RefreshGap = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bits: int | None = None,
    subspace: str | FindSubspace = "randomized",
    side: str = "smaller",
    moments: str | MomentsFunction | None = None,
    projection_bits: int | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of GradNormLoRP: AdamW, with GaLore on the gradients of an adapter's factors.

    The weights' part of the method, the weight-normalised adapter, is in the params
    (`GradNormLoRP`). Magnitudes, and params without an adapter, have AdamW's update at full size.
    Arguments that are not listed are those of `galore_adamw`.

    Args:
        learning_rate: Learning rate or schedule.
        rank: The gradients' rank, below the adapter's, which the params have. A fraction is one of
            the adapter's.
        weight_dimension_numbers: As in `galore`; None projects the factors of every adapter, and if
            there is none (factors kept in arrays of your own) every leaf with two axes.
        update_proj_gap: See `galore_adamw`, like the following.
        scale: Factor on the update of the factors.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, of the trained params.
        bits: Stores the moments in 8 or 4 bits; None as floats.
        subspace: How to find it.
        side: Which side is projected; the smaller one of a factor is the adapter's rank.
        moments: What becomes of the moments at a refresh.
        projection_bits: Stores the bases in 4 or 8 bits.
        seed: Of the random numbers.

    Raises:
        ValueError: As `galore` and `quantize_state`; at `init`, if `rank` is not below the smaller
            side of every factor, or the params contain the frozen weights.

    References:
        Huang et al., `GradNormLoRP <https://arxiv.org/abs/2412.19616>`_, 2024. That low-rank
        approximations are applied to the gradient matrices is the paper's; that these are the
        gradients of a and b, and GaLore's the projection, is reconstructed.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from galore_optax import GradNormLoRP, gradnorm_lorp_adamw, split
        >>> adapter = GradNormLoRP.create(jnp.ones((64, 256)), jax.random.key(0), rank=8)
        >>> trained, frozen = split({"w": adapter})
        >>> state = gradnorm_lorp_adamw(0.01, rank=4).init(trained)
        >>> state.bases["w"].b.shape, state.inner[0].mu["w"].b.shape
        ((8, 4), (4, 256))
    """
    tx = galore_adamw(
        learning_rate,
        rank,
        update_proj_gap=update_proj_gap,
        scale=scale,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        bits=bits,
        subspace=subspace,
        side=side,
        weight_dimension_numbers=weight_dimension_numbers or _factors_or_matrices,
        moments=moments,
        projection_bits=projection_bits,
        seed=seed,
    )
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
                    f"rank={self.rank!r} compresses nothing of the factor at {plan.path}, whose "
                    f"shape is {plan.view.shape}: choose a gradient's rank below {least}, the "
                    "adapter's, or an adapter of higher rank"
                )
        return super().init(params)


def _adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any,
    b2: Any,
    eps: Any,
    weight_decay: Any,
    bits: int | None,
) -> optax.GradientTransformationExtraArgs:
    checks.number_or_schedule(learning_rate, "learning_rate", such_as=0.01)
    checks.number(b1, "b1", least=0, below=1, such_as=0.9)
    checks.number(b2, "b2", least=0, below=1, such_as=0.999)
    checks.number(eps, "eps", least=0, such_as=1e-8)
    checks.number(weight_decay, "weight_decay", least=0, such_as=0.1)
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return adamw if bits is None else quantize_state(adamw, bits)


def _factors_or_matrices(params: optax.Params) -> optax.Params:
    """The factors of adapters, or every leaf with two axes where there is no adapter."""
    if any(map(is_adapter, jax.tree.leaves(params, is_leaf=is_adapter))):
        return factor_dimension_numbers(params)

    def numbers(x: Any) -> Any:
        return GaLoreDimensionNumbers() if len(x.shape) == 2 else None

    return jax.tree.map(numbers, params)
