"""The training step of `--layerwise`: a LLaMA's backward pass and its update, a layer at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from galore_optax import Layered, Layerwise, apply_updates
from galore_optax.quantization.array import dequantized
from galore_optax.sharding import sum_of_all
from models.llama.attention import sequences_of
from models.llama.config import LlamaConfig
from models.llama.layer import embed, rms_norm, training_layer
from train.config.optimizers import learning_rate_schedule, make_recipe
from train.config.settings import ResolvedText
from train.step import skipping
from train.step.loss import summed_cross_entropy
from train.step.mesh import BATCH
from train.step.microbatches import microbatches
from train.step.state import Batch, Metrics, Params, TrainState, step_key, step_metrics


def make_optimizer(
    config: ResolvedText, model: LlamaConfig, mesh: Mesh, refreshes: bool = True
) -> Layerwise:
    """The named optimizer of a run, applied layer by layer; see `make_recipe`."""
    rounding = jax.random.key(config.seed) if config.stochastic_rounding else None

    def rounded(part: Params, updates: Any, count: Int[Array, ""], layer: Array | None) -> Any:
        key = None if rounding is None else step_key(rounding, count, 0)
        if key is not None and layer is not None:
            key = jax.random.fold_in(key, layer)
        return apply_updates(part, updates, key)

    return Layerwise(
        layered_llama(model, mesh, whole=not config.compress_gradients),
        make_recipe(config, refreshes),
        clip_norm=config.clip_norm,
        clip=config.clip or "exact",
        accumulate=config.accumulate,
        accumulate_in_subspace=config.accumulate_in_subspace,
        checkpoint=config.rematerialize,
        apply_updates=rounded,
        factored=True,
    )


def layered_llama(config: LlamaConfig, mesh: Mesh, whole: bool = True) -> Layered:
    """A LLaMA as embedding, layer and head, which take a batch of `with_sequences`.

    That is the `whole` batch, or within `jax.shard_map` a device's own rows.
    """
    # `Layerwise` decides whether a layer is recomputed in the backward pass.
    config = dataclasses.replace(config, rematerialize=False)

    def embedded(params, batch):
        return embed(config, params["embedding"], batch["inputs"])

    def layer(params, hidden, batch):
        hidden = training_layer(config, batch["sequences"], params, hidden)
        # Otherwise XLA would split the hidden states differently within the loop over the layers.
        at = NamedSharding(mesh, BATCH)
        return jax.lax.with_sharding_constraint(hidden, at) if whole else hidden

    def head(params, hidden, batch):
        hidden = rms_norm(hidden, params["norm"], config.norm_eps)
        matrix = dequantized(params["embedding" if config.tied else "head"])
        counted = batch["targets"], batch["weights"]
        # A head as large as a 7B model's must not have its gradient in float32, too. If devices
        # share the vocabulary, its parts would have to be gathered.
        by_vocabulary = matrix.size >= 2**26 and mesh.shape["tensor"] == 1
        summed = summed_cross_entropy(hidden, matrix, *counted, by_vocabulary)
        return summed / jnp.maximum(batch["tokens"], 1)

    return Layered(embedded, layer, head)


def with_sequences(
    config: LlamaConfig, mode: str, batch: Batch, tokens: Float[Array, ""]
) -> dict[str, Any]:
    """A batch `(*A, B, L)` and what the model needs besides; `tokens` counts all targets."""
    shape = batch["inputs"].shape
    if mode == "packed":
        sequences = sequences_of(config, batch["positions"], batch["segment_ids"])
    else:
        sequences = sequences_of(config, jnp.broadcast_to(jnp.arange(shape[-1]), shape))
    tokens = jnp.broadcast_to(tokens, shape[:-2])
    return {**batch, "sequences": sequences, "tokens": tokens}


def make_step(
    optimizer: Layerwise, config: ResolvedText, model: LlamaConfig, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the step. It counts as skipped if `Layerwise` left out any part, as not finite."""
    schedule = learning_rate_schedule(config)
    sum_over = ("data",) if config.compress_gradients else ()

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = sum_of_all(jnp.sum(batch["weights"]), sum_over)
        if config.accumulate > 1:
            batch = microbatches(batch, config.accumulate, None if sum_over else mesh)
        batch = with_sequences(model, config.sequences, batch, tokens)
        params, inner, told = optimizer.step(state.params, state.optimizer.inner_state, batch)
        after = skipping.counted(state.optimizer, told.finite, inner)
        metrics = step_metrics(schedule, state, after, told.loss, told.grad_norm, tokens)
        return TrainState(params, after, state.step + 1, state.key), metrics

    return train_step
