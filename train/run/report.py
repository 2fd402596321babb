"""What a finished run leaves: summary.json, loss.png, a table of state bytes."""

import math
import resource
import sys

import jax
import optax

from galore_optax import cast_state
from galore_optax.memory import state_bytes, tree_bytes
from galore_optax.quantization.array import is_quantized
from train.config.settings import ResolvedTraining
from train.config.weights import split_params
from train.run import directory as run_directory
from train.run.metrics import read_metrics, tokens_per_second
from train.run.parts import Log, Parts, count, whole_params
from train.run.plots import plot_loss
from train.step.state import TrainState


def report(
    config: ResolvedTraining,
    parts: Parts,
    state: TrainState,
    log: Log,
    tokens: int,
    peak: tuple[int, str],
) -> None:
    """Writes plot and summary, prints the table; `peak` is that of `peak_memory`."""
    directory = run_directory.directory(config)
    lines = read_metrics(directory)
    ours = state_bytes(parts.abstract.optimizer.inner_state)
    trained, _ = split_params(config, parts.abstract.params)
    whole = whole_params(parts.abstract.params)
    plain = cast_state(optax.adamw(1e-3), config.state_dtype or config.weight_dtype)
    adamw = state_bytes(jax.eval_shape(plain.init, whole))
    summary = {
        **parts.leave(state, log),
        "params": count(parts.abstract.params),
        "trained_params": sum(x.size for x in jax.tree.leaves(trained, is_leaf=is_quantized)),
        "optimizer_state_bytes": sum(ours.values()),
        "adamw_state_bytes": sum(adamw.values()),
        "weight_bytes": tree_bytes(parts.abstract.params),
        "peak_memory_bytes": peak[0],
        "peak_memory_source": peak[1],
        "tokens_per_second": tokens_per_second(lines),
        "steps": int(state.step),
        "tokens": tokens,
        "skipped": int(state.optimizer.total_notfinite),
    }
    plot_loss(lines, directory / "loss.png", f"{parts.name}, {config.optimizer}", parts.unit)
    _print_table(config.optimizer, ours, adamw)
    # Last, because it says that the run is finished.
    run_directory.write_json(directory / "summary.json", summary)
    value = summary[parts.metric or "eval_perplexity"]
    said = f"{math.nan if value is None else value:.{4 if parts.metric else 2}f}"
    log(f"{summary.get('metric', 'perplexity')} {said}; see {directory}")


def peak_memory(device: jax.Device) -> tuple[int, str]:
    """The most bytes in use at once, and the source of that number."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], f"peak_bytes_in_use of one {device.device_kind}"
    # Linux counts it in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "resident memory of the process"


def _print_table(name: str, ours: dict[str, int], adamw: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="optimizer state, MB")
    table.add_column("")
    for column in (name, "AdamW", "share"):
        table.add_column(column, justify="right")
    for kind, size in ours.items():
        table.add_row(kind, f"{size / 1e6:,.3f}", f"{adamw[kind] / 1e6:,.3f}", "")
    a, b = sum(ours.values()), sum(adamw.values())
    table.add_section()
    table.add_row("all", f"{a / 1e6:,.3f}", f"{b / 1e6:,.3f}", f"{a / b:.0%}")
    Console().print(table)
