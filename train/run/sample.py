"""Text sampled from a model."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from models.llama.generate import generate
from models.llama.model import Llama
from train.data.tokenizer import Tokenizer


def sample_text(
    model: Llama, tokenizer: Tokenizer, prompt: str, *, seed: int = 0, stop: bool = False, **how
) -> str:
    """A prompt at the beginning of a document, and its continuation by the model.

    With `stop` the text ends with the document. The other arguments are those of
    `models.llama.generate.generate`: `max_new_tokens`, `temperature`, `top_k`, `top_p`.
    """
    new = generate(
        model,
        jnp.asarray(prompt_ids(tokenizer, prompt)[None]),
        key=jax.random.key(seed),
        stop_id=tokenizer.separator if stop else None,
        **how,
    )
    return tokenizer.decode(np.asarray(new[0]))


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> Int[np.ndarray, " length"]:
    """Token ids of a prompt, after the separator that begins each document in training."""
    return np.concatenate([[tokenizer.separator], tokenizer.encode(prompt)]).astype(np.int32)
