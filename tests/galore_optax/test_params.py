"""Params that are no tree of arrays: shapes, and an Equinox model with its functions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
    adamw8bit,
    cast_state,
    galore_adamw,
    q_galore_adamw8bit,
    quantize_state,
    subspace_parts,
    unstacked,
    without_refresh,
)

RANDOM = {"subspace": "random"}  # quick to compile
DECAY = {"weight_decay": 0.1}
TRANSFORMATIONS = {
    "optax.adamw": optax.adamw(0.01, **DECAY),
    "galore": galore_adamw(0.01, 4, **DECAY, **RANDOM),
    "q_galore": q_galore_adamw8bit(0.01, 4, **DECAY, **RANDOM),
    "adamw8bit": adamw8bit(0.01, **DECAY),
    "low bit": quantize_state(optax.adamw(0.01, **DECAY), min_size=1),
    "cast": cast_state(optax.adamw(0.01, **DECAY)),
    "unstacked": unstacked(
        galore_adamw(0.01, 4, **DECAY, **RANDOM), lambda p: jax.tree.map(lambda _: None, p)
    ),
    "without_refresh": without_refresh(galore_adamw(0.01, 4, **DECAY, **RANDOM)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_an_update_takes_an_equinox_model_with_its_functions(name):
    tx = TRANSFORMATIONS[name]
    model = eqx.nn.MLP(16, 16, 32, 1, key=jax.random.key(0))
    assert not all(map(eqx.is_array, jax.tree.leaves(model)))
    grads = eqx.filter_grad(lambda model: jnp.sum(model(jnp.ones(16)) ** 2))(model)
    arrays = eqx.filter(model, eqx.is_array)
    state = tx.init(arrays)
    expected, _ = tx.update(grads, state, arrays)
    updates, _ = tx.update(grads, state, model)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    if (parts := subspace_parts(tx)) is not None:
        parts.refresh(grads, state, model)
    eqx.apply_updates(model, updates)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_state_is_made_of_shapes(name):
    tx, params = TRANSFORMATIONS[name], {"w": jnp.zeros((32, 64))}
    of_shapes = tx.init(jax.eval_shape(lambda: params))
    jax.tree.map(np.testing.assert_array_equal, of_shapes, tx.init(params))
