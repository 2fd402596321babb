"""The training step of `--layerwise`: a LLaMA's backward pass and its update, a layer at a time."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from galore_optax import apply_updates
from galore_optax.layerwise.backward import Layered
from galore_optax.layerwise.sharding import layerwise_shardings
from galore_optax.layerwise.step import Layerwise
from galore_optax.quantization.array import dequantized
from models.llama.attention import sequences_of
from models.llama.config import LlamaConfig
from models.llama.layer import embed, rms_norm, training_layer
from train.config.optimizers import make_recipe
from train.step.loss import summed_cross_entropy
from train.step.mesh import BATCH, replicated
from train.step.ordinary import (
    Batch,
    Metrics,
    Params,
    TrainState,
    counted,
    cut,
    step_key,
    step_metrics,
)

if TYPE_CHECKING:
    from train.config.resolve import Resolved


def optimizer(config: "Resolved", model: LlamaConfig, mesh: Mesh) -> Layerwise:
    """The optimizer of a resolved configuration, around the model.

    Args:
        config: from `train.config.resolve.resolve`.
        model: sizes and numerics.
        mesh: the devices.
    """
    rounding = jax.random.key(config.seed) if config.stochastic_rounding else None

    def rounded(part: Params, updates: Any, count: Array, layer: Array | None) -> Any:
        key = None if rounding is None else step_key(rounding, count, 0)
        if key is not None and layer is not None:
            key = jax.random.fold_in(key, layer)
        return apply_updates(part, updates, key)

    return Layerwise(
        layered_llama(model, mesh),
        make_recipe(config),
        clip_norm=config.clip_norm,
        clip=config.clip,
        accumulate=config.accumulate,
        accumulate_in_subspace=config.accumulate_in_subspace,
        checkpoint=config.rematerialize,
        apply_updates=rounded,
    )


def layered_llama(config: LlamaConfig, mesh: Mesh) -> Layered:
    """A LLaMA in pieces, which take what `with_sequences` makes of a batch.

    Args:
        config: sizes and numerics.
        mesh: the devices, over which hidden states are split as the batch is.
    """
    # Whether a layer is computed again in the backward pass is said to `Layerwise`.
    config = dataclasses.replace(config, rematerialize=False)

    def embedded(params, batch):
        return embed(config, params["embedding"], batch["inputs"])

    def layer(params, hidden, batch):
        hidden = training_layer(config, batch["sequences"], params, hidden)
        # XLA would split them otherwise within the loop over the layers.
        return jax.lax.with_sharding_constraint(hidden, NamedSharding(mesh, BATCH))

    def head(params, hidden, batch):
        hidden = rms_norm(hidden, params["norm"], config.norm_eps)
        matrix = dequantized(params["head"])
        # A head as large as a 7B's: not also its gradient in float32. Not where devices share the
        # vocabulary, of which a part would have to be gathered.
        by_vocabulary = matrix.size >= 2**26 and mesh.shape["tensor"] == 1
        summed = summed_cross_entropy(
            hidden, matrix, batch["targets"], batch["weights"], by_vocabulary
        )
        return summed / jnp.maximum(batch["tokens"], 1)

    return Layered(embedded, layer, head)


def with_sequences(
    config: LlamaConfig, mode: str, batch: dict[str, Array], tokens: Array
) -> dict[str, Any]:
    """A batch, or a stack of microbatches, and what the pieces need beside the data's arrays.

    Args:
        config: sizes and numerics.
        mode: `packed` or `document`.
        batch: arrays `(..., B, L)`.
        tokens: how many targets count, in all microbatches.
    """
    if mode == "packed":
        sequences = sequences_of(config, batch["positions"], batch["segment_ids"])
    else:
        shape = batch["inputs"].shape
        sequences = sequences_of(config, jnp.broadcast_to(jnp.arange(shape[-1]), shape))
    tokens = jnp.broadcast_to(tokens, batch["inputs"].shape[:-2])
    return {**batch, "sequences": sequences, "tokens": tokens}


def init(optimizer: Layerwise, params: Params) -> optax.ApplyIfFiniteState:
    """The optimizer's state, with the trainer's count of steps that were skipped."""
    none = jnp.zeros((), jnp.int32)
    return optax.ApplyIfFiniteState(none, jnp.array(True), none, optimizer.init(params))


def shardings(
    optimizer: Layerwise, mesh: Mesh, shapes: Params, params_at: Params
) -> optax.ApplyIfFiniteState:
    """Where the optimizer's state lives, from where the params live."""
    whole = replicated(mesh)
    inner = layerwise_shardings(optimizer, shapes, params_at)
    return optax.ApplyIfFiniteState(whole, whole, whole, inner)  # pyrefly: ignore


def train_step(
    optimizer: Layerwise,
    config: LlamaConfig,
    mode: str,
    schedule: optax.Schedule,
    mesh: Mesh,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One update; `Layerwise` says what becomes of a loss or gradient that is not finite.

    A step of which anything was left out counts as skipped.
    """
    tokens = jnp.sum(batch["weights"])
    several = optimizer.accumulate > 1
    batch = cut(batch, optimizer.accumulate, mesh) if several else dict(batch)
    before = state.optimizer
    params, inner, told = optimizer.step(
        state.params, before.inner_state, with_sequences(config, mode, batch, tokens)
    )
    after = counted(before, told.finite, inner)
    metrics = step_metrics(schedule, state, after, told.loss, told.grad_norm, tokens)
    return TrainState(params, after, state.step + 1, state.key), metrics
