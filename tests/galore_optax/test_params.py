"""Params that are no tree of arrays: shapes, Equinox models with functions, states of NNX."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galore_optax import (
    adamw8bit,
    cast_state,
    galore_adamw,
    q_galore_adamw8bit,
    quantize_state,
    racs,
    scale_sgd,
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


MATRICES = {"racs": racs(0.01, **DECAY), "scale": scale_sgd(0.01, lambda params: True, **DECAY)}


@pytest.mark.parametrize("name", [*TRANSFORMATIONS, *MATRICES])
def test_a_state_of_nnx_is_updated_as_its_arrays(name):
    tx = {**TRANSFORMATIONS, **MATRICES}[name]
    arrays = {"b": jnp.ones(64), "w": jax.random.normal(jax.random.key(0), (32, 64))}
    grads = jax.tree.map(jnp.cos, arrays)

    def in_variables(tree):
        return nnx.State({name: nnx.Param(x) for name, x in tree.items()})

    params, gradient = in_variables(arrays), in_variables(grads)
    expected, _ = tx.update(grads, tx.init(arrays), arrays)
    updates, _ = tx.update(gradient, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, updates, in_variables(expected))
    if (parts := subspace_parts(tx)) is not None:
        state = parts.refresh(gradient, tx.init(params), params)
        new, _ = parts.update_projected(parts.project(gradient, state), state, params)
        assert jax.tree.structure(new) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_allclose, new, updates)
