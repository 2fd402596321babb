"""The weights that a run has come to: those of its best checkpoint, or of its newest."""

from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from train.config.resolve import load
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.run.assemble import abstract_params, model_config
from train.run.checkpoint import Checkpoints
from train.run.metrics import evaluation_losses
from train.step.mesh import available_devices
from train.step.ordinary import Params


class Trained(NamedTuple):
    """What a run has come to.

    Attributes:
        graph: the model without its weights.
        params: its weights as the run holds them, in few bits or with adapters, on one device.
        tokenizer: that of the run.
    """

    graph: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer


def load_trained(run: str) -> Trained:
    """Reads the best checkpoint of a run, or its newest if none was evaluated.

    Args:
        run: the run's folder.

    Raises:
        ValueError: if it is no run, or has no checkpoint that can be read.
        OSError: if it cannot be read.
    """
    folder = Path(run)
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
    return Trained(graph, params, tokenizer)
