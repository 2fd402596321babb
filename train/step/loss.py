"""The summed cross entropy of a language model's head, without storing all of its logits.

Logits are by far the largest array of a training step: (B, L, V) with V = 32,000. Here the head is
applied to a few positions of each row at a time, and the gradient is computed in the forward pass,
while their logits exist (as in Liger Kernel, arXiv 2410.10989, section 3.2): nothing is computed
twice, and on a CPU LLaMA-60M's head takes two thirds of autodiff's time.

The head's gradient is a sum over the chunks, in float32. If that is too large, the vocabulary is
cut instead: a part's gradient is one product over all positions, and logits are computed twice.

Letters: B batch, L length, D width, V vocabulary, C chunks, P positions in a chunk.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Float, Int

# Least positions of each row in a chunk. More are not faster, and take more memory.
_POSITIONS = 64
# Most ids in a part of the vocabulary.
IDS = 4096


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed_cross_entropy(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    by_vocabulary: bool = False,
) -> Float[Array, ""]:
    """Σ w · -log softmax(hidden · headᵀ)[target], in float32.

    Differentiable with respect to `hidden`, whose dtype is that of the products' operands, and
    `head`. Where a weight is 0, target and finite hidden state do not matter. `by_vocabulary` cuts
    the vocabulary instead of the positions for the gradient: less memory, for a fourth product.
    """

    def add(total, chunk):
        x, target, weight = chunk
        logits = _logits(x, head)
        return total + _weighted(logsumexp(logits, axis=-1) - _chosen(logits, target), weight), None

    return jax.lax.scan(add, jnp.zeros(()), _chunks(hidden, targets, weights))[0]


def _forward(hidden, head, targets, weights, by_vocabulary):
    if by_vocabulary:
        return _forward_by_vocabulary(hidden, head, targets, weights)
    matrix = head.astype(hidden.dtype)

    def add(carry, chunk):
        total, head_gradient = carry
        x, target, weight = chunk
        logits = _logits(x, matrix)
        normalizer = logsumexp(logits, axis=-1)
        total += _weighted(normalizer - _chosen(logits, target), weight)
        gradient = _gradient(logits, normalizer, target, weight, x.dtype)
        head_gradient += _product(gradient.T, x)
        return (total, head_gradient), gradient @ matrix

    start, chunks = jnp.zeros(head.shape, jnp.float32), _chunks(hidden, targets, weights)
    (total, head_gradient), hidden_gradient = jax.lax.scan(add, (jnp.zeros(()), start), chunks)
    batch, length, width = hidden.shape
    hidden_gradient = hidden_gradient.reshape(-1, batch, length // len(chunks[0]), width)
    return total, (hidden_gradient.swapaxes(0, 1).reshape(hidden.shape), head_gradient, head)


def _forward_by_vocabulary(hidden, head, targets, weights):
    ids = head.shape[0]
    size = next(w for w in range(min(IDS, ids), 0, -1) if ids % w == 0)
    size = size if 8 * size >= IDS else ids  # few parts, or the whole
    parts = jnp.arange(0, ids, size), head.reshape(-1, size, head.shape[1])
    x, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.ravel(), weights.ravel()

    def normalize(carry, start_and_part):
        normalizer, chosen = carry
        start, part = start_and_part
        logits = _logits(x, part)
        normalizer = jnp.logaddexp(normalizer, logsumexp(logits, axis=-1))
        return (normalizer, chosen + _chosen(logits, targets - start)), None

    nothing = jnp.zeros(targets.shape)
    (normalizer, chosen), _ = jax.lax.scan(normalize, (nothing - jnp.inf, nothing), parts)
    total = _weighted(normalizer - chosen, weights)

    def differentiate(hidden_gradient, start_and_part):
        start, part = start_and_part
        logits = _logits(x, part)
        gradient = _gradient(logits, normalizer, targets - start, weights, x.dtype)
        hidden_gradient += _product(gradient, part.astype(x.dtype))
        return hidden_gradient, (gradient.T @ x).astype(head.dtype)

    start = jnp.zeros(x.shape, jnp.float32)
    hidden_gradient, head_gradients = jax.lax.scan(differentiate, start, parts)
    hidden_gradient = hidden_gradient.astype(hidden.dtype).reshape(hidden.shape)
    return total, (hidden_gradient, head_gradients.reshape(head.shape), head)


def _backward(by_vocabulary, residuals, cotangent):
    hidden_gradient, head_gradient, head = residuals
    hidden_gradient = (cotangent * hidden_gradient).astype(hidden_gradient.dtype)
    return hidden_gradient, (cotangent * head_gradient).astype(head.dtype), None, None


summed_cross_entropy.defvjp(_forward, _backward)


def _chunks(*arrays: Any) -> tuple[Array, ...]:
    """Cuts each (B, L, ...) into (C, B · P, ...): rows stay on their devices."""
    batch, length = arrays[0].shape[:2]
    positions = next(p for p in range(min(_POSITIONS, length), length + 1) if length % p == 0)

    def cut(x):
        x = x.reshape(batch, length // positions, positions, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(-1, batch * positions, *x.shape[3:])

    return tuple(map(cut, arrays))


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _logits(x, head):
    return _product(x, head.astype(x.dtype).T)


def _chosen(logits, targets):
    return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)


def _gradient(logits, normalizer, targets, weights, dtype):
    """The gradient of Σ w · nll with respect to the logits."""
    softmax = jnp.exp(logits - normalizer[:, None])
    gradient = (softmax - _is_target(logits, targets)) * weights[:, None]
    # `where`, as 0 · inf would be NaN at padding.
    return jnp.where(weights[:, None] > 0, gradient, 0).astype(dtype)


def _is_target(logits, targets):
    # XLA fuses a comparison with its uses; indexing would be a gather or a scatter.
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def _weighted(nll, weights):
    return jnp.sum(jnp.where(weights > 0, weights * nll, 0))
