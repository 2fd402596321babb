"""Alice: AdamW in a subspace that is switched, and a compensation for the rest."""

from functools import partial
from typing import Any

import optax

from galore_optax import checks
from galore_optax.projection.alice import Alice
from galore_optax.projection.leaf import Rank
from galore_optax.projection.subspace import switched
from galore_optax.recipes.galore import galore_adamw
from galore_optax.recipes.options import with_options_of


@with_options_of(galore_adamw, without=("recover", "subspace"))
def alice(
    learning_rate: optax.ScalarOrSchedule,
    rank: Rank,
    *,
    leading: int | None = None,
    compensation: float = 0.4,
    tracking: float = 0.999,
    scale: float = 0.3,
    moments: Any = "keep",
    b1: float = 0.9,
    b2: float = 0.9,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Alice with AdamW: a subspace of leading and of random directions, the rest compensated.

    Its state is that of `galore_adamw` and, for each matrix, its columns' mean energies, a norm,
    and the mean of R Rᵀ, from which a new subspace is found together with the gradient (`Alice`).
    Moments are corrected for their start at zero, as AdamW's are.

    Args:
        learning_rate: Learning rate or schedule. The paper pre-trains with 0.02.
        rank: Dimensions of the subspace; the paper uses 128 to 512.
        leading: How many of them are leading directions; the others are drawn from the rest of the
            space. Default: 5/16 of the rank, the paper's 160 of 512 for a 1B model.
        compensation: The factor α_c; the paper has 0.2 for a 1B model.
        tracking: Decay rate of the mean of R Rᵀ; with 0, the paper's Alice-0, a new subspace is
            found from the gradient alone.
        scale: Factor on the whole update; the paper has 0.25 for a 1B model.
        moments: As in `galore`; "keep" is as published.
        b1: Decay rate of the first moment, and of the columns' energies.
        b2: Decay rate of the second moment.
        **options: The other arguments of `galore_adamw`.

    References:
        Gong et al., `Alice <https://arxiv.org/abs/2502.07752>`_, 2025, algorithm 4, table 9.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import alice
        >>> state = alice(0.02, rank=16, leading=4).init({"w": jnp.ones((64, 256))})
        >>> [x.shape for x in state.recovery["w"]]
        [(256,), (), (16, 16)]
    """
    leading = None if leading is None else checks.whole(leading, "leading")
    subspace = partial(switched, leading=leading)
    recover = Alice(learning_rate, compensation, b1, tracking)
    named = {"recover": recover, "subspace": subspace, "scale": scale, "moments": moments}
    return galore_adamw(learning_rate, rank, b1=b1, b2=b2, **named, **options)
