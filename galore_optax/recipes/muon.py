"""Muon, its momentum as floats or in a few bits."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from galore_optax import checks
from galore_optax.projection.dimension_numbers import WeightDimensionNumbers
from galore_optax.quantization.state import cast_state, quantize_state
from galore_optax.recipes.matrices import of_matrices, views_of_matrices
from galore_optax.recipes.options import Mask, checked
from galore_optax.sharding import specs, with_automatic_axes

_SIZE = 0.2  # root mean square of an update of AdamW (arXiv:2502.16982, section 2.2)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    bits: int | None = None,
    state_dtype: DTypeLike | None = None,
    product_dtype: DTypeLike = "bfloat16",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices, AdamW for other leaves, both with Nesterov's momentum.

    The update of a matrix is its momentum with all singular values near 1, of the size of AdamW's
    update, so that one learning rate serves all leaves. The momentum is all that is remembered of a
    matrix: in 8 bits 1.016 bytes a weight, in 4 bits 0.53, where GaLore at a quarter of the width
    has 1.5 in BF16 for a square matrix. There is no subspace. A step takes more time than GaLore's:
    singular values are made equal by five iterations of three matrix products each.

    Args:
        learning_rate: Learning rate or schedule, as for AdamW.
        beta: Decay rate of the momentum.
        b1: Decay rate of the first moment of leaves that are no matrices.
        b2: Decay rate of their second moment.
        eps: Added to its root, and to the norm that a momentum is divided by.
        weight_decay: Decoupled weight decay or a schedule of it, times the learning rate.
        mask: Which leaves decay, as in `optax.adamw`.
        bits: Stores momentum and moments in 8 or 4 bits (`quantize_state`); None as floats.
        state_dtype: Dtype in which momentum and moments that are floats are stored and computed
            (`cast_state`); None takes float32, or float64 for params that are float64.
        product_dtype: Dtype in which singular values are made equal; bfloat16 as published. float32
            takes longer on a GPU.
        weight_dimension_numbers: Which leaves are matrices, as in `galore`. For pre-training leave
            embedding and head out.

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; its size: Liu et
        al., `Moonlight <https://arxiv.org/abs/2502.16982>`_, 2025, section 2.2; its 8 bits: Gupta
        et al., `8-bit Muon <https://arxiv.org/abs/2509.23106>`_, 2025.

    Examples:
        >>> import jax.numpy as jnp
        >>> from galore_optax import muon, state_bytes
        >>> params = {"w": jnp.ones((64, 256)), "b": jnp.ones(256)}
        >>> [state_bytes(muon(0.01, bits=n).init(params))["moments"] for n in (None, 8, 4)]
        [67596, 18700, 10764]
    """
    learning_rate, b1, b2, eps, weight_decay, mask = checked(
        learning_rate, b1, b2, eps, weight_decay, mask
    )
    beta = checks.number(beta, "beta", least=0, below=1, such_as=0.95)
    checks.float_dtype(product_dtype, "product_dtype")
    if state_dtype is not None:
        checks.float_dtype(state_dtype, "state_dtype")
    if bits is not None and state_dtype is not None:
        raise ValueError(
            f"state_dtype={checks.said(state_dtype)} with bits={bits}: moments in {bits} bits are "
            "computed in float32; leave one of them out"
        )

    def orthogonalized(matrix: Float[Array, "n m"], state: Any) -> tuple[Float[Array, "n m"], Any]:
        size = _SIZE * max(matrix.shape) ** 0.5
        return size * _iterated((matrix / size).astype(product_dtype)).astype(matrix.dtype), state

    made = optax.chain(
        _momentum(weight_dimension_numbers, beta=beta, eps=eps, adam_b1=b1, adam_b2=b2),
        of_matrices(orthogonalized, weight_dimension_numbers),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return cast_state(made, state_dtype) if bits is None else quantize_state(made, bits)


def _momentum(
    numbers: WeightDimensionNumbers, **hyperparameters: Any
) -> optax.GradientTransformation:
    """Muon of optax without its iterations, and Adam, both ascending at a learning rate of 1.

    The update of a matrix (n, m) is its momentum with a norm of 0.2 max(n, m)^½.
    """

    def of(params: optax.Params, given: dict[str, Any]) -> optax.GradientTransformation:
        # A function of the params is called here: optax.contrib.muon would call it again, with
        # only the matrices.
        views = views_of_matrices(params, numbers)
        found = [None if view is None else MuonDimensionNumbers(*view.modes) for view in views]
        tree = jax.tree.structure(params).unflatten(found)
        return optax.contrib.muon(
            -1.0,
            muon_weight_dimension_numbers=lambda _: tree,
            consistent_rms=_SIZE,
            ns_steps=0,
            **given,
        )

    def init(params: optax.Params) -> optax.OptState:
        return of(params, hyperparameters).init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def whole(given: dict[str, Any], *args: Any) -> tuple[Any, Any]:
            return of(updates, given).update(*args)

        like = specs((updates, state))
        args = hyperparameters, updates, state, params
        return with_automatic_axes(whole, lambda _: like, *args)

    return optax.GradientTransformation(init, update)


def _iterated(x: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Returns a matrix of norm at most 1 with its larger singular values brought near 1.

    Five Newton-Schulz iterations in the dtype of x, from x to (a + b x xᵀ + c (x xᵀ)²) x with the
    coefficients of Jordan et al. optax adds up three products as large as x instead, for which a
    GPU moves a quarter more memory.
    """
    if x.shape[0] > x.shape[1]:
        return _iterated(x.T).T
    one = jnp.eye(x.shape[0], dtype=x.dtype)
    for _ in range(5):
        square = x @ x.T
        x = (3.4445 * one - 4.7750 * square + 2.0315 * (square @ square)) @ x
    return x
