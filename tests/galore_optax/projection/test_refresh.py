"""Leaves of equal shape are refreshed by one program, each as it would be alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
    GaLoreDimensionNumbers,
    TuckerDimensionNumbers,
    galore,
    q_galore_adamw8bit,
    quantize_state,
    subspace_parts,
)


def _layers(count, key=0):
    """A model that is a list of its layers."""
    keys = jax.random.split(jax.random.key(key), count)
    return [
        {"q": jax.random.normal(k, (16, 24)), "stack": jax.random.normal(k, (2, 24, 8))}
        for k in keys
    ]


@pytest.mark.parametrize(
    "tx",
    [
        galore(4, quantize_state(optax.adamw(1e-2)), update_proj_gap=2),
        galore(4, optax.adamw(1e-2), update_proj_gap=2, moments="reset", side="both"),
        q_galore_adamw8bit(1e-2, rank=4, update_proj_gap=2),
    ],
)
def test_each_layer_of_a_list_is_refreshed_as_it_would_be_alone(tx):
    def trained(params):
        state = tx.init(params)
        for step in range(4):
            grads = jax.tree.map(lambda x, step=step: x + step * x[::-1], params)
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    layers = [{"q": layer["q"]} for layer in _layers(3)]
    together = trained(layers)
    for i, layer in enumerate(layers):
        alone = trained([layer if j == i else None for j in range(3)])  # of the same path
        np.testing.assert_allclose(together[i]["q"], alone[i]["q"], atol=1e-4)


def test_layers_of_a_list_share_one_compiled_refresh():
    tx = galore(4, optax.adamw(1e-2), weight_dimension_numbers=GaLoreDimensionNumbers(-2, -1))

    def factorizations(count):
        params = _layers(count)
        lowered = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)
        return lowered.compile().as_text().count("cholesky")

    assert factorizations(2) == factorizations(6) > 0


def test_a_tensor_without_an_axis_above_the_rank_is_not_due_for_ever():
    params = {"small": jnp.ones((4, 4, 4)), "matrix": jnp.ones((16, 32))}
    numbers = {"small": TuckerDimensionNumbers((0, 1, 2)), "matrix": GaLoreDimensionNumbers()}
    tx = galore(8, optax.adam(1e-2), weight_dimension_numbers=numbers)
    _, state = tx.update(params, tx.init(params), params)
    assert not subspace_parts(tx).is_due(state)


def test_a_step_without_a_refresh_copies_neither_bases_nor_moments():
    params = {"w": jax.ShapeDtypeStruct((6, 64, 96), jnp.float32)}
    tx = galore(16, optax.adam(1e-3), weight_dimension_numbers=GaLoreDimensionNumbers(1, 2))
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state).compile()
    assert not re.findall(r"= f32\[6,\d+,\d+\]\S* copy\(", step.as_text())
