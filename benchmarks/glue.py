"""GLUE by task, method, learning rate and seed: mean and spread of each task's metric.

    python -m benchmarks.glue --data-dir DIR --init DIR --out DIR --tasks mrpc rte --seeds 3

Every run is `python -m train.finetune`; finished ones are reused, and a run that was interrupted
goes on. Of each method's learning rates the one with the best mean counts, and --best-seeds adds
runs at that rate. The table goes to standard output and table.md, the plot to glue.png.
"""

import dataclasses
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.runs import Table, finished
from train.run.plots import picture

FULL, GALORE, ADAPTER = (1e-5, 2e-5, 5e-5), (1e-5, 2e-5, 3e-5), (2e-4, 4e-4, 8e-4)

# Flags, and the learning rates to choose from.
METHODS: Mapping[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "full": (("--optimizer", "adamw"), FULL),
    "GaLore r=4": (("--optimizer", "galore-adamw", "--rank", "4"), GALORE),
    "GaLore r=8": (("--optimizer", "galore-adamw", "--rank", "8"), GALORE),
    "8-bit GaLore r=8": (("--optimizer", "galore-adamw8bit", "--rank", "8"), GALORE),
    "Q-GaLore r=8": (("--optimizer", "q-galore-adamw8bit", "--rank", "8"), GALORE),
    "LoRA r=4": (("--optimizer", "lora-adamw", "--rank", "4"), ADAPTER),
    "LoRA r=8": (("--optimizer", "lora-adamw", "--rank", "8"), ADAPTER),
    "QLoRA r=8": (("--optimizer", "qlora-adamw", "--rank", "8"), ADAPTER),
    "GradNormLoRP r=8": (("--optimizer", "gradnorm-lorp-adamw", "--rank", "8"), ADAPTER),
}

Scores = tuple[float, list[float]]  # the best learning rate, and the metric of each seed with it


@dataclasses.dataclass(frozen=True)
class Glue(Table):
    """Fine-tunes an encoder on tasks of GLUE by several methods, and prints a table."""

    init: Path = dataclasses.field(kw_only=True)
    """Folder with the weights to begin with, as for train.finetune."""
    tasks: tuple[str, ...] = ("mrpc", "rte", "cola", "stsb")
    """Columns of the table."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows of the table."""
    seeds: int = 1
    """Runs at each learning rate, with seeds from 0."""
    best_seeds: int | None = None
    """Runs at the best learning rate, with those of --seeds. None: no more than these."""
    rate_factor: float = 1.0
    """Factor of all learning rates, which are for RoBERTa-base: smaller models take higher ones."""
    adapter_rate_factor: float | None = None
    """That of methods with adapters. None: the same."""
    rates: int = 3
    """How many of each method's learning rates to try, from the middle one on; 1, 2 or 3."""
    flags: str = ""
    """Further flags of every run, as --flags='--epochs 3 --seq-len 128'."""
    projected_flags: str = ""
    """Further flags of methods that project gradients: --projected-flags="--update-proj-gap 50"."""


def main(config: Glue) -> None:
    """Runs what is missing, and writes table and plot after each task's methods."""
    if unknown := [name for name in config.methods if name not in METHODS]:
        raise SystemExit(f"--methods {unknown[0]!r}: choose of {', '.join(METHODS)}")
    for name, least, most in (("seeds", 1, None), ("rates", 1, 3)):
        value = getattr(config, name)
        if value < least or (most is not None and value > most):
            said = f"{least} or more" if most is None else f"{least} to {most}"
            raise SystemExit(f"--{name} {value}: expected {said}")
    config.out.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], Scores] = {}
    for task in config.tasks:
        for method in config.methods:
            found[method, task] = _scores(config, task, method)
        done = [name for name in config.tasks if (config.methods[0], name) in found]
        (config.out / "table.md").write_text(table(found, config.methods, done))
        _plot(found, config.methods, done, config.out / "glue.png")
    print((config.out / "table.md").read_text(), end="")


def table(
    found: Mapping[tuple[str, str], Scores], methods: tuple[str, ...], tasks: list[str]
) -> str:
    """A table in Markdown: in percent the mean, the standard deviation, the learning rate."""
    lines = ["| | " + " | ".join([*tasks, "average"]) + " |", "| --- " * (len(tasks) + 2) + "|"]
    for method in methods:
        cells, means = [], []
        for task in tasks:
            rate, scores = found[method, task]
            means.append(100 * statistics.fmean(scores))
            spread = f" ± {100 * statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            cells.append(f"{means[-1]:.2f}{spread} ({rate:.1e}, n={len(scores)})")
        cells.append(f"{statistics.fmean(means):.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _scores(config: Glue, task: str, method: str) -> Scores:
    scores = {
        rate: [_metric(config, task, method, rate, seed) for seed in range(config.seeds)]
        for rate in _rates(config, method)
    }
    rate = max(scores, key=lambda x: statistics.fmean(scores[x]))
    more = range(config.seeds, config.best_seeds or config.seeds)
    return rate, scores[rate] + [_metric(config, task, method, rate, seed) for seed in more]


def _rates(config: Glue, method: str) -> list[float]:
    low, middle, high = rates = METHODS[method][1]
    own = config.adapter_rate_factor if rates is ADAPTER else None
    factor = config.rate_factor if own is None else own
    return [rate * factor for rate in (middle, high, low)[: config.rates]]


def _metric(config: Glue, task: str, method: str, rate: float, seed: int) -> float:
    """The metric of one run, which is trained first if it is missing; 0 if it diverged."""
    name = f"{task}-{method.replace(' ', '-').replace('=', '')}-{rate:.1e}-{seed}".lower()
    words = ["--task", task, *METHODS[method][0], "--learning-rate", rate, "--seed", seed]
    words += shlex.split(config.flags)
    if "GaLore" in method or "GradNormLoRP" in method:
        words += shlex.split(config.projected_flags)
    summary = finished(config, "train.finetune", name, words, config.init)
    return summary.get("eval_metric") or 0.0


def _plot(
    found: Mapping[tuple[str, str], Scores], methods: tuple[str, ...], tasks: list[str], path: Path
) -> None:
    with picture(path, (2 + 2.2 * len(tasks), 4.8)) as figure:
        axes = figure.add_subplot()
        width = 0.8 / len(methods)
        for i, method in enumerate(methods):
            scores = [found[method, task][1] for task in tasks]
            means = [100 * statistics.fmean(x) for x in scores]
            spreads = [100 * statistics.stdev(x) if len(x) > 1 else 0 for x in scores]
            at = [j + (i - (len(methods) - 1) / 2) * width for j in range(len(tasks))]
            axes.bar(at, means, width, yerr=spreads, capsize=2, label=method)
        axes.set(ylabel="metric, %", xticks=range(len(tasks)), xticklabels=tasks)
        axes.grid(alpha=0.3, axis="y")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
        axes.legend(frameon=False, fontsize="small", ncols=3, **below)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Glue))
