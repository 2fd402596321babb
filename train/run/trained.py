"""A trained model: its weights from a checkpoint of a run, and text sampled from it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from models.llama.generate import generate
from models.llama.model import Llama
from train.config.finetune_lm import load_run
from train.config.resume import lasting
from train.config.settings import Pretrain, ResolvedFinetuneLM
from train.config.source import made_of
from train.data.chat import ChatTemplate, load_template
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.run.checkpoint import Checkpoints
from train.run.metrics import evaluation_losses
from train.step.mesh import make_mesh, replicated
from train.step.programs import abstract_params, model_config
from train.step.state import Params


class Trained(NamedTuple):
    """A trained model."""

    graph: nnx.GraphDef
    params: Params  # as the run stores them, quantized or with adapters, on one device
    tokenizer: Tokenizer
    step: int  # of the checkpoint
    config: Pretrain | ResolvedFinetuneLM  # of the run


def load_trained(run: str, option: str = "--run", log: Callable[[str], object] = print) -> Trained:
    """Reads the best checkpoint of a run, or the newest; ValueError if it has none."""
    folder = Path(run)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{option} {folder} is not a run's folder (no config.json)")
    settings = load_run(folder / "config.json")
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"{option} {folder} has no checkpoint yet")
    tokenizer = load_tokenizer(settings.tokenizer or "bytes", settings.end_token)
    model = model_config(settings, tokenizer)
    place = replicated(make_mesh(None))
    graph, shapes = abstract_params(settings, model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    evaluations = evaluation_losses(folder)
    made_with = {
        **lasting(settings),
        **made_of(settings, model),
        "content of the tokenizer": tokenizer.content,
    }
    there, how = folder / "checkpoints", {"run": made_with, "read_only": True}
    with Checkpoints(there, 1, log, evaluations, **how) as checkpoints:
        step, params = checkpoints.restore_params(shapes)
    return Trained(graph, params, tokenizer, step, settings)


def answer(
    model: Llama, tokenizer: Tokenizer, prompt: Int[np.ndarray, " length"], *, seed: int = 0, **how
) -> str:
    """What a model writes after the token ids of a prompt, up to the end; `how`: see `generate`."""
    ids = jnp.asarray(prompt, jnp.int32)[None]
    found = generate(model, ids, key=jax.random.key(seed), stop_id=tokenizer.separator, **how)
    return tokenizer.decode(np.asarray(found[0, len(prompt) :]))


def chat_template(trained: Trained, named: str | None = None) -> ChatTemplate:
    """The chat template in the file `named`, or of a run, or of its tokenizer.

    ValueError if there is none.
    """
    named = named or getattr(trained.config, "chat_template", None)
    return load_template(trained.tokenizer, named)


def sample_text(
    model: Llama, tokenizer: Tokenizer, prompt: str, *, seed: int = 0, stop: bool = False, **how
) -> str:
    """A document that begins with the prompt, to its end if `stop`; `how`: see `generate`."""
    ids = jnp.asarray([[tokenizer.begin, *tokenizer.encode(prompt)]], jnp.int32)
    stop_id, key = tokenizer.separator if stop else None, jax.random.key(seed)
    return tokenizer.decode(np.asarray(generate(model, ids, key=key, stop_id=stop_id, **how)[0]))
