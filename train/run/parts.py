"""What a run computes with and its data, whatever it trains: the base of each kind of run."""

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from galore_optax.adapters.base import merge
from galore_optax.memory import tree_bytes
from galore_optax.quantization.array import dequantized, is_quantized
from train.config.settings import ResolvedTraining
from train.config.weights import split_params
from train.data.sequences import Batch, Positions
from train.memory.units import in_words
from train.run.directory import has_checkpoint
from train.step.mesh import available_devices, put_batch
from train.step.programs import Programs
from train.step.state import Params, TrainState

Log = Callable[[str], object]


class Data(Protocol):
    """Batches to train on, without end."""

    def batches(self, start: Positions | None = None) -> Generator[tuple[Batch, Positions]]:
        """Batches from a position on, each with the position after it."""
        ...


class Evaluation(NamedTuple):
    """What an evaluation found."""

    values: dict[str, float]  # the line of metrics.jsonl: eval_loss and others
    said: str  # the same for the screen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts(Programs):
    """What a run computes with, and its data."""

    unit: ClassVar[str] = "nats per token"  # of the loss
    metric: ClassVar[str | None] = None  # of evaluations; the highest is the best. None: the loss

    name: str  # of the model, in the title of the plot
    initial: Callable[[], TrainState]  # the state before the first step
    data: Data
    made_with: dict[str, Any]  # what must be equal when the run is resumed
    sample_every: int | None = None  # steps between two calls of `keep_sample`
    # Files that the run keeps a copy of, by the name of their folder in the run's, and by theirs.
    kept: Mapping[str, Mapping[str, Path]] = dataclasses.field(default_factory=dict)

    def evaluate(self, params: Params, stopped: Callable[[], bool]) -> Evaluation | None:
        """Evaluates the weights; None if `stopped` says so meanwhile."""
        raise NotImplementedError

    def leave(self, state: TrainState, log: Log) -> dict[str, Any]:
        """Writes and prints what the kind of run leaves; returns what summary.json has of it."""
        raise NotImplementedError

    def keep_sample(self, params: Params, step: int, log: Log) -> None:
        """Prints what the model says after a step, and keeps it in the run's folder."""
        raise NotImplementedError

    def flops_per_token(self) -> float:
        """The operations to train on one token."""
        raise NotImplementedError

    def less_memory(self, available: int) -> str:
        """What to do if a step takes more than the bytes of a device."""
        raise NotImplementedError

    def run_evaluation(
        self, params: Params, batches: list[Batch], stopped: Callable[[], bool]
    ) -> list[Any] | None:
        """The results of `eval_step` for each batch, on the host; None if stopped meanwhile."""
        results = []
        for batch in batches:
            results.append(self.eval_step(params, put_batch(self.mesh, batch)))
            if stopped():
                return None
        return jax.device_get(results)


def whole_params(params: PyTree) -> PyTree:
    """The shapes of a model's params without adapters and quantization."""
    return jax.eval_shape(lambda params: dequantized(merge(params)), params)


def count(params: PyTree) -> int:
    """The number of a model's params, without adapters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(whole_params(params)))


def trained_params(config: ResolvedTraining, params: PyTree) -> int:
    """The number of params that are trained, adapters among them; those that are quantized, too."""
    trained, _ = split_params(config, params)
    return sum(x.size for x in jax.tree.leaves(trained, is_leaf=is_quantized))


def log_devices(config: ResolvedTraining, mesh: Mesh, log: Log) -> None:
    """Prints on which devices a run is, and whether it can be repeated bit for bit there."""
    device = mesh.devices.flat[0]
    layout = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    available = len(available_devices())
    unused = f" of {available} (--mesh data={available} uses all)"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    same = "numbers to rounding (--deterministic: the same bits)"
    log(
        f"devices: {mesh.size}{unused if mesh.size < available else ''} x {device.device_kind} "
        f"({device.platform}){processes}{', mesh ' + layout if layout else ''}; a repeated or "
        "resumed run gives the same "
        f"{'bits' if device.platform == 'cpu' or config.deterministic else same}"
    )


def log_programs(
    config: ResolvedTraining, programs: Programs, model: str, weights: str, log: Log
) -> None:
    """Prints what is trained, and by which optimizer; `model` and `weights` describe the model."""
    params, optimizer = programs.abstract.params, programs.abstract.optimizer
    for note in programs.notes:
        log(f"sharding: {note}")
    if has_checkpoint(config):
        weights = "weights of a checkpoint"
    stored = "" if config.weight_dtype == config.dtype else f" with {config.weight_dtype} weights"
    log(
        f"model: {model}, {count(params):,} params, {config.dtype}{stored}, "
        f"{in_words(tree_bytes(params))}; {weights}"
    )
    trained = trained_params(config, params)
    if config.adapter is not None:
        every = config.restart_every
        log(
            f"adapter: {config.adapter}, rank {config.rank}, {trained:,} params trained"
            + (f", merged and reset every {every} steps" if every and every < config.steps else "")
        )
    elif config.train is not None or config.freeze is not None:
        log(f"frozen: all but {trained:,} params")
    rank = config.rank if config.gradient_rank is None else config.gradient_rank
    gap, moments = config.update_proj_gap, config.state_dtype
    other = moments is not None and moments != config.weight_dtype
    log(
        f"optimizer: {config.optimizer}, state of {in_words(tree_bytes(optimizer))}"
        + (f", moments in {moments}" if other else "")
        + (f", rank {rank}, a subspace every {gap} steps" if gap else "")
    )
