"""Sampling from a language model with a KV cache: the prompt at once, then token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

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
    """Continue each prompt by `max_new_tokens` sampled tokens.

    Compiled once for each combination of shapes, `max_new_tokens` and `top_k`.

    Args:
        model: The language model.
        prompt_ids: Token ids, (B, P); all prompts have one length.
        max_new_tokens: How many tokens to add.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among the k likeliest tokens only.
        top_p: Sample among the fewest tokens whose probabilities sum to at least p only
            (nucleus sampling, arXiv 1904.09751). After `top_k`, if both are given.
        key: Random key; equal keys give equal tokens.
        stop_id: After this token a row is filled with it, and sampling ends once every row is.

    Returns:
        The prompts and their continuations.

    Raises:
        ValueError: If an argument is out of its range, or the prompt and the new tokens are longer
            than the model takes.
    """
    config = model.config
    prompt_ids = jnp.asarray(prompt_ids, jnp.int32)
    _check_range("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
    _check_range("temperature", temperature, temperature >= 0, "0 (greedy) or above")
    if top_k is not None:
        _check_range(
            "top_k", top_k, 1 <= top_k <= config.vocab_size, f"1 to {config.vocab_size}, or None"
        )
    if top_p is not None:
        _check_range("top_p", top_p, 0 < top_p <= 1, "above 0 and up to 1, or None")
    if prompt_ids.ndim != 2 or prompt_ids.size == 0:
        raise ValueError(
            f"prompt_ids has shape {prompt_ids.shape}; (prompts, tokens) is needed, with at "
            "least one token to start from"
        )
    total = prompt_ids.shape[1] + max_new_tokens
    if total > config.max_length:
        raise ValueError(
            f"a prompt of {prompt_ids.shape[1]} tokens and max_new_tokens={max_new_tokens}: this "
            f"model takes at most max_length={config.max_length} together; shorten either"
        )
    lowest, highest = int(jnp.min(prompt_ids)), int(jnp.max(prompt_ids))
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"prompt_ids holds {lowest if lowest < 0 else highest}; this model's token ids are "
            f"0 to {config.vocab_size - 1}"
        )
    graphdef, state = nnx.split(model)
    return _generate(
        graphdef,
        state,
        prompt_ids,
        key,
        None if temperature == 0 else _positive(temperature),
        None if top_p is None else _positive(top_p),
        None if stop_id is None else np.int32(stop_id),
        max_new_tokens=max_new_tokens,
        top_k=top_k,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "top_k"))
def _generate(
    graphdef, state, prompt_ids, key, temperature, top_p, stop_id, *, max_new_tokens, top_k
):
    model = nnx.merge(graphdef, state)
    batch, prompt_length = prompt_ids.shape
    total = prompt_length + max_new_tokens

    def choose(logits, length):
        if temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # The likeliest is at 0, whatever the temperature; others may come to minus infinity.
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
    stopped = jnp.zeros(batch, bool)
    carry = (tokens, prompt_length, logits[:, -1], cache, stopped)
    return jax.lax.while_loop(unfinished, append, carry)[0]


def keep_likeliest(
    logits: Float[Array, "B V"], top_k: int | None, top_p: Float[Array, ""] | float | None
) -> Float[Array, "B V"]:
    """Logits with those of the tokens outside `top_k` and `top_p` at minus infinity."""
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The likeliest token has nothing before it, and so is always kept.
        least = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _positive(value: float) -> np.float32:
    """In float32, where XLA takes numbers that are too small for zero."""
    return np.float32(max(value, np.finfo(np.float32).tiny))


def _check_range(name: str, value: float, within: bool, accepted: str) -> None:
    if not within:
        raise ValueError(f"{name}={value}: {accepted} is needed")
