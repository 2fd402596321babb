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
from jaxtyping import Array, Float, Int, Key

from galore_optax import apply_updates
from galore_optax.adapter import join, split
from galore_optax.quantized import is_quantized
from galore_optax.quantized_weights import value_and_grad
from galore_optax.restart import restart
from models.adapters import with_dropout_keys
from train.loss import summed_cross_entropy
from train.mesh import BATCH, replicated

Params = dict[str, Any]
Batch = Mapping[str, Array]
Forward = Callable[[Params, Batch], tuple[Float[Array, "B L D"], Float[Array, "D V"]]]
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

    def objective(params, microbatch):
        return summed_loss(forward, params, microbatch) / jnp.maximum(tokens, 1)

    gradient_of: Callable[..., Any] = value_and_grad(objective)
    if accumulate == 1:
        loss, gradient = gradient_of(params, {**batch, "microbatch": jnp.int32(0)})
        return loss, _spoilt_unless_finite(gradient, loss), tokens

    def add(total, microbatch):
        loss, gradient = gradient_of(params, microbatch)
        total_loss, total_gradient = total
        summed = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total_gradient, gradient)
        return (total_loss + loss, summed), None

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params, is_leaf=is_quantized)
    microbatches = {**cut(batch, accumulate, mesh), "microbatch": jnp.arange(accumulate)}
    (loss, gradient), _ = jax.lax.scan(add, (jnp.zeros(()), zero), microbatches)
    gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)
    return loss, _spoilt_unless_finite(gradient, loss), tokens


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
    trained, frozen = split(state.params)
    rounding, dropout = (_folded(state, i) for i in range(2))

    def of_trained(trained: Params, batch: Batch) -> tuple[Array, Array]:
        own = jax.random.fold_in(dropout, batch["microbatch"])
        return forward(with_dropout_keys(join(trained, frozen), own), batch)

    loss, gradient, tokens = loss_and_gradient(of_trained, trained, batch, accumulate, mesh)
    updates, optimizer = tx.update(gradient, state.optimizer, trained)
    assert isinstance(optimizer, optax.ApplyIfFiniteState)
    norm = optax.tree.norm(gradient)
    metrics = step_metrics(schedule, state, optimizer, loss, norm, tokens)
    trained = apply_updates(trained, updates, rounding if stochastic_rounding else None)
    params = join(trained, frozen)
    return TrainState(params, optimizer, state.step + 1, state.key), metrics  # pyrefly: ignore


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
