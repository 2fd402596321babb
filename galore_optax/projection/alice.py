"""Alice's way back: P N and a compensation for what is outside the subspace."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax import checks
from galore_optax.projection.recover import Matrix, at, energies, limit

_LEAST = 1e-30  # energy of a column that is zero
# The least share of a column's energy that counts as outside the subspace: less than that is a
# rounding error, and would be scaled up to the size of the other columns.
_SHARE = 1e-6


@dataclasses.dataclass(frozen=True)
class Alice:
    r"""The projected step, and the residual divided by the usual size of its entries.

    .. math::
        \Delta W = \alpha (P N - \eta \alpha_c C), \quad
        C = \sqrt{n - r} \, (G - P R) \, \text{diag}(p)^{-1/2}

    where η is the learning rate, α the `scale` of `galore`, and p an exponential mean of the energy
    that each column has outside the subspace: ‖G_i - (P R)_i‖², but at least 1e-6 ‖G_i‖² (more if G
    has fewer bits than float32). The norm of C grows by at most 1.01 a step, as Fira's residual.
    The state is p and that norm. With `tracking` it also has an exponential mean of R Rᵀ, and a new
    subspace is found from this mean and the gradient together. Also where N is zero C is not:
    freeze a leaf outside of `galore`, not by `optax.set_to_zero` in it.

    Attributes:
        learning_rate: The inner's, a number or a schedule.
        compensation: The factor α_c.
        decay: Decay rate of the mean, the first moment's as published.
        tracking: Decay rate of the mean of R Rᵀ, the paper's β₃; 0, its Alice-0, keeps none.

    References:
        Gong et al., `Alice <https://arxiv.org/abs/2502.07752>`_, 2025, theorem 5.1 and algorithm 3.
    """

    needs_descent: ClassVar[bool] = True
    learning_rate: optax.ScalarOrSchedule
    compensation: float = 0.4
    decay: float = 0.9
    tracking: float = 0.0

    def __post_init__(self):
        checks.number_or_schedule(self.learning_rate, "learning_rate", such_as=0.01)
        checks.number(self.compensation, "compensation", least=0, such_as=0.4)
        checks.number(self.decay, "decay", least=0, below=1, such_as=0.9)
        checks.static(self.tracking, "tracking")
        checks.number(self.tracking, "tracking", least=0, below=1, such_as=0.999)

    @property
    def history(self) -> "_History | None":
        """The columns that stand for earlier gradients; None without `tracking`."""
        return _History(self.tracking) if self.tracking else None

    def init(self, like: jax.ShapeDtypeStruct, rank: int) -> tuple[Array, ...]:
        """The mean of the columns' energies, the norm of the step before, the mean of R Rᵀ: 0."""
        shapes = [like.shape[1:], ()] + [(rank, rank)] * bool(self.tracking)
        return tuple(jnp.zeros(shape, like.dtype) for shape in shapes)

    def __call__(self, own: Matrix, state: Any) -> tuple[Float[Array, "n m"], Any]:
        """The update, and the new state."""
        mean, previous, *tracked = state
        (n, _), r = own.gradient.shape, len(own.projected)
        whole, least = energies(own.gradient), float(jnp.finfo(own.gradient.dtype).eps)
        if own.orthonormal:  # the residual itself is never in memory
            energy = whole - energies(own.projected)
        else:
            energy = energies(own.gradient - own.back(own.projected))
        energy = jnp.maximum(energy, max(_SHARE, 16 * least**2) * whole)
        mean = _mean(self.decay, mean, energy)
        factor = (n - r) ** 0.5 * jax.lax.rsqrt(jnp.maximum(mean, _LEAST))
        limited, previous = limit(factor**2 * energy, previous, 1.0)
        factor = at(self.learning_rate, own.count) * self.compensation * limited * factor[None]
        if tracked:
            r = own.projected.astype(mean.dtype)
            tracked = [_mean(self.tracking, tracked[0], r @ r.T)]
        small = own.scale * (own.step + factor * own.projected)
        update = own.back(small) - own.scale * factor * own.gradient
        return update, (mean, previous, *tracked)


def _mean(decay: Any, mean: Array, new: Array) -> Array:
    """The new exponential mean; the old one where `new` is not finite."""
    return jnp.where(jnp.isfinite(new), decay * mean + (1 - decay) * new, mean)


@dataclasses.dataclass(frozen=True)
class _History:
    """Columns H such that [G, H] [G, H]ᵀ is β₃ P M Pᵀ + (1 - β₃) G Gᵀ up to a factor.

    M is the mean of R Rᵀ; no subspace depends on the factor. When P changes, the numbers in M stay
    as they are, as published.
    """

    decay: float

    def __call__(self, state: Any, basis: Float[Array, "n r"]) -> Float[Array, "n r"]:
        _, _, mean = state
        values, vectors = jnp.linalg.eigh(mean)
        root = vectors * jnp.sqrt(jnp.maximum(values, 0))
        return (self.decay / (1 - self.decay)) ** 0.5 * basis.astype(mean.dtype) @ root
