"""What is told of the params' axes to GaLore, to the layerwise step and to sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from galore_optax import DoRA, GaLoreDimensionNumbers, GradNormLoRP, adamw8bit, galore, muon
from models.llama.axes import dimension_numbers, logical_axes, param_axes, smaller_sides
from models.llama.config import SIZES, LlamaConfig, weight_table
from models.llama.model import Llama

SMALL = LlamaConfig(
    vocab_size=50, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, max_length=32
)


def shapes_of(config: LlamaConfig) -> dict:
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(("sizes", "side"), [((32, 48, 4), 32), ((32, 24, 4), 32), ((8, 48, 2), 8)])
def test_a_rank_of_the_largest_smaller_side_compresses_nothing_and_one_less_does(sizes, side):
    width, mlp_width, heads = sizes
    config = LlamaConfig(width=width, mlp_width=mlp_width, layers=2, heads=heads, kv_heads=1)
    assert max(smaller_sides(config)) == side
    params = shapes_of(config)

    def state_shapes(rank):
        tx = galore(rank, optax.sgd(0.1), weight_dimension_numbers=dimension_numbers)
        return [x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, params))]

    assert state_shapes(side) == state_shapes(side + 1)
    assert state_shapes(side) != state_shapes(side - 1)


def test_params_are_one_nested_dict_that_the_tables_describe():
    params = shapes_of(SMALL)
    assert params["layers"]["attention"]["key"].shape == (2, 32, 2 * 8)
    axes = logical_axes(params)
    assert axes["layers"]["mlp"]["down"] == ("layer", "mlp", "embed")
    assert jax.tree.map(len, axes, is_leaf=_axes) == jax.tree.map(lambda x: x.ndim, params)
    numbers = dimension_numbers(params)
    assert numbers["layers"]["attention"]["out"] == GaLoreDimensionNumbers(-2, -1)
    assert jax.tree.leaves(numbers) == [-2, -1] * 7  # seven stacks; None for everything else
    assert numbers["embedding"] is numbers["head"] is numbers["layers"]["mlp_norm"] is None


def test_biases_are_vectors_and_a_tied_model_has_no_head():
    changes = dict(tied=True, attention_bias=True, mlp_bias=True, head_dim=6)
    params = shapes_of(dataclasses.replace(SMALL, **changes))
    assert "head" not in params
    biases = params["layers"]["attention_bias"], params["layers"]["mlp_bias"]
    assert {k: x.shape[1] for part in biases for k, x in part.items()} == {
        **{"query": 24, "key": 12, "value": 12, "out": 32},
        **{"gate": 48, "up": 48, "down": 32},
    }
    axes = logical_axes(params)
    assert axes["layers"]["attention_bias"]["key"] == ("layer", "heads")
    assert axes["layers"]["mlp_bias"]["down"] == ("layer", None)
    assert jax.tree.leaves(dimension_numbers(params)) == [-2, -1] * 7
    within_layers = param_axes(params)["layers"]
    assert {*jax.tree.leaves(within_layers["attention_bias"])} == {1}
    assert {*jax.tree.leaves(within_layers["attention"])} == {2}


@pytest.mark.parametrize("bits", [8, 4])
def test_no_scale_of_a_state_is_shared_by_two_ids_of_the_vocabulary(bits):
    shapes = weight_table(SIZES["llama-60m"])
    params = {
        name: jax.ShapeDtypeStruct(shapes[name].shape, jnp.float32)
        for name in ("embedding", "head")
    }
    moments = jax.eval_shape(adamw8bit(1e-3, bits=bits).init, params)[0].mu
    for moment in moments.values():
        assert moment.scales.shape == (32_000, 512 // moment.block)


def _axes(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize("kind", [DoRA, GradNormLoRP])
def test_the_magnitudes_of_layers_are_vectors_of_their_own(kind):
    """A stack of them, (layer, out), is no matrix."""
    weight = jax.random.normal(jax.random.key(0), (3, 16, 24))
    params = {"layers": {"attention": {"query": kind.create(weight, jax.random.key(1), rank=4)}}}
    query = dimension_numbers(params)["layers"]["attention"]["query"]
    assert query.magnitude is None
    assert query.a == query.b == GaLoreDimensionNumbers(-2, -1)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    tx = muon(1.0, weight_dimension_numbers=dimension_numbers)

    def first_layers(factor):
        gradient = jax.tree.map(lambda x: x.at[2].multiply(factor), trained)
        updates, _ = tx.update(gradient, tx.init(trained), trained)
        return jax.tree.map(lambda x: x[:2], updates)

    found, other = first_layers(1.0), first_layers(jnp.float32(-3.0))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
        assert jnp.array_equal(x, y)
