"""Loads the weights of a run: those of its best checkpoint, or of its newest."""

from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from train.config.resolve import load
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


def load_trained(run: str) -> Trained:
    """Reads the best checkpoint of a run's folder, or its newest if none was evaluated.

    Raises ValueError if it is not a run, or has no checkpoint that can be read.
    """
    folder = Path(run)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--run {folder} is not a run of train.pretrain (no config.json)")
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"--run {folder} has no checkpoint yet")
    settings = load(folder / "config.json")
    tokenizer, place = load_tokenizer(settings.tokenizer), replicated(make_mesh(None))
    graph, shapes = abstract_params(settings, model_config(settings, tokenizer))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    evaluations = evaluation_losses(folder)
    with Checkpoints(folder / "checkpoints", 1, print, evaluations, read_only=True) as checkpoints:
        _, params = checkpoints.restore_params(shapes)
    return Trained(graph, params, tokenizer)
