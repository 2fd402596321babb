"""What a run that fine-tunes an encoder computes with: its loss, its logits and its programs.

Loss: the mean over examples of -log p(class), or of the squared error of a number, in float32.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Key

from models.encoder.config import EncoderConfig, weight_table
from models.encoder.model import Encoder
from models.llama.axes import logical_axes
from models.llama.model import draw_params
from train.config.glue import ResolvedFinetune
from train.step.mesh import BATCH
from train.step.programs import Network, Programs, programs_of, stored_params
from train.step.state import Batch, Params


def model_config(config: ResolvedFinetune, encoder: EncoderConfig, classes: int) -> EncoderConfig:
    """The encoder of a run, with a classifier."""
    return dataclasses.replace(
        encoder,
        pooler=True,
        classes=classes,
        dtype=config.dtype,
        param_dtype=config.weight_dtype,
        rematerialize=config.rematerialize,
    )


def abstract_params(
    config: ResolvedFinetune, model: EncoderConfig
) -> tuple[nnx.GraphDef, Callable[[Key[Array, ""]], Params], Params]:
    """The model without its weights, random weights as a run stores them, and their shapes."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Encoder(model, rngs=nnx.Rngs(0))), nnx.Param)
    draw = partial(draw_params, weight_table(model), model.layers, model.param_dtype)
    init = partial(stored_params, config, draw)
    return graph, init, jax.eval_shape(init, jax.random.key(0))


def make_programs(
    config: ResolvedFinetune, model: EncoderConfig, mesh: Mesh, length: int
) -> Programs:
    """What a run computes with; `length` is that of its longest batch."""
    graph, init, shapes = abstract_params(config, model)

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        return summed(logits(graph, params, batch), batch)

    def evaluate(params: Params, batch: Any) -> tuple[Array, Array]:
        outputs = logits(graph, params, batch)
        return summed(outputs, batch), outputs

    number = np.float32 if model.classes == 1 else np.int32
    dtypes = {"inputs": np.int32, "token_types": np.int32, "mask": np.bool_}
    at, rows = NamedSharding(mesh, BATCH), config.batch_size
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=at)
        for name, dtype in dtypes.items()
    }
    for name, dtype in (("targets", number), ("weights", np.float32)):
        batch[name] = jax.ShapeDtypeStruct((rows,), dtype, sharding=at)
    axes = logical_axes(shapes, weight_table(model))
    network = Network(model, shapes, axes, init=init, loss=loss, evaluate=evaluate, batch=batch)
    return programs_of(config, network, mesh)


def logits(graph: nnx.GraphDef, params: Params, batch: Batch) -> Float[Array, "B C"]:
    """The classifier's outputs for a batch, which in training has a key for what is dropped."""
    model = nnx.merge(graph, params)
    first: Key[Array, ""] | None = None
    second: Key[Array, ""] | None = None
    if "key" in batch:
        # Others than those of adapters, which come from the same key.
        first, second = jax.random.split(jax.random.fold_in(batch["key"], 0))
    places = {"mask": batch["mask"], "token_types": batch["token_types"]}
    hidden = model(batch["inputs"], **places, key=first)
    return model.logits(hidden, key=second)


def summed(outputs: Float[Array, "B C"], batch: Batch) -> Float[Array, ""]:
    """Σ w · loss over the examples of a batch."""
    targets = batch["targets"]
    if outputs.shape[1] == 1:
        losses = jnp.square(outputs[:, 0] - targets)
    else:
        picked = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], axis=1)
        losses = -picked[:, 0]
    return jnp.sum(jnp.where(batch["weights"] > 0, batch["weights"] * losses, 0))
