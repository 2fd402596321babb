"""APOLLO's way back: the gradient itself; the subspace only says how long its step is."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax import checks
from galore_optax.projection.recover import Matrix, at, energies, growth, limit


@dataclasses.dataclass(frozen=True)
class Apollo:
    r"""The gradient, scaled as the inner scaled the projected gradient.

    .. math::
        \Delta W = -\alpha \, \varphi \, G, \quad
        \varphi_i = \frac{\lVert N_i \rVert}{\lVert R_i \rVert}

    with one factor for each column i, or one for the whole matrix (APOLLO-Mini), α the `scale` of
    `galore`. The norm of φ G grows by at most 1.01 a step, as Fira's residual: a state of one
    number for each matrix. The published projection is `subspace="gaussian"`.

    Attributes:
        learning_rate: As in `Fira`.
        per: What has a factor of its own, "column" or "matrix".

    References:
        Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, algorithm 1. The `scale` of
        the authors' code is the square of this one.
    """

    needs_descent: ClassVar[bool] = True
    learning_rate: optax.ScalarOrSchedule | None = None
    per: str = "column"

    def __post_init__(self):
        if self.learning_rate is not None:
            checks.number_or_schedule(self.learning_rate, "learning_rate", such_as=0.01)
        checks.choice(self.per, "per", ("column", "matrix"))

    def init(self, like: jax.ShapeDtypeStruct, rank: int) -> Float[Array, ""]:
        """The norm of the step before: none yet."""
        return jnp.zeros((), like.dtype)

    def __call__(self, own: Matrix, state: Any) -> tuple[Float[Array, "n m"], Any]:
        """The update, and its norm."""
        factor = growth(own.step, own.projected, columns=self.per == "column")
        squares = factor**2 * energies(own.gradient)
        limited, state = limit(squares, state, at(self.learning_rate, own.count))
        return -own.scale * jnp.atleast_2d(limited * factor) * own.gradient, state
