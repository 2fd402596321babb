"""Fira's way back: P N, and the rest of the gradient, scaled column by column as R was."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax import checks
from galore_optax.projection.recover import Matrix, at, energies, growth, limit


@dataclasses.dataclass(frozen=True)
class Fira:
    r"""The projected step, and the residual of the gradient outside the subspace.

    .. math::
        \Delta W = \alpha P N - \varphi (G - \alpha P R), \quad
        \varphi_i = \frac{\lVert N_i \rVert}{\lVert R_i \rVert}

    with one factor for each column i, α the `scale` of `galore`. The norm of the residual's part
    grows by at most γ = 1.01 a step: a state of one number for each matrix. As in the authors' code
    α is within the residual and not a factor of it.

    Attributes:
        learning_rate: The inner's, a number or a schedule. The limiter divides norms by it;
            otherwise it would limit a warm-up, too. None: the learning rate is constant.

    References:
        Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, equations 8 to 11.
    """

    needs_descent: ClassVar[bool] = True
    learning_rate: optax.ScalarOrSchedule | None = None

    def __post_init__(self):
        if self.learning_rate is not None:
            checks.number_or_schedule(self.learning_rate, "learning_rate", such_as=0.01)

    def init(self, like: jax.ShapeDtypeStruct, rank: int) -> Float[Array, ""]:
        """The norm of the step before: none yet."""
        return jnp.zeros((), like.dtype)

    def __call__(self, own: Matrix, state: Any) -> tuple[Float[Array, "n m"], Any]:
        """The update, and the norm of its part outside the subspace."""
        factor, alpha = growth(own.step, own.projected), own.scale
        if own.orthonormal:  # the residual itself is never in memory
            residual = energies(own.gradient) - alpha * (2 - alpha) * energies(own.projected)
        else:
            residual = energies(own.gradient - alpha * own.back(own.projected))
        rate = at(self.learning_rate, own.count)
        limited, state = limit(factor**2 * residual, state, rate)
        factor = jnp.atleast_2d(limited * factor)
        small = alpha * (own.step + factor * own.projected)
        return own.back(small) - factor * own.gradient, state
