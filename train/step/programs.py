"""What a run computes with, compiled for its mesh and without its data: init, steps, evaluation."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from galore_optax import layerwise_shardings, restart, state_shardings, subspace_parts
from galore_optax.quantization.array import dequantized
from models.llama import model as llama
from models.llama.attention import attention_implementation
from models.llama.axes import dimension_numbers, logical_axes
from models.llama.config import LlamaConfig
from train.config.flags import TrainingFlags
from train.config.optimizers import (
    OPTIMIZERS,
    clipped,
    learning_rate_schedule,
    make_optimizer,
    make_recipe,
)
from train.config.settings import Pretrain, ResolvedText, ResolvedTraining
from train.config.source import sizes
from train.config.weights import ADAPTERS, check_trained, split_params, stored_weights
from train.data.tokenizer import Tokenizer
from train.step import layerwise, skipping
from train.step.eight_bits import errors_of
from train.step.mesh import (
    BATCH,
    OWN,
    abstract_batch,
    batch_shards,
    heads_sharding,
    param_shardings,
)
from train.step.microbatches import check_batch
from train.step.ordinary import Forward, Loss, summed_loss, train_step, train_step_in_subspace
from train.step.state import Batch, Params, TrainState, step_key

Step = Callable[..., Any]
# The init of an optimizer, the shardings of its state, and the step.
Optimizer = tuple[Callable[[Params], Any], Any, Step]


class Network(NamedTuple):
    """A model as the programs need it."""

    model: Any  # its configuration
    shapes: Params  # `ShapeDtypeStruct`s as a run stores the weights
    axes: Params  # logical axes of each, keys of `train.step.mesh.RULES`
    init: Callable[[Key[Array, ""]], Params]  # random weights from the run's key
    loss: Loss
    evaluate: Callable[[Params, Batch], Any]
    batch: dict[str, jax.ShapeDtypeStruct]  # of a step; other lengths are compiled when they come


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a run computes with."""

    model: Any  # the configuration, such as a `LlamaConfig`
    mesh: Mesh
    abstract: TrainState  # `ShapeDtypeStruct`s with their shardings
    batch: dict[str, jax.ShapeDtypeStruct]
    loss: Loss
    init: Callable[[Key[Array, ""]], TrainState]  # from the run's key
    # From weights as the run stores them, which it overwrites, and the run's key.
    start: Callable[[Params, Key[Array, ""]], TrainState]
    train_step: Any  # from a train state, which it overwrites, and a batch to the next and metrics
    # The same for steps in which no subspace is refreshed, for GPUs, which copy what a conditional
    # returns as it was; None if `train_step` is for them, too.
    step_without_refresh: Any | None
    # Merges and resets adapters, in a program of its own, so that no step pays for it.
    restart: Callable[[TrainState], TrainState] | None
    eval_step: Any  # from params and a batch; a LLaMA's: the summed loss and the number of tokens
    notes: list[str]  # a line for each param that is not split over the devices as its axes say


def model_config(config: Pretrain | ResolvedText, tokenizer: Tokenizer) -> LlamaConfig:
    """The model of a run. The papers' sizes keep their vocabulary if the tokenizer's fits in.

    ValueError if that of a config.json or of --init is smaller than the tokenizer's.
    """
    size, fixed = sizes(config)
    fits = tokenizer.vocab_size <= size.vocab_size
    if fixed and not fits:
        raise ValueError(
            f"--tokenizer {config.tokenizer} has {tokenizer.vocab_size} ids, but the model of "
            f"{config.init or config.model} has vocab_size={size.vocab_size}: give its own "
            "tokenizer"
        )
    fits = fits and (fixed or str(config.model).startswith("llama-"))
    return dataclasses.replace(
        size,
        vocab_size=size.vocab_size if fits else tokenizer.vocab_size,
        dtype=config.dtype or "float32",
        param_dtype=config.weight_dtype or config.dtype or "float32",
        rematerialize=bool(config.rematerialize),
    )


def vocabulary_note(model: LlamaConfig, tokenizer: Tokenizer) -> str | None:
    """What a user may not expect of embedding and head: most of their rows are never used."""
    if 2 * tokenizer.vocab_size > model.vocab_size:
        return None
    return (
        f"vocabulary: embedding and head have the published {model.vocab_size:,} rows, of which "
        f"this tokenizer uses {tokenizer.vocab_size:,}: sizes and times are the published model's, "
        "losses are not; --tokenizer FILE names another one"
    )


def abstract_params(config: TrainingFlags, model: LlamaConfig) -> tuple[nnx.GraphDef, Params]:
    """The model without its weights, and their shapes as a run stores them."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: llama.Llama(model, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, jax.eval_shape(partial(_init_params, config, model), jax.random.key(0))


def weight_keys(key: Key[Array, ""]) -> Key[Array, "2"]:
    """The keys of adapters' random factors and of random weights, from the run's."""
    return jax.random.split(jax.random.fold_in(key, 0))


def _init_params(config: TrainingFlags, model: LlamaConfig, key: Key[Array, ""]) -> Params:
    return stored_params(config, partial(llama.init_params, model), key)


def stored_params(
    config: TrainingFlags, draw: Callable[..., Params], key: Key[Array, ""]
) -> Params:
    """Random weights as a run stores them; `draw` is like `draw_params` from its key on."""
    own, key = weight_keys(key)

    def stored(part: Params, key: Key[Array, ""]) -> Params:
        return stored_weights(config, part, dimension_numbers, key)

    if config.adapter is None:  # quantized from the beginning, a layer at a time
        return draw(key, stored)
    return stored(draw(key), own)


def make_forward(graph: nnx.GraphDef, sequences: str) -> Forward:
    """The model without its head's product, as a function of params and a batch."""

    def forward(params, batch):
        model = nnx.merge(graph, params)
        # In `document` mode padding comes last, where causal attention does not see it, and rows
        # have one document: no mask is needed.
        names = ("positions", "segment_ids") if sequences == "packed" else ()
        hidden = model.hidden(batch["inputs"], **{name: batch[name] for name in names})
        return hidden, model.head_matrix()

    return forward


def make_programs(config: ResolvedText, model: LlamaConfig, mesh: Mesh) -> Programs:
    """What a run computes with, checked against the mesh; nothing is compiled or allocated yet."""
    attention = attention_implementation(model, mesh.devices.flat[0], config.seq_len)
    scan = config.scan_layers
    if scan is None:
        # Written out, layers read their weights within the stacks, and keep activations where they
        # were made: llama-1b's step moves a fifth less (benchmarks/RESULTS.md). Recomputed layers
        # take 6% more memory so; and if GPUs share weights, XLA would keep what is gathered of all
        # layers from the forward to the backward pass.
        less_memory = config.layerwise or config.rematerialize or mesh.size > mesh.shape["data"]
        scan = less_memory or mesh.devices.flat[0].platform != "gpu"
    model = dataclasses.replace(
        model,
        scan=scan,
        attention=attention,
        # With --compress-gradients each device computes with its own rows alone.
        batch_shards=1 if config.compress_gradients else batch_shards(mesh),
        heads_at=None if config.compress_gradients else heads_sharding(mesh, model.kv_heads),
    )
    graph, shapes = abstract_params(config, model)
    loss = partial(summed_loss, make_forward(graph, config.sequences))
    looped, _ = abstract_params(config, dataclasses.replace(model, scan=True))
    loss_of_evaluation = partial(summed_loss, make_forward(looped, config.sequences))

    def evaluate(params: Params, batch: Any) -> tuple[Array, Array]:
        return loss_of_evaluation(params, batch), jnp.sum(batch["weights"])

    network = Network(
        model,
        shapes,
        logical_axes(shapes),
        init=partial(_init_params, config, model),
        loss=loss,
        evaluate=evaluate,
        batch=abstract_batch(config.batch_size, config.seq_len, mesh),
    )
    by_layers = partial(_by_layers, config, model, mesh) if config.layerwise else None
    return programs_of(config, network, mesh, by_layers)


def programs_of(
    config: ResolvedTraining,
    network: Network,
    mesh: Mesh,
    by_layers: Callable[..., Optimizer] | None = None,
) -> Programs:
    """The programs that train a network; `by_layers` makes another optimizer and step for it."""
    check_batch(config.batch_size, config.accumulate, mesh)
    shapes = network.shapes
    check_trained(config, shapes)
    params_at, notes = param_shardings(mesh, shapes, network.axes)
    ordinary = partial(_ordinary, config, network, mesh)
    optimizer = partial(by_layers or ordinary, shapes, params_at)
    init_optimizer, optimizer_at, step = optimizer()
    whole, by_rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, BATCH)
    unsent = None
    if config.compress_bits is not None:
        summed = projected_shapes(config, split_params(config, shapes)[0])
        unsent = errors_of(summed, mesh.shape["data"])
    unsent_at = jax.tree.map(lambda _: NamedSharding(mesh, OWN), unsent)
    optimizer_at = skipping.shardings(mesh, optimizer_at)
    state_at = TrainState(params_at, optimizer_at, whole, whole, unsent_at)  # pyrefly: ignore

    def start(params: Params, key: Key[Array, ""]) -> TrainState:
        optimizer = skipping.init(init_optimizer(split_params(config, params)[0]))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), unsent)
        return TrainState(params, optimizer, jnp.zeros((), jnp.int32), key, nothing)

    def init(key: Key[Array, ""]) -> TrainState:
        return start(network.init(key), key)

    def restarted(state: TrainState) -> TrainState:
        key, keep = step_key(state.key, state.step, 2), ADAPTERS[config.adapter or ""].keep
        inner = state.optimizer.inner_state
        params, inner = restart(make_optimizer(config), state.params, inner, key, keep=keep)
        return state._replace(params=params, optimizer=state.optimizer._replace(inner_state=inner))

    jit = partial(jax.jit, compiler_options=_compiler_options(config, mesh))
    advance = partial(jit, donate_argnums=0)
    state = jax.eval_shape(init, jax.random.key(0))
    abstract = jax.tree.map(lambda x, at: x.update(sharding=at, weak_type=False), state, state_at)
    lean = None
    if (
        mesh.devices.flat[0].platform == "gpu"
        and "update_proj_gap" in OPTIMIZERS[config.optimizer].options
    ):
        _, _, without_refresh = optimizer(refreshes=False)
        lean = advance(
            without_refresh, in_shardings=(state_at, by_rows), out_shardings=(state_at, whole)
        )
    again = advance(restarted, in_shardings=(state_at,), out_shardings=state_at)
    return Programs(
        model=network.model,
        mesh=mesh,
        abstract=abstract,
        batch=network.batch,
        loss=network.loss,
        init=jit(init, out_shardings=state_at),
        start=advance(start, out_shardings=state_at),
        train_step=advance(step, in_shardings=(state_at, by_rows), out_shardings=(state_at, whole)),
        step_without_refresh=lean,
        restart=again if config.restart_every is not None else None,
        eval_step=jit(network.evaluate, in_shardings=(params_at, by_rows), out_shardings=whole),
        notes=notes,
    )


def _compiler_options(config: ResolvedTraining, mesh: Mesh) -> dict[str, bool | str]:
    options: dict[str, bool | str] = {}
    if config.deterministic:
        options["xla_gpu_deterministic_ops"] = True
    if mesh.devices.flat[0].platform == "gpu":
        # XLA rematerializes if a program takes more than 80% of a card, but a step may take all of
        # it: slices of weights were computed twice, which moved 17% more bytes for 7B with 8-bit
        # GaLore and saved 0.3% of the memory.
        options["xla_disable_hlo_passes"] = "rematerialization"
        # XLA would merge products that share an operand, and then copy each result out.
        options["xla_gpu_dot_merger_threshold_mb"] = "0"
    return options


def _by_layers(
    config: ResolvedText,
    model: LlamaConfig,
    mesh: Mesh,
    shapes: Params,
    at: Params,
    refreshes: bool = True,
) -> Optimizer:
    """The optimizer and the step of `--layerwise`."""
    by_layers = layerwise.make_optimizer(config, model, mesh, refreshes)
    step = layerwise.make_step(by_layers, config, model, mesh)
    step = _on_each_device(config, mesh, step) if config.compress_gradients else step
    return by_layers.init, layerwise_shardings(by_layers, shapes, at), step


def _ordinary(
    config: ResolvedTraining,
    network: Network,
    mesh: Mesh,
    shapes: Params,
    at: Params,
    refreshes: bool = True,
) -> Optimizer:
    """The optimizer and the step that updates all params after the backward pass."""
    recipe = make_recipe(config, refreshes)
    tx = clipped(recipe, config.clip_norm)
    divided = partial(split_params, config)
    optimizer_at = state_shardings(tx, divided(shapes)[0], divided(at)[0])
    schedule, rounds = learning_rate_schedule(config), bool(config.stochastic_rounding)
    how = config.clip_norm, schedule, config.accumulate, rounds, mesh
    if not (config.accumulate_in_subspace or config.compress_gradients):
        step = partial(train_step, network.loss, recipe, *how, divided=divided)
        return tx.init, optimizer_at, step
    parts = subspace_parts(recipe)
    assert parts is not None
    given = network.loss, parts
    if not config.compress_gradients:
        step = partial(train_step_in_subspace, *given, *how, divided=divided)
        return tx.init, optimizer_at, step
    step = partial(train_step_in_subspace, *given, *how[:-1], None, divided=divided)
    step = partial(step, sum_over=("data",))
    return tx.init, optimizer_at, _on_each_device(config, mesh, step)


def projected_shapes(config: ResolvedTraining, part: Params) -> Params:
    """The shapes of the projected gradient of trained params."""
    recipe = make_recipe(config)
    parts = subspace_parts(recipe)
    assert parts is not None

    def projected(part: Params) -> Params:
        gradient = dequantized(part)
        return parts.project(gradient, recipe.init(gradient))  # pyrefly: ignore

    return jax.eval_shape(projected, part)


def _on_each_device(config: ResolvedTraining, mesh: Mesh, step: Step) -> Step:
    """The step of `--compress-gradients`, which each device makes with its rows of the batch."""
    if mesh.size == 1 or mesh.shape["data"] != mesh.size:
        said = "there is nothing to all-reduce" if mesh.size == 1 else "weights must not be split"
        asked = "without --mesh" if config.mesh is None else f"with --mesh {config.mesh}"
        raise ValueError(f"--compress-gradients {asked}: {said}; give --mesh data=N")
    whole = PartitionSpec()
    state = TrainState(whole, whole, whole, whole, OWN)  # pyrefly: ignore
    # Typed by what varies over devices, a derivative by replicated weights would be all-reduced.
    specs = {"in_specs": (state, BATCH), "out_specs": (state, whole)}
    return jax.shard_map(step, mesh=mesh, **specs, check_vma=False)
