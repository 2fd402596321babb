"""Fira and APOLLO: AdamW in a subspace, and updates of full rank."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from galore_optax.projection.apollo import Apollo
from galore_optax.projection.fira import Fira
from galore_optax.projection.leaf import Rank
from galore_optax.recipes.galore import galore_adamw
from galore_optax.recipes.options import with_options_of


@with_options_of(galore_adamw, without=("recover",))
def fira_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Fira with AdamW: GaLore's update and the scaled gradient outside the subspace (`Fira`).

    Its state is that of `galore_adamw` and a number for each matrix.

    Args:
        learning_rate: Learning rate or schedule. The paper pre-trains with 0.01.
        rank: Dimensions of the subspace; the paper uses a quarter to a half of the width.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        **options: The other arguments of `galore_adamw`. The paper's `scale` is 0.25, and 0.0625
            for a 1B model; its subspace is "svd", its moments "keep".

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, algorithm 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import fira_adamw
        >>> state = fira_adamw(0.01, rank=16).init({"w": jnp.ones((64, 256))})
        >>> state.inner[0].mu["w"].shape, state.recovery["w"].shape
        ((16, 256), ())
    """
    recover = Fira(_uncorrected(learning_rate, b1, b2))
    return galore_adamw(learning_rate, rank, recover=recover, b1=b1, b2=b2, **options)


@with_options_of(galore_adamw, without=("recover",))
def apollo_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    *,
    per: str = "column",
    scale: float = 1.0,
    subspace: Any = "gaussian",
    moments: Any = "keep",
    b1: float = 0.9,
    b2: float = 0.999,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: the gradient itself, each column scaled as AdamW scales it in a subspace (`Apollo`).

    Its state is that of `galore_adamw` and a number for each matrix. The subspace is random, so
    that a refresh costs nothing.

    Args:
        learning_rate: Learning rate or schedule. The paper pre-trains with 0.01.
        rank: Dimensions of the subspace; the paper uses a quarter of the width, 256 for 1B and 7B.
        per: What has a factor of its own, "column" or "matrix".
        scale: Factor on the update; the `scale` of the authors' code is its square.
        subspace: As in `galore`; the paper also tries "svd".
        moments: As in `galore`; "keep" is as published: moments keep belonging to the old basis.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        **options: The other arguments of `galore_adamw`.

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, algorithm 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import apollo_adamw
        >>> state = apollo_adamw(0.01, rank=16).init({"w": jnp.ones((64, 256))})
        >>> state.inner[0].mu["w"].shape, state.recovery["w"].shape
        ((16, 256), ())
    """
    recover = Apollo(_uncorrected(learning_rate, b1, b2), per)
    named = {"recover": recover, "scale": scale, "subspace": subspace, "moments": moments}
    return galore_adamw(learning_rate, rank, b1=b1, b2=b2, **named, **options)


@with_options_of(apollo_adamw)
def apollo_mini_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank = 1,
    *,
    per: str = "matrix",
    scale: float = 128**0.5,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: `apollo_adamw` at rank 1, with one factor for a whole matrix; see there.

    The state of a matrix `(in, out)` is 2 · larger side + smaller side + 1 numbers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import apollo_mini_adamw, state_bytes
        >>> state_bytes(apollo_mini_adamw(0.01).init({"w": jnp.ones((64, 256))}))["moments"]
        2052
    """
    return apollo_adamw(learning_rate, rank, per=per, scale=scale, **options)


def _uncorrected(learning_rate: optax.ScalarOrSchedule, b1: Any, b2: Any) -> Callable[[Any], Any]:
    """The learning rate times Adam's bias correction: the authors limit the norm of m / √v."""

    def rate(count: Any) -> Any:
        base = learning_rate(count) if callable(learning_rate) else learning_rate
        return base * jnp.sqrt(1 - b2 ** (count + 1)) / (1 - b1 ** (count + 1))

    return rate
