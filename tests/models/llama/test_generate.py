"""Sampling with a KV cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.llama.config import LlamaConfig
from models.llama.generate import generate, keep_likeliest
from models.llama.model import Llama

CONFIG = LlamaConfig(
    vocab_size=30, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, max_length=24
)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(CONFIG, rngs=nnx.Rngs(1))
    model.head[...] *= 20.0  # an untrained model's logits are too flat to tell choices apart
    return model


@pytest.fixture(scope="module")
def prompt() -> jax.Array:
    return jax.random.randint(jax.random.key(0), (3, 5), 0, CONFIG.vocab_size)


def greedy_without_cache(model, ids, count):
    length = ids.shape[1]
    ids = jnp.pad(ids, ((0, 0), (0, count)))  # no token sees the padding after it
    forward = jax.jit(model)
    for i in range(length, length + count):
        ids = ids.at[:, i].set(jnp.argmax(forward(ids)[:, i - 1], axis=-1))
    return ids


def test_greedy_is_the_argmax_of_full_forward_passes(model, prompt):
    found = generate(model, prompt, max_new_tokens=8, temperature=0, key=KEY)
    np.testing.assert_array_equal(found, greedy_without_cache(model, prompt, 8))


def test_top_k_of_one_is_greedy(model, prompt):
    greedy = generate(model, prompt, max_new_tokens=8, temperature=0, key=KEY)
    only = generate(model, prompt, max_new_tokens=8, top_k=1, temperature=5.0, key=KEY)
    np.testing.assert_array_equal(only, greedy)


def test_a_tiny_top_p_is_greedy(model, prompt):
    greedy = generate(model, prompt, max_new_tokens=8, temperature=0, key=KEY)
    only = generate(model, prompt, max_new_tokens=8, top_p=1e-6, key=KEY)
    np.testing.assert_array_equal(only, greedy)


@pytest.mark.parametrize("smallest", [{"temperature": 1e-40}, {"top_p": 1e-40}, {"top_p": 1e-50}])
def test_what_float32_has_no_room_for_is_greedy(model, prompt, smallest):
    greedy = generate(model, prompt, max_new_tokens=8, temperature=0, key=KEY)
    only = generate(model, prompt, max_new_tokens=8, key=KEY, **smallest)
    np.testing.assert_array_equal(only, greedy)


def test_the_key_decides(model, prompt):
    first, again, other = (
        generate(model, prompt, max_new_tokens=8, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(first[:, :5], prompt)


def test_64_bit_numbers_change_nothing(model, prompt):
    how = {"max_new_tokens": 8, "top_k": 9, "top_p": 0.9, "stop_id": 3, "key": KEY}
    found = generate(model, prompt, **how)
    with jax.enable_x64(True):  # as by JAX_ENABLE_X64
        np.testing.assert_array_equal(generate(model, prompt, **how), found)


def test_samples_follow_the_models_probabilities(model, prompt):
    rows = jnp.tile(prompt[:1], (4000, 1))
    drawn = generate(model, rows, max_new_tokens=1, temperature=2.0, key=KEY)[:, -1]
    frequencies = np.bincount(drawn, minlength=CONFIG.vocab_size) / 4000
    expected = jax.nn.softmax(model(prompt[:1])[0, -1] / 2.0)
    # Four standard errors of a frequency from 4,000 draws are at most 0.032.
    np.testing.assert_allclose(frequencies, expected, atol=0.032)


def test_a_stopped_row_is_filled_and_others_go_on(model, prompt):
    plain = np.asarray(generate(model, prompt, max_new_tokens=12, temperature=0, key=KEY))
    stop = int(plain[0, 7])
    found = np.asarray(
        generate(model, prompt, max_new_tokens=12, temperature=0, key=KEY, stop_id=stop)
    )
    for row, expected in zip(found, plain, strict=True):
        hits = np.flatnonzero(expected[5:] == stop)
        end = 5 + hits[0] if hits.size else len(expected)
        np.testing.assert_array_equal(row[:end], expected[:end])
        assert (row[end:] == stop).all()
    assert (found[0, 7:] == stop).all()


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.25, 0.15]]))
    kept = [np.isfinite(keep_likeliest(logits, None, p))[0].tolist() for p in (0.4, 0.6, 0.8, 1.0)]
    assert kept == [
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
        [True, True, True, True],
    ]


@pytest.mark.parametrize(
    ("length", "arguments", "message"),
    [
        (25, {}, "prompt of 25 tokens.*max_length=24"),
        (20, {"max_new_tokens": 5}, "max_new_tokens=5.*max_length=24"),
        (5, {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        (5, {"temperature": -1.0}, "temperature=-1.0: must be 0"),
        (5, {"top_k": 31}, "top_k=31: must be 1 to 30"),
        (5, {"top_p": 0.0}, "top_p=0.0: must be above 0"),
        (0, {}, "at least one token"),
    ],
)
def test_arguments_out_of_range_are_refused(model, length, arguments, message):
    ids = jnp.zeros((1, length), jnp.int32)
    with pytest.raises(ValueError, match=message):
        generate(model, ids, **{"max_new_tokens": 4, "key": KEY, **arguments})


def test_a_token_beyond_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match=r"prompt_ids contains 30; .* 0 to 29"):
        generate(model, jnp.array([[3, 30]]), max_new_tokens=4, key=KEY)
