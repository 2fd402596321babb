"""The LLaMA model: attention's reach, numerics, decoding."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from galore_optax import quantize_weights, value_and_grad
from models.llama.config import LlamaConfig
from models.llama.layer import embed
from models.llama.model import Llama, init_params

SMALL = LlamaConfig(
    vocab_size=50, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, max_length=32
)
# Float32 logits of up to 10, and gradients, of the same function summed in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def make(scale: float = 5.0) -> Llama:
    """A model whose weights are large enough for attention to depend visibly on its input."""
    params = params_of(Llama(SMALL, rngs=nnx.Rngs(0)))
    return with_params(SMALL, jax.tree.map(lambda w: w * scale, params))


def params_of(model: Llama) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def with_params(config: LlamaConfig, params: dict) -> Llama:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


@jax.jit
def run(model: Llama, ids, positions=None, segment_ids=None):
    return model(ids, positions=positions, segment_ids=segment_ids)


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, SMALL.vocab_size)


def test_matrices_start_with_standard_deviation_0_02_and_norms_at_one():
    config = dataclasses.replace(SMALL, width=128, mlp_width=256)
    params = params_of(Llama(config, rngs=nnx.Rngs(0)))
    for leaf in (params["embedding"], params["head"], *jax.tree.leaves(params["layers"]["mlp"])):
        # 6,400 samples and more: the deviation's standard error is below 1%.
        assert np.std(leaf) == pytest.approx(0.02, rel=0.04)
    layers = params["layers"]["mlp"]["up"]
    assert not np.allclose(layers[0], layers[1])
    np.testing.assert_array_equal(params["norm"], 1)


def test_logits_are_float32_and_an_untrained_model_is_near_uniform():
    logits = run(Llama(SMALL, rngs=nnx.Rngs(0)), tokens(2, 7))
    assert logits.shape == (2, 7, SMALL.vocab_size)
    assert logits.dtype == jnp.float32
    probabilities = jax.nn.softmax(logits)
    np.testing.assert_allclose(probabilities, 1 / SMALL.vocab_size, rtol=0.6)


def test_a_token_sees_no_later_token():
    model, ids = make(), tokens(1, 16)
    changed = ids.at[0, 9].add(1) % SMALL.vocab_size
    before, after = run(model, ids)[0], run(model, changed)[0]
    np.testing.assert_array_equal(before[:9], after[:9])
    assert np.all(np.abs(before[9:] - after[9:]).max(axis=-1) > 1e-3)


def test_packed_documents_have_the_logits_that_each_has_alone():
    model, first, second = make(), tokens(1, 6), tokens(1, 9, seed=1)
    packed = run(
        model,
        jnp.concatenate([first, second], axis=1),
        positions=jnp.concatenate([jnp.arange(6), jnp.arange(9)])[None],
        segment_ids=jnp.array([[1] * 6 + [2] * 9]),
    )
    np.testing.assert_allclose(packed[:, :6], run(model, first), **ROUNDING)
    np.testing.assert_allclose(packed[:, 6:], run(model, second), **ROUNDING)


def test_only_relative_positions_matter():
    model, ids = make(), tokens(2, 8)
    expected = run(model, ids)
    shifted = run(model, ids, positions=jnp.broadcast_to(jnp.arange(8) + 5, ids.shape))
    np.testing.assert_allclose(shifted, expected, **ROUNDING)
    stretched = run(model, ids, positions=jnp.broadcast_to(jnp.arange(8) * 3, ids.shape))
    assert np.abs(stretched - expected).max() > 1e-2


def test_grouped_query_attention_is_attention_with_repeated_heads():
    params = params_of(make())
    full = dataclasses.replace(SMALL, kv_heads=SMALL.heads)
    repeated = jax.tree.map(lambda w: w, params)
    attention = repeated["layers"]["attention"]
    for name in ("key", "value"):
        heads = attention[name].reshape(SMALL.layers, SMALL.width, SMALL.kv_heads, -1)
        attention[name] = jnp.repeat(heads, 2, axis=2).reshape(SMALL.layers, SMALL.width, -1)
    ids = tokens(2, 12)
    np.testing.assert_allclose(
        run(with_params(full, repeated), ids), run(with_params(SMALL, params), ids), **ROUNDING
    )


def test_rematerializing_gives_the_same_gradients_from_fewer_residuals():
    ids, params = tokens(2, 12), params_of(make())

    def loss(params, rematerialize):
        config = dataclasses.replace(SMALL, rematerialize=rematerialize)
        logits = with_params(config, params)(ids)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), plain, again)

    def residuals(rematerialize):
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, rematerialize), p)[1], params)
        return sum(x.size for x in jax.tree.leaves(pullback))

    weights = sum(x.size for x in jax.tree.leaves(params))
    between_layers = (SMALL.layers + 1) * 2 * 12 * SMALL.width
    in_the_head = 3 * 2 * 12 * SMALL.vocab_size
    assert residuals(True) < weights + 2 * between_layers + in_the_head < residuals(False)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_layers_one_by_one_give_what_the_loop_gives(rematerialize):
    ids, params = tokens(2, 12), params_of(make())
    params["layers"]["mlp"]["up"] = quantize_weights(params["layers"]["mlp"]["up"])

    def loss(scan, params):
        config = dataclasses.replace(SMALL, rematerialize=rematerialize, scan=scan)
        return -jax.nn.log_softmax(with_params(config, params)(ids))[..., 0].mean()

    def traced(scan):
        return str(jax.make_jaxpr(value_and_grad(partial(loss, scan)))(params))

    looped, written = (jax.jit(value_and_grad(partial(loss, s)))(params) for s in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), written, looped)
    assert "scan[" in traced(True)
    assert "scan[" not in traced(False)


def test_bfloat16_is_close_to_float32():
    ids, params = tokens(2, 12), params_of(make(2.0))
    exact = run(make(2.0), ids)
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="bfloat16")
    rounded = run(with_params(config, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)), ids)
    assert rounded.dtype == jnp.float32
    # BF16 keeps 8 bits: relative errors of up to 0.4% in each of some 20 steps in a row.
    assert 0 < np.std(rounded - exact) < 0.02 * np.std(exact)


def test_a_frequent_tokens_gradient_is_a_sum_in_float32():
    # In bfloat16 it stopped at 256, on a CPU and a GPU.
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="bfloat16")
    table = jnp.ones((2, 3), jnp.bfloat16)
    ids = jnp.zeros((4, 250), jnp.int32)
    gradient = jax.grad(lambda table: jnp.sum(embed(config, table, ids).astype(float)))(table)
    np.testing.assert_array_equal(gradient, [[1000] * 3, [0] * 3])


def test_bfloat16_weights_are_drawn_as_those_of_float32_and_rounded():
    low = dataclasses.replace(SMALL, param_dtype="bfloat16")
    drawn, exact = (init_params(config, jax.random.key(0)) for config in (low, SMALL))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)), drawn, exact)


def test_float32_weights_may_compute_in_bfloat16():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    model, exact = with_params(config, params_of(make(2.0))), make(2.0)
    assert model.hidden(tokens(1, 4)).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    error = np.std(run(model, tokens(1, 4)) - run(exact, tokens(1, 4)))
    assert 0 < error < 0.02 * np.std(run(exact, tokens(1, 4)))


def test_decoding_with_a_cache_gives_the_forward_passs_logits():
    model, ids = make(), tokens(2, 12)
    logits, cache = model.decode(ids[:, :5], model.init_cache(2, 20))
    pieces = [logits]
    step = jax.jit(Llama.decode)
    for i in range(5, 12):
        logits, cache = step(model, ids[:, i : i + 1], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), run(model, ids), **ROUNDING)
    assert cache.length == 12


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"33 tokens.*max_length=32"):
        make()(tokens(1, 33))
    with pytest.raises(ValueError, match="max_length=32"):
        make().init_cache(1, 33)
