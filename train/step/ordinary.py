"""The ordinary training step: the gradient of a batch, or of its microbatches, then an update.

Loss: the mean of -log p(target) over the targets that count, Σ w · nll / Σ w, in float32.
Letters: A microbatches, B batch, L length, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from galore_optax import apply_updates, join, split, subspace_parts, value_and_grad
from galore_optax.adapters.base import Frozen
from galore_optax.adapters.lora import with_dropout_keys
from galore_optax.layerwise.microbatches import over_microbatches, over_microbatches_in_subspace
from galore_optax.ordering import once_if
from galore_optax.sharding import sum_of_all
from galore_optax.transformation import SubspaceParts
from train.step import skipping
from train.step.eight_bits import of_same_bases, sum_in_8_bits
from train.step.loss import summed_cross_entropy
from train.step.microbatches import microbatches
from train.step.state import Batch, Metrics, Params, TrainState, step_key, step_metrics

Forward = Callable[[Params, Batch], tuple[Float[Array, "B L D"], Float[Array, "V D"]]]
# Σ w · loss over a batch. Microbatches, of shape (B / A, L), also have their number as
# `microbatch`, and in a training step a random key as `key`.
Loss = Callable[[Params, Batch], Float[Array, ""]]
Split = Callable[[Params], tuple[Params, Frozen]]  # into the trained params and the frozen ones


def summed_loss(forward: Forward, params: Params, batch: Batch) -> Float[Array, ""]:
    """Σ w · nll over a batch."""
    hidden, head = forward(params, batch)
    return summed_cross_entropy(hidden, head, batch["targets"], batch["weights"])


def loss_and_gradient(
    summed: Loss, params: Params, batch: Batch, accumulate: int = 1, mesh: Mesh | None = None
) -> tuple[Float[Array, ""], Params, Float[Array, ""]]:
    """A batch's loss, its gradient, summed in float32, and the number of targets that count."""
    gradients, parts, tokens = _by_microbatch(summed, params, batch, accumulate, mesh)
    gradient, losses = over_microbatches(gradients, parts)
    return jnp.sum(losses), gradient, tokens


def _by_microbatch(
    summed: Loss,
    params: Params,
    batch: Batch,
    accumulate: int,
    mesh: Mesh | None,
    sum_over: Sequence[str] = (),
) -> tuple[Callable[[Batch], tuple[Params, Float[Array, ""]]], Batch, Float[Array, ""]]:
    """The function from a microbatch to its gradient and loss, all microbatches, and the tokens."""
    counted = sum_of_all(jnp.sum(batch["weights"]), sum_over)
    tokens = counted
    if "mask" in batch:  # a classifier's targets are not its tokens
        tokens = sum_of_all(jnp.sum(batch["mask"].astype(jnp.float32)), sum_over)

    def objective(params: Params, microbatch: Batch) -> Array:
        return summed(params, microbatch) / jnp.maximum(counted, 1)

    def gradient_and_loss(microbatch: Batch) -> tuple[Params, Array]:
        loss, gradient = value_and_grad(objective)(params, microbatch)
        return gradient, loss  # pyrefly: ignore[bad-return]

    parts = {**microbatches(batch, accumulate, mesh), "microbatch": jnp.arange(accumulate)}
    return gradient_and_loss, parts, tokens


def train_step(
    summed: Loss,
    recipe: optax.GradientTransformation,
    clip_norm: float | None,
    schedule: optax.Schedule,
    accumulate: int,
    stochastic_rounding: bool,
    mesh: Mesh,
    state: TrainState,
    batch: Batch,
    divided: Split = split,
) -> tuple[TrainState, Metrics]:
    """One update. A loss or gradient that is not finite changes neither params nor moments."""
    trained, of_trained, applied, updated = trainable(summed, stochastic_rounding, state, divided)
    loss, gradient, tokens = loss_and_gradient(of_trained, trained, batch, accumulate, mesh)
    parts, norm = subspace_parts(recipe), _norm(gradient)

    def update(trained: Params, own: Any) -> tuple[Params, Any]:
        if parts is None or parts.needs_gradient:
            updates, own = recipe.update(_clipped(gradient, norm, clip_norm), own, trained)
            return applied(trained, updates), own
        # A projection is linear, so clipping R is the same, and saves a pass over the gradient.
        own = parts.refresh(gradient, own, trained)
        projected = _clipped(parts.project(gradient, own), norm, clip_norm)
        updates, own = parts.update_projected(projected, own, trained, factored=True)
        return applied(trained, updates), own

    clipping, own = state.optimizer.inner_state
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new, own = once_if(finite, update, trained, own)
    optimizer = skipping.counted(state.optimizer, finite, (clipping, own))
    metrics = step_metrics(schedule, state, optimizer, loss, norm, tokens)
    return updated(new, optimizer), metrics


def train_step_in_subspace(
    summed: Loss,
    recipe: SubspaceParts,
    clip_norm: float | None,
    schedule: optax.Schedule,
    accumulate: int,
    stochastic_rounding: bool,
    mesh: Mesh | None,
    state: TrainState,
    batch: Batch,
    divided: Split = split,
    sum_over: Sequence[str] = (),
) -> tuple[TrainState, Metrics]:
    """One update, from microbatches' gradients that are projected, summed and then clipped.

    The optimizer's state is that of `train_step`. If the sum is not finite, a basis that the first
    microbatch has refreshed stays, with the moments carried over, and nothing else changes. Within
    `jax.shard_map` each device has its own rows of `batch`, to be summed over the mesh axes
    `sum_over`: its gradients are, projected, and sent in 8 bits if `state` has what is `unsent`.
    """
    trained, of_trained, applied, updated = trainable(
        summed, stochastic_rounding, state, divided, sum_over
    )
    clipping, before = state.optimizer.inner_state
    how = accumulate, mesh, sum_over
    gradients, parts, tokens = _by_microbatch(of_trained, trained, batch, *how)
    gradient, own, losses = over_microbatches_in_subspace(recipe, before, trained, gradients, parts)
    kept = unsent = None
    if state.unsent is None:
        gradient = sum_of_all(gradient, sum_over)
    else:
        kept = of_same_bases(state.unsent, gradient, before, own)
        gradient, unsent = sum_in_8_bits(gradient, kept, sum_over)
    loss = jnp.sum(sum_of_all(losses, sum_over))
    norm = _norm(gradient)

    def update(trained: Params, own: Any) -> tuple[Params, Any]:
        clipped = _clipped(gradient, norm, clip_norm)
        updates, own = recipe.update_projected(clipped, own, trained, factored=True)
        return applied(trained, updates), own

    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new, own = once_if(finite, update, trained, own)
    optimizer = skipping.counted(state.optimizer, finite, (clipping, own))
    metrics = step_metrics(schedule, state, optimizer, loss, norm, tokens)
    unsent = jax.tree.map(partial(jnp.where, finite), unsent, kept)
    return updated(new, optimizer)._replace(unsent=unsent), metrics


def _norm(gradient: Params) -> Float[Array, ""]:
    """The global norm, computed in float32; not finite if a number of the gradient is not."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), gradient))


def _clipped(gradient: Any, norm: Float[Array, ""], most: float | None) -> Any:
    """A gradient, projected or not, scaled as clipping the whole gradient's `norm` to `most` does.

    `optax.clip_by_global_norm` computes the norm again, and selects: two more passes over it.
    """
    if most is None:
        return gradient
    factor = jnp.minimum(1.0, most / norm)
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), gradient)


def trainable(
    summed: Loss,
    stochastic_rounding: bool,
    state: TrainState,
    divided: Split,
    sum_over: Sequence[str] = (),
) -> tuple[Params, Loss, Callable[..., Params], Callable[..., TrainState]]:
    """The trained params, the loss as a function of them, their update, and the state after it."""
    trained, frozen = divided(state.params)
    rounding, dropout = (step_key(state.key, state.step, use) for use in range(2))
    for axis in sum_over:  # each device drops others
        dropout = jax.random.fold_in(dropout, jax.lax.axis_index(axis))

    def of_trained(trained: Params, batch: Batch) -> Array:
        own = jax.random.fold_in(dropout, batch["microbatch"])
        return summed(with_dropout_keys(join(trained, frozen), own), {**batch, "key": own})

    def applied(trained: Params, updates: optax.Updates) -> Params:
        key = rounding if stochastic_rounding else None
        return apply_updates(trained, updates, key)  # pyrefly: ignore[bad-return]

    def updated(new: Params, optimizer: optax.ApplyIfFiniteState) -> TrainState:
        return TrainState(join(new, frozen), optimizer, state.step + 1, state.key)  # pyrefly: ignore

    return trained, of_trained, applied, updated
