"""How much of the gradient's energy GaLore's bases keep, and how far they have turned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from galore_optax import subspace_parts
from galore_optax.layerwise.backward import at, forward, squares
from galore_optax.layerwise.parts import masked
from galore_optax.projection.schedule import overlap
from galore_optax.quantization.array import dequantized, is_quantized
from train.config.optimizers import make_recipe
from train.config.settings import ResolvedText, ResolvedTraining
from train.config.weights import split_params
from train.step import layerwise
from train.step.mesh import replicated
from train.step.microbatches import microbatches
from train.step.ordinary import loss_and_gradient, trainable
from train.step.programs import Programs
from train.step.state import Batch, TrainState

ByLayer = dict[str, Float[Array, " layers"]]  # by the names of projected params, of each layer

STACK = "layers"  # the name that params with an axis of layers begin with


def make_energies(
    config: ResolvedTraining, programs: Programs
) -> Callable[[TrainState, Batch], ByLayer]:
    """Makes the function of a step's state and batch to ‖PᵀG‖² / ‖G‖², with P before the step.

    It computes the gradient of the whole batch, as the step does: with `--layerwise` by layers.
    """
    if config.layerwise:
        assert isinstance(config, ResolvedText)
        energies = _by_layers(config, programs)
    else:
        energies = _at_once(config, programs)
    return jax.jit(energies, out_shardings=replicated(programs.mesh))


def _at_once(config: ResolvedTraining, programs: Programs) -> Callable[..., ByLayer]:
    parts = subspace_parts(make_recipe(config))
    assert parts is not None
    rounds, divided = bool(config.stochastic_rounding), partial(split_params, config)

    def energies(state: TrainState, batch: Batch) -> ByLayer:
        trained, of_trained, *_ = trainable(programs.loss, rounds, state, divided)
        how = config.accumulate, programs.mesh
        _, gradient, _ = loss_and_gradient(of_trained, trained, batch, *how)
        _, own = state.optimizer.inner_state
        small = _by_name(parts.project(gradient, own))
        whole, names = _by_name(gradient), bases_of(own)
        return {x: _energy(small[x], x) / _energy(whole[x], x) for x in names}

    return energies


def _by_layers(config: ResolvedText, programs: Programs) -> Callable[..., ByLayer]:
    """The same with one layer's gradient in memory; only layers have bases."""
    model, mesh = programs.model, programs.mesh
    optimizer = layerwise.make_optimizer(config, model, mesh)
    parts = subspace_parts(optimizer.tx)
    assert parts is not None

    def energies(state: TrainState, batch: Batch) -> ByLayer:
        own, tokens = state.optimizer.inner_state.layers, jnp.sum(batch["weights"])
        batches = microbatches(batch, config.accumulate, mesh)
        batches = layerwise.with_sequences(model, config.sequences, batches, tokens)
        stack, _, layers = optimizer.model.split(state.params)
        backward = forward(optimizer.model, state.params, batches, checkpoint=optimizer.checkpoint)
        _, _, cotangent = backward.head()
        others, names = masked(state.params), bases_of(own)

        def turn(cotangent: Array, i: Array) -> tuple[Array, ByLayer]:
            gradient, cotangent = backward.layer(at(stack, i), i, cotangent)
            small = _by_name(parts.project({**others, **gradient}, at(own, i)))
            whole = _by_name(gradient)
            return cotangent, {x: squares(small[x]) / squares(whole[x]) for x in names}

        return jax.lax.scan(turn, cotangent, jnp.arange(layers), reverse=True)[1]

    return energies


def bases_of(optimizer: Any) -> dict[str, tuple[Any, ...]]:
    """The bases in an optimizer's state, as stored: one for each projected side, by param."""
    optimizer = getattr(optimizer, "layers", optimizer)  # a layer-wise one's, of all that have any
    ((_, bases),) = optax.tree.get_all_with_path(optimizer, "bases")
    return {name: x if type(x) is tuple else (x,) for name, x in _by_name(bases).items()}


@partial(jax.jit, static_argnames="name")
def turned(old: tuple[Any, ...], new: tuple[Any, ...], name: str) -> Float[Array, " layers"]:
    """1 - ‖P_oldᵀ P_new‖² / r of each layer, the mean over sides: 0 for the same subspace."""
    old, new = dequantized((old, new))

    def of_matrices(a: Array, b: Array) -> Array:
        a, b = (x.astype(jnp.float32).reshape(-1, *x.shape[-2:]) for x in (a, b))
        return jnp.clip(1 - jax.vmap(overlap)(a, b), 0, 1)  # a rounding error below 0

    found = jnp.mean(jnp.stack([of_matrices(a, b) for a, b in zip(old, new, strict=True)]), 0)
    return found.reshape(old[0].shape[0] if name.startswith(STACK) else 1, -1).mean(1)


def _by_name(tree: Any) -> dict[str, Any]:
    def leaf(x: Any) -> bool:
        # Of params that have no basis there are tuples without an array.
        return is_quantized(x) or (type(x) is tuple and bool(jax.tree.leaves(x)))

    pairs = jax.tree.leaves_with_path(tree, is_leaf=leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}


def _energy(x: Any, name: str) -> Float[Array, " layers"]:
    """The squared norm of each layer of a stack, which may be a tuple of its matrices."""
    x = jnp.stack(x) if type(x) is tuple else x
    return jax.vmap(squares)(x if name.startswith(STACK) else x[None])
