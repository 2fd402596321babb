"""The first train state of a run: random weights, or those of --init, stored as the run does."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float

from galore_optax.adapters.base import merge
from galore_optax.quantization.array import dequantized
from models.hugging_face.llama import check_weights, read_weights
from models.llama.axes import dimension_numbers
from models.llama.config import LlamaConfig, weight_table
from train.config.settings import ResolvedText, ResolvedTraining
from train.config.source import is_run
from train.config.weights import stored_weights
from train.run.directory import has_checkpoint
from train.run.trained import load_trained
from train.step.mesh import replicated
from train.step.programs import Programs, weight_keys
from train.step.state import TrainState

Weights = Iterator[tuple[tuple[str, ...], Float[np.ndarray, "..."]]]


def checked_initial(config: ResolvedText, programs: Programs) -> Callable[[], TrainState]:
    """Returns what makes the train state before the first step, after a look at --init.

    ValueError if the headers of its files say that they do not fit: before a step is compiled. A
    resumed run has weights in its checkpoints, and --init may be gone.
    """
    if config.init is not None and not has_checkpoint(config) and not is_run(config.init):
        check_weights(Path(config.init), programs.model)
    return partial(initial_state, config, programs)


def initial_state(config: ResolvedText, programs: Programs) -> TrainState:
    """Returns the train state before the first step; each device gets its own part of the weights.

    ValueError if those of --init do not fit the model.
    """
    if config.init is None:
        return programs.init(jax.random.key(config.seed))
    read = _of_run if is_run(config.init) else read_weights
    return state_from(config, programs, read(Path(config.init), programs.model))


def state_from(config: ResolvedTraining, programs: Programs, weights: Weights) -> TrainState:
    """Returns the train state before the first step, from all weights of the model by path.

    They are read, and quantized, a stack at a time, so that neither the host nor the devices have
    all of them in floats besides.
    """
    key = jax.random.key(config.seed)
    wanted: dict[Any, Any] = flatten_dict(programs.abstract.params)
    params = {}
    for path, array in weights:
        params[path] = _stored(config, path, array, wanted[path], programs.mesh, key)
    return programs.start(unflatten_dict(params), key)


def _stored(
    config: ResolvedTraining,
    path: tuple[str, ...],
    array: Float[np.ndarray, "..."],
    wanted: Any,
    mesh: Mesh,
    key: Array,
) -> Any:
    """Puts a weight on the devices, quantized or with its adapter if `wanted` is."""
    leaves = jax.tree.leaves(wanted)
    at = [x.sharding for x in leaves if x.shape == array.shape] or [replicated(mesh)]
    weight = jax.make_array_from_callback(array.shape, at[0], array.__getitem__)
    if isinstance(wanted, jax.ShapeDtypeStruct):
        return weight

    def store(weight: Array, key: Array) -> Any:
        part = unflatten_dict({path: weight})
        return flatten_dict(stored_weights(config, part, dimension_numbers, key))[path]

    shardings = jax.tree.map(lambda x: x.sharding, wanted)
    return jax.jit(store, out_shardings=shardings)(weight, weight_keys(key)[0])


def _of_run(folder: Path, model: LlamaConfig) -> Weights:
    """Reads the weights of a run's best checkpoint; adapters are merged."""
    params: dict[Any, Any] = flatten_dict(load_trained(str(folder), "--init").params)
    weights: dict[Any, Any] = flatten_dict(weight_table(model))
    for path, (shape, *_) in weights.items():
        weight = dequantized(merge(params.pop(path)))
        if weight.shape != shape:
            raise ValueError(
                f"--init {folder}: {'/'.join(path)} is {list(weight.shape)} there, but "
                f"{list(shape)} with this tokenizer; leave --tokenizer out"
            )
        yield path, np.asarray(weight.astype(model.param_dtype))
