"""A mask that is a function sees projected matrices; where it misses some, `init` warns."""

import jax
import jax.numpy as jnp
import optax
import pytest

from galore_optax import GaLoreDimensionNumbers, galore, galore_adafactor, galore_adamw

STACK = {"w": jnp.ones((2, 6, 8)), "b": jnp.ones((2, 8))}
OPTIONS = {
    "weight_decay": 0.1,
    "weight_dimension_numbers": {"w": GaLoreDimensionNumbers(1, 2), "b": None},
}
WARNING = r"not of 1 leaves .* at \['w'\]: a mask's function"


def by_shape(params):
    return jax.tree.map(lambda x: x.ndim > 2, params)


def by_path(params):
    def ends(path, _):
        return jax.tree_util.keystr(path).endswith("['w']")

    return jax.tree.map_with_path(ends, params)


def test_a_mask_that_misses_matrices_of_a_stack_warns():
    for mask in (by_shape, by_path):
        with pytest.warns(UserWarning, match=WARNING):
            galore_adafactor(0.1, 2, weight_decay_mask=mask, **OPTIONS).init(STACK)
    with pytest.warns(UserWarning, match=WARNING):
        galore_adamw(0.1, 2, mask=by_shape, **OPTIONS).init(STACK)


def test_a_mask_that_misses_merged_axes_warns():
    numbers = GaLoreDimensionNumbers(0, (1, 2))
    inner = optax.adamw(0.1, weight_decay=0.1, mask=by_shape)
    with pytest.warns(UserWarning, match=WARNING):
        galore(2, inner, weight_dimension_numbers=numbers).init({"w": jnp.ones((6, 2, 4))})


def test_a_mask_that_marks_the_same_leaves_does_not_warn_and_they_decay():
    marks = {"w": True, "b": False}
    txs = [
        galore_adafactor(0.1, 2, weight_decay_mask=marks, **OPTIONS),
        galore_adamw(0.1, 2, mask=by_path, **OPTIONS),
        galore_adamw(0.1, 2, mask=marks, **OPTIONS),
    ]
    for tx in txs:
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, STACK), tx.init(STACK), STACK)
        assert jnp.allclose(updates["w"], -0.01, atol=1e-6)
        assert not updates["b"].any()
