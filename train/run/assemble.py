"""Everything a run needs before its first step, none of it on disk yet: model, data, mesh, step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from galore_optax.adapters.base import split
from galore_optax.memory import tree_bytes
from galore_optax.quantization.array import dequantized
from galore_optax.sharding import state_shardings
from galore_optax.transformation import SubspaceTransformation
from models.llama.attention import attention_implementation
from models.llama.axes import dimension_numbers, logical_axes
from models.llama.config import SIZES, LlamaConfig, count_params
from models.llama.model import Llama, init_params
from train.config.optimizers import learning_rate_schedule, make_optimizer, make_recipe
from train.config.resolve import Pretrain, Resolved
from train.config.weights import ADAPTERS, held_weights
from train.data.loader import TrainingData, evaluation_batches
from train.data.sequences import Batch
from train.data.text import load_text
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.step import layerwise
from train.step.mesh import (
    abstract_batch,
    batch_shards,
    check_batch,
    make_mesh,
    param_shardings,
    replicated,
)
from train.step.ordinary import (
    Forward,
    Params,
    TrainState,
    make_eval_step,
    make_restart,
    make_train_step,
    train_step,
    train_step_in_subspace,
)


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a run computes with.

    Attributes:
        model: sizes and numerics.
        mesh: the devices.
        abstract: the train state as `ShapeDtypeStruct` with its shardings.
        batch: a batch in the same manner.
        init: makes the first train state, already sharded, from the run's key.
        train_step: overwrites a train state by the next one.
        restart: overwrites a train state by one whose adapters begin anew; None without restarts.
        eval_step: from params and a batch to the summed loss and the number of tokens.
    """

    model: LlamaConfig
    mesh: Mesh
    abstract: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[jax.Array], TrainState]
    train_step: Any
    restart: Callable[[TrainState], TrainState] | None
    eval_step: Any


@dataclasses.dataclass(frozen=True)
class Parts(Programs):
    """What a run is made of.

    Attributes:
        tokenizer: of the data.
        data: training batches from any position on.
        evaluation: the batches of an evaluation.
    """

    tokenizer: Tokenizer
    data: TrainingData
    evaluation: list[Batch]


def model_config(config: Pretrain, tokenizer: Tokenizer) -> LlamaConfig:
    """The model of a run: the papers' sizes keep their vocabulary where the tokenizer's fits."""
    size = SIZES[config.model]
    fits = tokenizer.vocab_size <= size.vocab_size and config.model.startswith("llama-")
    return dataclasses.replace(
        size,
        vocab_size=size.vocab_size if fits else tokenizer.vocab_size,
        dtype=config.dtype or "float32",
        param_dtype=config.dtype or "float32",
        rematerialize=bool(config.rematerialize),
    )


def abstract_params(config: Pretrain, model: LlamaConfig) -> tuple[nnx.GraphDef, Params]:
    """The model without its weights, and their shapes as a run holds them."""
    abstract = nnx.eval_shape(lambda: Llama(model, rngs=nnx.Rngs(0)))
    graph, _ = nnx.split(abstract, nnx.Param)
    held = jax.eval_shape(partial(_init_params, config, model), jax.random.key(0))
    return graph, held


def _init_params(config: Pretrain, model: LlamaConfig, key: jax.Array) -> Params:
    """Weights as a run holds them."""
    own, key = jax.random.split(key)

    def hold(part: Params, key: jax.Array) -> Params:
        return held_weights(config, part, dimension_numbers, key)

    if config.adapter is None:  # in few bits from the beginning, a layer at a time
        return init_params(model, key, hold)
    return hold(init_params(model, key), own)


def assemble(config: Resolved, log: Callable[[str], object]) -> Parts:
    """Builds a run from its resolved configuration, checks what can be checked, writes nothing.

    Raises:
        ValueError: names the flag, its value and what is accepted.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, config.accumulate, mesh)  # before the data are read
    _log_devices(config, mesh, log)

    tokenizer = load_tokenizer(config.tokenizer)
    model = model_config(config, tokenizer)
    prompt = 1 + len(tokenizer.encode(config.prompt))
    if prompt >= model.max_length:
        raise ValueError(f"--prompt of {prompt} tokens: {config.model} takes {model.max_length}")
    common = {"seq_len": config.seq_len, "mode": config.sequences, "vocab_size": model.vocab_size}
    train_text = load_text(config.data, "train", config.data_dir)
    eval_text = load_text(config.data, "validation", config.data_dir)
    data = TrainingData(
        train_text,
        tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
        **common,
    )
    evaluation = evaluation_batches(
        eval_text,
        tokenizer,
        batch_size=config.batch_size // config.accumulate,
        max_tokens=config.eval_tokens,
        **common,
    )
    eval_tokens = int(sum(batch["weights"].sum() for batch in evaluation))
    named = {
        "builtin": "the documentation of Python's standard library",
        "c4": f"C4 (c4/en) in {config.data_dir}",
    }
    log(
        f"data: {named[config.data]}, {len(train_text):,} documents to train on, "
        f"{len(eval_text):,} to evaluate on ({eval_tokens:,} tokens); tokenizer "
        f"{config.tokenizer}, {tokenizer.vocab_size:,} ids; {config.sequences} sequences"
    )
    programs = make_programs(config, model, mesh, log)
    return Parts(**vars(programs), tokenizer=tokenizer, data=data, evaluation=evaluation)


def make_programs(
    config: Resolved, model: LlamaConfig, mesh: Mesh, log: Callable[[str], object]
) -> Programs:
    """What a run computes with, from its resolved configuration and its model's; reads no data.

    Raises:
        ValueError: names the flag, its value and what is accepted.
    """
    check_batch(config.batch_size, config.accumulate, mesh)
    attention = attention_implementation(model, mesh.devices.flat[0], config.seq_len)
    model = dataclasses.replace(model, attention=attention, batch_shards=batch_shards(mesh))
    graph, shapes = abstract_params(config, model)
    forward = make_forward(graph, config.sequences)
    schedule = learning_rate_schedule(config)
    params_at, notes = param_shardings(mesh, shapes, logical_axes(shapes))
    for note in notes:
        log(f"sharding: {note}")
    tx = make_optimizer(config)
    if config.layerwise:
        by_layers = layerwise.optimizer(config, model, mesh)
        init_optimizer = partial(layerwise.init, by_layers)
        optimizer_at = layerwise.shardings(by_layers, mesh, shapes, params_at)
        step = partial(layerwise.train_step, by_layers, model, config.sequences, schedule, mesh)
    else:
        init_optimizer = tx.init
        optimizer_at = state_shardings(tx, split(shapes)[0], split(params_at)[0])
        rounding = bool(config.stochastic_rounding)
        how = schedule, config.accumulate, rounding, mesh
        step = partial(train_step, forward, tx, *how)
        if config.accumulate_in_subspace:
            recipe = make_recipe(config)
            assert isinstance(recipe, SubspaceTransformation)
            step = partial(train_step_in_subspace, forward, recipe, config.clip_norm, *how)
    shardings = TrainState._make((params_at, optimizer_at, replicated(mesh), replicated(mesh)))

    def init(key: jax.Array) -> TrainState:
        params = _init_params(config, model, jax.random.fold_in(key, 0))
        optimizer = init_optimizer(split(params)[0])
        assert isinstance(optimizer, optax.ApplyIfFiniteState)
        return TrainState(params, optimizer, jnp.zeros((), jnp.int32), key)

    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(init, jax.random.key(0)),
        shardings,
    )
    log(
        f"model: {config.model}, {count_params(model):,} params, {config.dtype}, "
        f"{tree_bytes(shapes) / 1e6:,.1f} MB; attention by {model.attention}"
    )
    if config.adapter is not None:
        trained = sum(x.size for x in jax.tree.leaves(split(shapes)[0]))
        log(
            f"adapter: {config.adapter}, rank {config.rank}, {trained:,} params trained"
            + (f", begun anew every {config.restart_every} steps" if config.restart_every else "")
        )
    rank = config.rank if config.gradient_rank is None else config.gradient_rank
    gap = config.update_proj_gap
    log(
        f"optimizer: {config.optimizer}, state of {tree_bytes(abstract.optimizer) / 1e6:,.1f} MB"
        + (f", rank {rank}, a subspace every {gap} steps" if gap else "")
    )
    options = {"xla_gpu_deterministic_ops": True} if config.deterministic else None
    again = None
    if config.adapter is not None and config.restart_every is not None:
        keep = ADAPTERS[config.adapter].keep
        again = make_restart(tx, keep=keep, state_shardings=shardings, compiler_options=options)
    return Programs(
        model=model,
        mesh=mesh,
        abstract=abstract,
        batch=abstract_batch(config.batch_size, config.seq_len, mesh),
        init=jax.jit(init, out_shardings=shardings, compiler_options=options),
        train_step=make_train_step(
            step,
            mesh=mesh,
            state_shardings=shardings,
            compiler_options=options,
        ),
        restart=again,
        eval_step=make_eval_step(
            forward, mesh=mesh, param_shardings=params_at, compiler_options=options
        ),
    )


def make_forward(graph: nnx.GraphDef, sequences: str) -> Forward:
    """The model but for its head's product, as a function of its params and a batch."""

    def forward(params, batch):
        model = nnx.merge(graph, params)
        # In `document` mode padding comes last, where causal attention does not see it, and rows
        # hold one document: no mask is needed.
        names = ("positions", "segment_ids") if sequences == "packed" else ()
        hidden = model.hidden(batch["inputs"], **{name: batch[name] for name in names})
        return hidden, dequantized(model.head.get_value())

    return forward


def _log_devices(config: Resolved, mesh: Mesh, log: Callable[[str], object]) -> None:
    device = mesh.devices.flat[0]
    layout = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    there = jax.device_count()
    unused = "" if mesh.size == there else f" of {there} (--mesh data={there} uses all)"
    same_bits = device.platform == "cpu" or config.deterministic
    log(
        f"devices: {mesh.size}{unused} x {device.device_kind} ({device.platform})"
        f"{', mesh ' + layout if layout else ''}; a repeated or resumed run gives the same "
        f"{'bits' if same_bits else 'numbers to rounding (--deterministic: the same bits)'}"
    )
