"""Transformations that treat every matrix by itself; leaves that are no matrices get Adam."""

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float

from galore_optax.params import for_init, of_arrays
from galore_optax.projection.dimension_numbers import (
    LeafView,
    WeightDimensionNumbers,
    matrix_views,
)
from galore_optax.projection.each import State, each_matrix, first_state
from galore_optax.quantization.array import dequantized
from galore_optax.recipes.options import Mask, checked


class MatricesState(NamedTuple):
    """What is remembered of each matrix: a tree like the params, `optax.MaskedNode` at others."""

    matrices: Any


def of_matrices(
    function: Callable[..., tuple[Float[Array, "n m"], State]],
    numbers: WeightDimensionNumbers,
    init: Callable[[jax.ShapeDtypeStruct], State] = lambda like: (),
    hyperparameters: Sequence[Any] = (),
) -> optax.GradientTransformation:
    """Applies a function to the gradient (in, out) of each matrix; other leaves stay as they are.

    The function is given the gradient, the state and the hyperparameters, which may be arrays, and
    returns the update and the new state. `init` makes the first state from a matrix's shape; each
    matrix of a stack has its own.
    """

    def init_fn(params: optax.Params) -> MatricesState:
        params = dequantized(for_init(params))
        leaves, tree = jax.tree.flatten(params)
        views = views_of_matrices(params, numbers)
        _warn_of_left_out(leaves, views, numbers)
        states = [
            optax.MaskedNode() if view is None else first_state(init, view, leaf)
            for view, leaf in zip(views, leaves, strict=True)
        ]
        return MatricesState(tree.unflatten(states))

    @of_arrays
    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MatricesState]:
        leaves, tree = jax.tree.flatten(updates)
        states = tree.flatten_up_to(state.matrices)
        for i, view in enumerate(views_of_matrices(updates, numbers)):
            if view is not None:
                leaves[i], states[i] = each_matrix(
                    lambda g, own, _, given: function(g, own, *given),
                    view,
                    leaves[i],
                    states[i],
                    common=hyperparameters,
                )
        return tree.unflatten(leaves), MatricesState(tree.unflatten(states))

    return optax.GradientTransformation(init_fn, update_fn)


def _warn_of_left_out(
    leaves: Sequence[Any], views: Sequence[LeafView | None], numbers: WeightDimensionNumbers
) -> None:
    pairs = zip(leaves, views, strict=True)
    left_out = [x.shape for x, view in pairs if view is None and x.ndim > 1 and x.size]
    if left_out and numbers is None:
        warnings.warn(
            f"{len(left_out)} params with two or more axes are not taken for matrices, the first "
            f"of shape {left_out[0]}; say with weight_dimension_numbers which axes are matrices, "
            "or None to leave a leaf out knowingly",
            stacklevel=3,
        )


def with_adam_for_others(
    *of_matrices: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    numbers: WeightDimensionNumbers,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformations, Adam for leaves without a matrix, decay and the learning rate."""
    learning_rate, b1, b2, eps, weight_decay, mask = checked(
        learning_rate, b1, b2, eps, weight_decay, mask
    )

    def others(params: optax.Params) -> optax.Params:
        return jax.tree.map(operator.not_, are_matrices(params, numbers))

    tx = optax.chain(
        *of_matrices,
        optax.masked(optax.scale_by_adam(b1, b2, eps), others),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )

    def init(params: optax.Params) -> optax.OptState:
        return tx.init(dequantized(for_init(params)))

    @of_arrays
    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return tx.update(updates, state, dequantized(params), **extra_args)

    # optax's types say that a state is any tree, not which one.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def are_matrices(params: optax.Params, numbers: WeightDimensionNumbers) -> optax.Params:
    """For each leaf whether it is a matrix, or a stack of them: a tree of booleans."""
    tree = jax.tree.structure(params)
    return tree.unflatten([view is not None for view in views_of_matrices(params, numbers)])


def views_of_matrices(
    params: optax.Params, numbers: WeightDimensionNumbers
) -> list[LeafView | None]:
    """The view of each leaf, in the order of `jax.tree.leaves`; None: it is no matrix."""
    found = matrix_views(params, numbers)
    for path, view in found:
        if view is not None and view.tensor:
            raise ValueError(
                f"weight_dimension_numbers: TuckerDimensionNumbers at {path}, where matrices are "
                "scaled; give GaLoreDimensionNumbers, or None"
            )
    return [view for _, view in found]
