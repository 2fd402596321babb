"""The training step of `--layerwise`: a LLaMA's backward pass and its update, a layer at a time."""

import dataclasses

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from galore_optax.layered import Layered
from galore_optax.layerwise import Layerwise
from models.llama import rms_norm, training_layer
from models.llama_config import LlamaConfig
from train.loss import summed_cross_entropy
from train.mesh import replicated
from train.step import Batch, Metrics, Params, TrainState, cut, step_metrics


def layered_llama(config: LlamaConfig, sequences: str) -> Layered:
    """A LLaMA in pieces, whose batches have, beside the data's arrays, `tokens`: all that count.

    Args:
        config: sizes and numerics.
        sequences: `packed` or `document`.
    """
    # A layer is computed again as it is: its checkpoints within are those of the fastest way.
    config = dataclasses.replace(config, rematerialize=False)

    def embed(params, batch):
        return params["embedding"][batch["inputs"]].astype(config.dtype)

    def layer(params, hidden, batch):
        if sequences == "packed":
            return training_layer(config, batch["positions"], batch["segment_ids"])(params, hidden)
        positions = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
        return training_layer(config, positions)(params, hidden)

    def head(params, hidden, batch):
        hidden = rms_norm(hidden, params["norm"], config.norm_eps)
        summed = summed_cross_entropy(hidden, params["head"], batch["targets"], batch["weights"])
        return summed / jnp.maximum(batch["tokens"], 1)

    return Layered(embed, layer, head)


def init(optimizer: Layerwise, params: Params) -> optax.ApplyIfFiniteState:
    """The optimizer's state, with the trainer's count of steps that were skipped."""
    none = jnp.zeros((), jnp.int32)
    return optax.ApplyIfFiniteState(none, jnp.array(True), none, optimizer.init(params))


def shardings(
    optimizer: Layerwise, mesh: Mesh, shapes: Params, params_at: Params
) -> optax.ApplyIfFiniteState:
    """Where the optimizer's state lives, from where the params live."""
    whole = replicated(mesh)
    inner = optimizer.state_shardings(shapes, params_at)
    return optax.ApplyIfFiniteState(whole, whole, whole, inner)  # pyrefly: ignore


def train_step(
    optimizer: Layerwise, schedule: optax.Schedule, mesh: Mesh, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One update; `Layerwise` says what becomes of a loss or gradient that is not finite.

    A step of which anything was left out counts as skipped.
    """
    tokens = jnp.sum(batch["weights"])
    if optimizer.accumulate > 1:
        batch = cut(batch, optimizer.accumulate, mesh)
    batch = {**batch, "tokens": jnp.broadcast_to(tokens, batch["weights"].shape[:-2])}
    before = state.optimizer
    params, inner, told = optimizer.step(state.params, before.inner_state, batch)
    after = optax.ApplyIfFiniteState(
        notfinite_count=jnp.where(told.finite, 0, before.notfinite_count + 1),
        last_finite=told.finite,
        total_notfinite=before.total_notfinite + ~told.finite,
        inner_state=inner,
    )
    metrics = step_metrics(schedule, state, after, told.loss, told.grad_norm, tokens)
    return TrainState(params, after, state.step + 1, state.key), metrics
