"""Sample text from a run: `python -m train.generate --run DIR --prompt TEXT`."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from galore_optax.adapter import merge
from models.generate import generate
from models.llama import Llama
from train.assemble import abstract_params, model_config
from train.checkpoint import Checkpoints
from train.cli import run
from train.config import load
from train.mesh import available_devices
from train.metrics import evaluation_losses
from train.tokenizer import Tokenizer, load_tokenizer


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
    """Equal seeds give equal text."""


def main(config: Generate) -> int:
    """Prints the prompt and its continuation.

    Raises:
        ValueError: for a folder that is no run, or values out of range.
        OSError: if it cannot be read.
    """
    folder = Path(config.run)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--run {folder} is not a run of train.pretrain (no config.json)")
    settings = load(folder / "config.json")
    tokenizer = load_tokenizer(settings.tokenizer)
    graph, shapes = abstract_params(settings, model_config(settings, tokenizer))
    place = jax.sharding.SingleDeviceSharding(available_devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"--run {folder} has no checkpoint yet")
    evaluations = evaluation_losses(folder)
    with Checkpoints(folder / "checkpoints", 1, print, evaluations, read_only=True) as checkpoints:
        _, params = checkpoints.restore_params(shapes)
    text = sample_text(
        nnx.merge(graph, merge(params)),
        tokenizer,
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
        max_new_tokens: as for `models.generate.generate`, like the rest.
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
