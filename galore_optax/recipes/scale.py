"""SCALE: gradients with normalized columns, and momentum in the last layer alone."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax import checks
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers
from galore_optax.recipes.matrices import are_matrices, of_matrices, with_adam_for_others
from galore_optax.recipes.options import Mask

_LEAST = 1e-8  # root mean square of a column, as in the authors' code


def scale_by_columns(
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformation:
    """Divides each column of every matrix (in, out) by its root mean square; without a state.

    Other leaves stay as they are. Glentis et al., arXiv:2506.16659, equation of table 2.
    """

    def update(gradient: Float[Array, "n m"], state: Any) -> tuple[Float[Array, "n m"], Any]:
        wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
        size = jnp.sqrt(jnp.mean(jnp.square(wide), axis=0, keepdims=True))
        return (wide / jnp.maximum(size, _LEAST)).astype(gradient.dtype), state

    return of_matrices(update, weight_dimension_numbers)


def scale_sgd(
    learning_rate: optax.ScalarOrSchedule,
    last_layer: Mask,
    *,
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """SCALE: SGD with normalized columns and momentum in the last layer; AdamW for vectors.

    Its only large state is the momentum of the last layer. Embedding and head are matrices here:
    a column of a table (vocabulary, width) has an entry for each id.

    Args:
        learning_rate: Learning rate or schedule. The paper pre-trains with 1e-3.
        last_layer: Which matrices have momentum: a tree of booleans, a prefix of the params' tree,
            or a function from the params to one. Vectors that it marks have AdamW's alone.
        momentum: Decay rate of the momentum, an exponential mean.
        b1: Decay rate of the first moment of leaves that are no matrices.
        b2: Decay rate of their second moment.
        eps: Added to its root.
        weight_decay: Decoupled weight decay or a schedule of it, times the learning rate.
        mask: Which leaves decay, as in `optax.adamw`.
        weight_dimension_numbers: Which leaves are matrices, as in `galore`.

    References:
        Glentis et al., `SCALE <https://arxiv.org/abs/2506.16659>`_, 2025, algorithm 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import scale_sgd, state_bytes
        >>> params = {"w": jnp.ones((64, 64)), "head": jnp.ones((64, 256))}
        >>> tx = scale_sgd(1e-3, last_layer={"w": False, "head": True})
        >>> state_bytes(tx.init(params))["moments"]  # of the head
        65536
    """
    momentum = checks.number(momentum, "momentum", least=0, below=1, such_as=0.9)
    last_layer = checks.mask(last_layer, "last_layer")

    def with_momentum(params: optax.Params) -> optax.Params:
        marks = last_layer(params) if callable(last_layer) else last_layer
        marks = jax.tree.broadcast(marks, params)  # a bias of the last layer has AdamW's alone
        return jax.tree.map(operator.and_, marks, are_matrices(params, weight_dimension_numbers))

    return with_adam_for_others(
        optax.masked(optax.ema(momentum, debias=False), with_momentum),
        scale_by_columns(weight_dimension_numbers),
        learning_rate=learning_rate,
        numbers=weight_dimension_numbers,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
    )
