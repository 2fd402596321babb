"""One training step and one evaluation step, compiled for a mesh.

Loss: the mean of -log p(target) over the targets that count, Σ w · nll / Σ w, in float32.
Letters: B batch, L length, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from galore_optax import apply_updates
from galore_optax.adapters.base import join, split
from galore_optax.adapters.lora import with_dropout_keys
from galore_optax.adapters.restart import restart
from galore_optax.layerwise.microbatches import over_microbatches, over_microbatches_in_subspace
from galore_optax.quantization.weights import value_and_grad
from galore_optax.transformation import SubspaceParts
from train.step.loss import summed_cross_entropy
from train.step.mesh import BATCH, replicated

Params = dict[str, Any]
Batch = Mapping[str, Array]
Forward = Callable[[Params, Batch], tuple[Float[Array, "B L D"], Float[Array, "V D"]]]
Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        params: the weights, and adapters in the place of some.
        optimizer: state of `optax.apply_if_finite(...)`, of what is trained of the params.
        step: batches seen.
        key: of the run's seed; what needs randomness in a step folds the step into it.
    """

    params: Params
    optimizer: optax.ApplyIfFiniteState
    step: Int[Array, ""]
    key: Key[Array, ""]

    def rest(self) -> dict[str, Any]:
        """All but the params, by name."""
        fields = self._asdict()
        del fields["params"]
        return fields


def summed_loss(forward: Forward, params: Params, batch: Batch) -> Float[Array, ""]:
    """Σ w · nll over a batch."""
    hidden, head = forward(params, batch)
    return summed_cross_entropy(hidden, head, batch["targets"], batch["weights"])


def loss_and_gradient(
    forward: Forward, params: Params, batch: Batch, accumulate: int = 1, mesh: Mesh | None = None
) -> tuple[Float[Array, ""], Params, Float[Array, ""]]:
    """The loss over a batch, its gradient, and the number of targets that count.

    Args:
        forward: from params and a batch to the last hidden states and the head's matrix; the batch
            has the number of the microbatch in it, too, as `microbatch`.
        params: the weights.
        batch: arrays `(B, L)`: what `forward` reads, and `targets` and `weights`.
        accumulate: into how many microbatches B is cut; their gradients are summed in float32.
        mesh: keeps every microbatch split over the devices.

    Returns:
        The gradient is not finite if the loss is not, so that it cannot be applied.
    """
    tokens = jnp.sum(batch["weights"])
    gradient, losses = over_microbatches(
        _of_microbatch(forward, params, tokens), microbatches(batch, accumulate, mesh)
    )
    loss = jnp.sum(losses)
    return loss, _spoilt_unless_finite(gradient, loss), tokens


def _of_microbatch(
    forward: Forward, params: Params, tokens: Array
) -> Callable[[Batch], tuple[Params, Array]]:
    """From a microbatch to the gradient of its share in the loss, and that share."""

    def objective(params: Params, microbatch: Batch) -> Array:
        return summed_loss(forward, params, microbatch) / jnp.maximum(tokens, 1)

    def gradient_and_loss(microbatch: Batch) -> tuple[Params, Array]:
        loss, gradient = value_and_grad(objective)(params, microbatch)
        return gradient, loss  # pyrefly: ignore[bad-return]

    return gradient_and_loss


def microbatches(batch: Batch, accumulate: int, mesh: Mesh | None) -> dict[str, Array]:
    """A batch cut into microbatches, each with its number."""
    return {**cut(batch, accumulate, mesh), "microbatch": jnp.arange(accumulate)}


def cut(batch: Batch, accumulate: int, mesh: Mesh | None) -> dict[str, Array]:
    """A batch's arrays `(B, ...)` as microbatches `(accumulate, B / accumulate, ...)`."""

    def cut_one(x: Array) -> Array:
        # Row i goes to microbatch i mod accumulate: (B, L) -> (B/A, A, L) -> (A, B/A, L) moves
        # nothing between devices, as each holds a range of rows.
        x = x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *BATCH)))

    return {name: cut_one(x) for name, x in batch.items()}


def _spoilt_unless_finite(gradient: Params, loss: Float[Array, ""]) -> Params:
    """The gradient, with NaN in its smallest leaf if the loss is not finite.

    A leaf is enough for `optax.apply_if_finite`, and the smallest costs nothing.
    """
    leaves, structure = jax.tree.flatten(gradient)
    smallest = min(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[smallest] = jnp.where(jnp.isfinite(loss), leaves[smallest], jnp.nan)
    return jax.tree.unflatten(structure, leaves)


def train_step(
    forward: Forward,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    accumulate: int,
    stochastic_rounding: bool,
    mesh: Mesh,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One update. A loss or gradient that is not finite leaves params and moments as they are."""
    trained, of_trained, rounding = _of_trained(forward, stochastic_rounding, state)
    loss, gradient, tokens = loss_and_gradient(of_trained, trained, batch, accumulate, mesh)
    updates, optimizer = tx.update(gradient, state.optimizer, trained)
    assert isinstance(optimizer, optax.ApplyIfFiniteState)
    norm = optax.tree.norm(gradient)
    metrics = step_metrics(schedule, state, optimizer, loss, norm, tokens)
    return _updated(state, updates, optimizer, rounding), metrics


def train_step_in_subspace(
    forward: Forward,
    recipe: SubspaceParts,
    clip_norm: float,
    schedule: optax.Schedule,
    accumulate: int,
    stochastic_rounding: bool,
    mesh: Mesh,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """One update, from microbatches' gradients that are summed projected, and clipped then.

    The optimizer's state is that of `train_step`. Where the sum is not finite, only a new basis may
    have come of it, with the moments carried over.
    """
    trained, of_trained, rounding = _of_trained(forward, stochastic_rounding, state)
    tokens = jnp.sum(batch["weights"])
    before = state.optimizer
    clipping, own = before.inner_state
    gradient, own, losses = over_microbatches_in_subspace(
        recipe,
        own,
        trained,
        _of_microbatch(of_trained, trained, tokens),
        microbatches(batch, accumulate, mesh),
    )
    loss, norm = jnp.sum(losses), optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    clipped, clipping = optax.clip_by_global_norm(clip_norm).update(gradient, clipping)

    def finished() -> tuple[optax.Updates, optax.OptState]:
        return recipe.update_projected(clipped, own, trained)

    def left_out() -> tuple[optax.Updates, optax.OptState]:
        return optax.tree.zeros_like(jax.eval_shape(finished)[0]), own

    updates, own = jax.lax.cond(finite, finished, left_out)
    optimizer = counted(before, finite, (clipping, own))
    metrics = step_metrics(schedule, state, optimizer, loss, norm, tokens)
    return _updated(state, updates, optimizer, rounding), metrics


def _of_trained(
    forward: Forward, stochastic_rounding: bool, state: TrainState
) -> tuple[Params, Forward, Key[Array, ""] | None]:
    """What is trained, the model as a function of it, and the key of stochastic rounding."""
    trained, frozen = split(state.params)
    rounding, dropout = (_folded(state, i) for i in range(2))

    def of_trained(trained: Params, batch: Batch) -> tuple[Array, Array]:
        own = jax.random.fold_in(dropout, batch["microbatch"])
        return forward(with_dropout_keys(join(trained, frozen), own), batch)

    return trained, of_trained, rounding if stochastic_rounding else None


def _updated(
    state: TrainState,
    updates: optax.Updates,
    optimizer: optax.ApplyIfFiniteState,
    rounding: Key[Array, ""] | None,
) -> TrainState:
    trained, frozen = split(state.params)
    params = join(apply_updates(trained, updates, rounding), frozen)
    return TrainState(params, optimizer, state.step + 1, state.key)  # pyrefly: ignore


def counted(
    before: optax.ApplyIfFiniteState, finite: Bool[Array, ""], inner: optax.OptState
) -> optax.ApplyIfFiniteState:
    """The count of steps that were skipped, after one that was done or not."""
    return optax.ApplyIfFiniteState(
        notfinite_count=jnp.where(finite, 0, before.notfinite_count + 1),
        last_finite=finite,
        total_notfinite=before.total_notfinite + ~finite,
        inner_state=inner,
    )


def _folded(state: TrainState, use: int) -> Key[Array, ""]:
    return step_key(state.key, state.step, use)


def step_key(key: Key[Array, ""], step: Int[Array, ""], use: int) -> Key[Array, ""]:
    """A key for one use of randomness in a step."""
    return jax.random.fold_in(jax.random.fold_in(key, step), use)


def make_restart(
    tx: optax.GradientTransformationExtraArgs,
    *,
    keep: float,
    state_shardings: TrainState,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState], TrainState]:
    """Merges adapters and begins anew, compiled for a mesh; overwrites what it is given.

    A program of its own, so that no other step pays for it.
    """

    def again(state: TrainState) -> TrainState:
        params, optimizer = restart(tx, state.params, state.optimizer, _folded(state, 2), keep=keep)
        return TrainState(params, optimizer, state.step, state.key)  # pyrefly: ignore

    return jax.jit(
        again,
        in_shardings=(state_shardings,),
        out_shardings=state_shardings,
        donate_argnums=0,
        compiler_options=compiler_options,
    )


def step_metrics(
    schedule: optax.Schedule,
    before: TrainState,
    optimizer: optax.ApplyIfFiniteState,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    tokens: Float[Array, ""],
) -> Metrics:
    """What a step tells, from the state before it and the optimizer's state after it."""
    applied = before.step - before.optimizer.total_notfinite
    refreshes = optax.tree.get_all_with_path(optimizer, "refreshes")
    counts = {"refreshes": jnp.asarray(optax.tree.sum([x for _, x in refreshes]))}
    return (counts if refreshes else {}) | {
        "loss": loss,
        "learning_rate": jnp.asarray(schedule(applied), jnp.float32),
        "grad_norm": grad_norm.astype(jnp.float32),
        "tokens": tokens,
        "skipped": optimizer.total_notfinite,
        "skipped_in_a_row": optimizer.notfinite_count,
    }


def make_train_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    *,
    mesh: Mesh,
    state_shardings: TrainState,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A step compiled for a mesh; it overwrites the state that it is given."""
    return jax.jit(
        step,
        in_shardings=(state_shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options,
    )


def make_eval_step(
    forward: Forward,
    *,
    mesh: Mesh,
    param_shardings: Params,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[Params, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """From params and a batch to Σ w · nll and Σ w, compiled for a mesh."""
    return jax.jit(
        lambda params, batch: (summed_loss(forward, params, batch), jnp.sum(batch["weights"])),
        in_shardings=(param_shardings, NamedSharding(mesh, BATCH)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options,
    )
