"""What a finished run leaves: summary.json, plots, and a table about the run."""

import math
import resource
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import optax

from galore_optax import cast_state
from galore_optax.memory import state_bytes, tree_bytes
from train.config.settings import ResolvedTraining
from train.memory.units import in_words
from train.run import directory as run_directory
from train.run.metrics import read_metrics, tokens_per_second
from train.run.parts import Log, Parts, count, trained_params, whole_params
from train.run.plots import plot_loss, plot_subspaces
from train.run.subspaces import read_subspaces
from train.step.state import TrainState

RESIDENT = "resident memory of the process"  # a source of `peak_memory`


def report(
    config: ResolvedTraining,
    parts: Parts,
    state: TrainState,
    log: Log,
    tokens: int,
    peak: tuple[int, str],
    planned: int,
) -> None:
    """Writes plot and summary, prints the table; `peak` is that of `peak_memory`.

    `planned` is the peak of a step on one device, in bytes.
    """
    directory = run_directory.directory(config)
    lines = read_metrics(directory)
    ours = state_bytes(parts.abstract.optimizer.inner_state)
    whole = whole_params(parts.abstract.params)
    plain = cast_state(optax.adamw(1e-3), config.state_dtype or config.weight_dtype)
    adamw = state_bytes(jax.eval_shape(plain.init, whole))
    summary = {
        **parts.leave(state, log),
        "params": count(parts.abstract.params),
        "trained_params": trained_params(config, parts.abstract.params),
        "optimizer_state_bytes": sum(ours.values()),
        "adamw_state_bytes": sum(adamw.values()),
        "weight_bytes": tree_bytes(parts.abstract.params),
        "peak_memory_bytes": peak[0],
        "peak_memory_source": peak[1],
        "planned_peak_bytes": planned,
        "tokens_per_second": tokens_per_second(lines),
        "steps": int(state.step),
        "tokens": tokens,
        "skipped": int(state.optimizer.total_notfinite),
        "refreshes": next((x["refreshes"] for x in reversed(lines) if "refreshes" in x), None),
    }
    title = f"{parts.name}, {config.optimizer}, batch {config.batch_size} x {config.seq_len} tokens"
    plot_loss(lines, directory / "loss.png", title, parts.unit)
    if measured := read_subspaces(directory):
        plot_subspaces(measured, directory / "subspace.png", title)
    ends = _bytes_of(parts.abstract.optimizer.inner_state, ("embedding", "head"))
    log(title)
    for name, value, note in closing_table(summary, ours, ends):
        log(f"  {name:16} {value:>16}" + (f"  {note}" if note else ""))
    # Last, because it says that the run is finished.
    run_directory.write_json(directory / "summary.json", summary)
    value = summary.get(parts.metric or "eval_perplexity")
    said = f"{math.nan if value is None else value:.{4 if parts.metric else 2}f}"
    log(f"{summary.get('metric', 'perplexity')} {said}; see {directory}")


def peak_memory(device: jax.Device) -> tuple[int, str]:
    """The most bytes in use at once, and the source of that number."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], f"peak_bytes_in_use of one {device.device_kind}"
    # Linux counts it in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), RESIDENT


def _bytes_of(state: Any, names: Collection[str]) -> int:
    """Bytes of the arrays of a state that belong to the params of some names."""
    leaves = jax.tree.leaves_with_path(state)
    keys = ((x, {getattr(key, "key", None) for key in path}) for path, x in leaves)
    return tree_bytes([x for x, found in keys if found & {*names}])


def closing_table(
    summary: Mapping[str, Any], state: Mapping[str, int], ends: int
) -> Iterator[tuple[str, str, str]]:
    """The table about a finished run: name, value and note of each row.

    `state` is the optimizer's in bytes by kind, `ends` its share of embedding and head.
    """
    total, adamw = sum(state.values()), summary["adamw_state_bytes"]
    yield "weights", in_words(summary["weight_bytes"]), ""
    share = f"{total / adamw:.0%} of AdamW's at full rank, {in_words(adamw)}"
    same = abs(total - adamw) < adamw / 200
    yield "optimizer state", in_words(total), "" if same else share
    for kind, name in (("projections", "  bases"), ("moments", "  moments")):
        if size := state[kind]:
            yield name, in_words(size), ""
    if 2 * ends > total:
        yield "  of these", in_words(ends), "of embedding and head, most of it"
    yield "planned peak", in_words(summary["planned_peak_bytes"]), "of a step, on one device"
    resident = summary["peak_memory_source"] == RESIDENT
    besides = "Python, the compiler and data" if resident else "evaluations and waiting batches"
    note = f"{summary['peak_memory_source']}, with {besides}"
    yield "measured peak", in_words(summary["peak_memory_bytes"]), note
    if speed := summary["tokens_per_second"]:
        yield "tokens/s", f"{speed:,.0f}", "over all steps, without evaluations"
    skipped = summary["skipped"]
    said = f"{skipped:,} skipped: loss or gradient not finite, no weight changed" if skipped else ""
    yield "steps", f"{summary['steps']:,}", said
    if refreshes := summary["refreshes"]:
        yield "refreshes", f"{refreshes:,}", "bases found: one for each matrix and refresh"
