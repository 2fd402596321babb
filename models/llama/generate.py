"""Sampling from a language model with a KV cache: the prompt at once, then token by token.

Letters: B batch, P prompt length, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models.llama.config import LlamaConfig
from models.llama.model import Llama


def generate(
    model: Llama,
    prompt_ids: Int[Array, "B P"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: PRNGKeyArray,
    stop_id: int | None = None,
) -> Int[Array, "B P+max_new_tokens"]:
    """Continues each prompt; compiles once per combination of shapes, new tokens and `top_k`.

    All prompts have one length. A temperature of 0 takes the likeliest token. `top_k` samples among
    the k likeliest tokens only, `top_p` among the fewest whose probabilities sum to at least p
    (nucleus sampling, arXiv:1904.09751), after `top_k`. After the token `stop_id` a row is filled
    with it, and sampling ends once every row is. ValueError if an argument is out of its range, or
    prompt and new tokens are too long.
    """
    prompt_ids = jnp.asarray(prompt_ids, jnp.int32)
    _check(model.config, prompt_ids, max_new_tokens, temperature, top_k, top_p)
    graph, state = nnx.split(model)
    divisor = None if temperature == 0 else _positive(temperature)
    nucleus = None if top_p is None else _positive(top_p)
    stop = None if stop_id is None else np.int32(stop_id)
    return _generate(graph, max_new_tokens, top_k, state, prompt_ids, key, divisor, nucleus, stop)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(graph, max_new_tokens, top_k, state, prompt_ids, key, temperature, top_p, stop_id):
    model = nnx.merge(graph, state)
    batch, prompt_length = prompt_ids.shape
    total = prompt_length + max_new_tokens

    def choose(logits, length):
        if temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # The likeliest logit becomes 0 for any temperature; others may become minus infinity.
        logits = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits = keep_likeliest(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, length), logits).astype(jnp.int32)

    def unfinished(carry):
        _, length, _, _, stopped = carry
        return (length < total) & ~jnp.all(stopped)

    def append(carry):
        tokens, length, logits, cache, stopped = carry
        new = choose(logits, length)
        if stop_id is not None:
            new = jnp.where(stopped, stop_id, new)
            stopped = new == stop_id
        tokens = jax.lax.dynamic_update_slice(tokens, new[:, None], (0, length))
        logits, cache = model.decode(new[:, None], cache)
        return tokens, length + 1, logits[:, -1], cache, stopped

    logits, cache = model.decode(prompt_ids, model.init_cache(batch, total))
    fill = jnp.full((batch, max_new_tokens), 0 if stop_id is None else stop_id, jnp.int32)
    tokens = jnp.concatenate([prompt_ids, fill], axis=1)
    carry = (tokens, prompt_length, logits[:, -1], cache, jnp.zeros(batch, bool))
    return jax.lax.while_loop(unfinished, append, carry)[0]


def keep_likeliest(
    logits: Float[Array, "B V"], top_k: int | None, top_p: Float[Array, ""] | float | None
) -> Float[Array, "B V"]:
    """Returns the logits with minus infinity for tokens outside `top_k` and `top_p`."""
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # No probability comes before the likeliest token, so it is always kept.
        least = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _positive(value: float) -> np.float32:
    """Returns at least the least normal float32; XLA takes smaller numbers for zero."""
    return np.float32(max(value, np.finfo(np.float32).tiny))


def _check(config: LlamaConfig, prompt_ids, max_new_tokens, temperature, top_k, top_p) -> None:
    ids = config.vocab_size
    for name, value, accepted, fits in (
        ("max_new_tokens", max_new_tokens, "at least 1", max_new_tokens >= 1),
        ("temperature", temperature, "0 (greedy) or above", temperature >= 0),
        ("top_k", top_k, f"1 to {ids}, or None", top_k is None or 1 <= top_k <= ids),
        ("top_p", top_p, "above 0 and up to 1, or None", top_p is None or 0 < top_p <= 1),
    ):
        if not fits:
            raise ValueError(f"{name}={value}: must be {accepted}")
    if prompt_ids.ndim != 2 or prompt_ids.size == 0:
        needed = "(prompts, tokens), with at least one token to start from"
        raise ValueError(f"prompt_ids has shape {prompt_ids.shape}: must be {needed}")
    length = prompt_ids.shape[1]
    if length + max_new_tokens > config.max_length:
        raise ValueError(
            f"a prompt of {length} tokens and max_new_tokens={max_new_tokens}: this model takes at "
            f"most max_length={config.max_length} together; shorten either"
        )
    lowest, highest = int(jnp.min(prompt_ids)), int(jnp.max(prompt_ids))
    if lowest < 0 or highest >= ids:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"prompt_ids contains {wrong}; this model's token ids are 0 to {ids - 1}")
