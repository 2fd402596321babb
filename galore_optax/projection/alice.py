"""Alice's way back: P N and a compensation for what is outside the subspace."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax import checks
from galore_optax.projection.recover import Matrix, at, energies, limit

_LEAST = 1e-30  # energy of a column that has none outside the subspace


@dataclasses.dataclass(frozen=True)
class Alice:
    r"""The projected step, and the residual divided by the usual size of its entries.

    .. math::
        \Delta W = \alpha (P N - \eta \alpha_c C), \quad
        C = \sqrt{n - r} \, (G - P R) \, \text{diag}(p)^{-1/2}

    where η is the learning rate, α the `scale` of `galore`, and p an exponential mean of the energy
    that each column has outside the subspace: p_i is the mean of ‖G_i‖² - ‖R_i‖². The norm of C
    grows by at most 1.01 a step, as Fira's residual. The state is p and that norm.

    Attributes:
        learning_rate: The inner's, a number or a schedule.
        compensation: The factor α_c.
        decay: Decay rate of the mean, the first moment's as published.

    References:
        Gong et al., `Alice <https://arxiv.org/abs/2502.07752>`_, 2025, theorem 5.1 and algorithm 3.
    """

    learning_rate: optax.ScalarOrSchedule
    compensation: float = 0.4
    decay: float = 0.9

    def __post_init__(self):
        checks.number(self.compensation, "compensation", least=0, such_as=0.4)
        checks.number(self.decay, "decay", least=0, below=1, such_as=0.9)

    def init(self, like: jax.ShapeDtypeStruct) -> tuple[Float[Array, " m"], Float[Array, ""]]:
        """The mean of each column's energy, and the norm of the step before: none yet."""
        return jnp.zeros(like.shape[1], like.dtype), jnp.zeros((), like.dtype)

    def __call__(self, own: Matrix, state: Any) -> tuple[Float[Array, "n m"], Any]:
        """The update, and the new state."""
        mean, previous = state
        (n, _), r = own.gradient.shape, len(own.projected)
        # Of an orthonormal P; the residual itself is never in memory.
        energy = jnp.maximum(energies(own.gradient) - energies(own.projected), 0)
        mean = self.decay * mean + (1 - self.decay) * energy
        factor = (n - r) ** 0.5 * jax.lax.rsqrt(jnp.maximum(mean, _LEAST))
        limited, previous = limit(factor**2 * energy, previous, 1.0)
        factor = at(self.learning_rate, own.count) * self.compensation * limited * factor
        small = own.step + factor * own.projected
        return own.scale * (own.back(small) - factor * own.gradient), (mean, previous)
