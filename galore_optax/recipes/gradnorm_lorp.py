"""The optimizer of GradNormLoRP: GaLore on the gradients of an adapter's factors."""

from typing import Any

import jax
import optax

from galore_optax import checks
from galore_optax.adapters.base import factor_dimension_numbers, is_adapter
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers, matrices
from galore_optax.projection.leaf import Rank, projections
from galore_optax.recipes.galore import galore_adamw
from galore_optax.recipes.options import with_options_of
from galore_optax.stages import GaLore
from galore_optax.transformation import subspace_parts, transformation


@with_options_of(galore_adamw)
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
        rank: The gradients' rank, below the rank of the adapters in the params. A fraction is one
            of the adapter's rank.
        weight_dimension_numbers: As in `galore`; None projects the factors of every adapter, and if
            there is none (factors kept in arrays of your own) what it projects in `galore`.
        **options: The other arguments of `galore_adamw`.

    Raises:
        ValueError: As `galore` and `quantize_state`; at `init`, if `rank` is not below the smaller
            side of every factor, or the params contain the frozen weights.

    References:
        Huang et al., `GradNormLoRP <https://arxiv.org/abs/2412.19616>`_, 2024. Low-rank gradients
        are the paper's; projecting those of a and b by GaLore is our reconstruction.

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
