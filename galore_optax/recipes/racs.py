"""RACS: the gradient with its rows and columns scaled; its state is two vectors per matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax import checks
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers
from galore_optax.projection.recover import energies, limit
from galore_optax.recipes.matrices import of_matrices, with_adam_for_others
from galore_optax.recipes.options import Mask

_LEAST = 1e-30  # of what is divided by, for a row or column of zeros


class Scales(NamedTuple):
    """What RACS remembers of a matrix (n, m)."""

    rows: Float[Array, " n"]  # q
    columns: Float[Array, " m"]  # s
    norm: Float[Array, ""]  # of the update before, 0 if there was none


def scale_by_racs(
    weight_dimension_numbers: WeightDimensionNumbers = None,
    *,
    scale: float = 0.05,
    decay: float = 0.9,
    steps: int = 5,
) -> optax.GradientTransformation:
    r"""Row and column scaled SGD, for every matrix; other leaves stay as they are.

    .. math::
        s \leftarrow \frac{(G^{\odot 2})^\top q}{\lVert q \rVert^2}, \quad
        q \leftarrow \frac{G^{\odot 2} s}{\lVert s \rVert^2}, \quad
        \text{update} = \alpha \, \text{diag}(\bar q)^{-1/2} \, G \, \text{diag}(\bar s)^{-1/2}

    The two are repeated `steps` times from q = 1, and their exponential means are what G is scaled
    by. The update's norm grows by at most 1.01 a step.

    Args:
        weight_dimension_numbers: Which leaves are matrices, as in `galore`.
        scale: The factor α.
        decay: Decay rate of the means, which are not corrected for their start at zero.
        steps: Fixed-point iterations.

    References:
        Gong et al., `RACS <https://arxiv.org/abs/2502.07752>`_, 2025, algorithm 1, equation 16.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import racs
        >>> tx = racs(0.02)
        >>> state = tx.init({"w": jnp.ones((64, 256)), "b": jnp.ones(256)})
        >>> state[0].matrices["w"].rows.shape, state[0].matrices["w"].columns.shape
        ((64,), (256,))
    """
    scale = checks.number(scale, "scale", such_as=0.05)
    decay = checks.number(decay, "decay", least=0, below=1, such_as=0.9)
    steps = checks.whole(steps, "steps")

    def init(like: jax.ShapeDtypeStruct) -> Scales:
        n, m = like.shape
        return Scales(*(jnp.zeros(shape, like.dtype) for shape in (n, m, ())))

    def update(
        gradient: Float[Array, "n m"], state: Any, scale: Any, decay: Any
    ) -> tuple[Float[Array, "n m"], Scales]:
        wide = gradient.astype(state.rows.dtype)
        q, s = _fixed_point(wide, steps)
        q, s = (
            decay * old + (1 - decay) * new for old, new in ((state.rows, q), (state.columns, s))
        )
        by_rows, by_columns = (jax.lax.rsqrt(jnp.maximum(x, _LEAST)) for x in (q, s))
        scaled = by_rows[:, None] * wide * by_columns[None]
        factor, norm = limit(energies(scaled), state.norm, 1.0)
        return (scale * factor * scaled).astype(gradient.dtype), Scales(q, s, norm)

    return of_matrices(update, weight_dimension_numbers, init, (scale, decay))


def _fixed_point(
    gradient: Float[Array, "n m"], steps: int
) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
    """The scales q and s of a gradient divided by its largest magnitude, so that squares fit."""
    largest = jnp.max(jnp.abs(gradient))
    largest = jnp.where(largest > 0, largest, 1)
    squares = jnp.square(gradient / largest)
    q, s = (jnp.ones_like(gradient, shape=size) for size in gradient.shape)
    for _ in range(steps):
        # Sums, not products of matrices: XLA takes the squares within a sum as it reads G, where
        # for a product it would store them, and their transposes, in 32 bits.
        s = jnp.sum(q[:, None] * squares, axis=0) / jnp.maximum(q @ q, _LEAST)
        q = jnp.sum(squares * s[None], axis=1) / jnp.maximum(s @ s, _LEAST)
    return q, s * jnp.square(largest)


def racs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: float = 0.05,
    decay: float = 0.9,
    steps: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """RACS for matrices, AdamW for all else; `scale_by_racs` has the formula.

    Args:
        learning_rate: Learning rate or schedule. The paper pre-trains with 0.02.
        scale: Factor on the update of matrices; the paper has 0.02 for a 1B model.
        decay: Decay rate of the scales' means.
        steps: Fixed-point iterations.
        b1: Decay rate of the first moment of leaves that are no matrices.
        b2: Decay rate of their second moment.
        eps: Added to its root.
        weight_decay: Decoupled weight decay or a schedule of it, times the learning rate.
        mask: Which leaves decay, as in `optax.adamw`.
        weight_dimension_numbers: Which leaves are matrices, as in `galore`. The paper leaves out
            the head, `None` there.

    References:
        Gong et al., `RACS <https://arxiv.org/abs/2502.07752>`_, 2025, algorithm 1, table 9.
    """
    numbers = weight_dimension_numbers
    return with_adam_for_others(
        scale_by_racs(numbers, scale=scale, decay=decay, steps=steps),
        learning_rate=learning_rate,
        numbers=numbers,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
    )
