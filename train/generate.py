"""Sample text from a run: `python -m train.generate --run DIR --prompt TEXT`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from galore_optax.adapters.base import merge
from models.llama.generate import generate
from models.llama.model import Llama
from train.data.tokenizer import Tokenizer
from train.run.cli import run
from train.run.trained import load_trained


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample text from the best checkpoint of a run, or its newest if none was evaluated."""

    run: str
    """Folder of the run."""
    prompt: str = ""
    """Where the text begins."""
    max_new_tokens: int = 200
    """Tokens to add; fewer where the model ends the document."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among this many likeliest tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Equal seeds give equal text; from 0 to 2**32 - 1."""


def main(config: Generate) -> int:
    """Prints the prompt and its continuation.

    Raises:
        ValueError: for a folder that is no run, or values out of range.
        OSError: if it cannot be read.
    """
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"--seed {config.seed}: expected 0 to 2**32 - 1")
    trained = load_trained(config.run)
    text = sample_text(
        nnx.merge(trained.graph, merge(trained.params)),
        trained.tokenizer,
        config.prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop=True,
    )
    print(text)
    return 0


def sample_text(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: bool = False,
) -> str:
    """A prompt at the beginning of a document, and what the model makes of it.

    Args:
        model: the language model.
        tokenizer: the one that it was trained with.
        prompt: where the text begins.
        max_new_tokens: as for `models.llama.generate.generate`, like the rest.
        temperature: as there.
        top_k: as there.
        top_p: as there.
        seed: of the sampling.
        stop: end with the document.
    """
    ids = prompt_ids(tokenizer, prompt)
    new = generate(
        model,
        jnp.asarray(ids[None]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=jax.random.key(seed),
        stop_id=tokenizer.separator if stop else None,
    )
    return tokenizer.decode(np.asarray(new[0]))


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Token ids of a prompt, led by the separator that begins every document in training."""
    return np.concatenate([[tokenizer.separator], tokenizer.encode(prompt)]).astype(np.int32)


if __name__ == "__main__":
    run(main, Generate, "python -m train.generate")
