"""Perplexity, memory and speed of methods after equal tokens, each at its best learning rate.

    python -m benchmarks.quality --data-dir DIR --out DIR --seeds 3

DIR is a data set written by `python -m train.prepare_c4`. Every run is `python -m train.pretrain`;
finished ones are reused, and one that was interrupted goes on. Seed 0 is trained at each learning
rate, the others at its best one. The table goes to standard output and table.md, perplexity against
bytes to quality.png.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.runs import Runs, trained
from train.run.plots import picture

FULL, GALORE = (0.0005, 0.001, 0.002, 0.005), (0.005, 0.01, 0.02, 0.04)
MUON = (0.001, 0.002, 0.005, 0.01)
LOWER = (0.00125, 0.0025)  # for methods that were best at GALORE's lowest

# Flags, and the learning rates to choose from.
METHODS: Mapping[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "full rank": (("--optimizer", "adamw"), FULL),
    "GaLore": (("--optimizer", "galore-adamw"), GALORE),
    "8-bit GaLore": (("--optimizer", "galore-adamw8bit"), GALORE),
    "Q-GaLore": (("--optimizer", "q-galore-adamw8bit"), GALORE),
    "Fira": (("--optimizer", "fira-adamw"), LOWER + GALORE),
    "APOLLO": (("--optimizer", "apollo-adamw"), GALORE),
    "APOLLO-Mini": (("--optimizer", "apollo-mini-adamw"), LOWER + GALORE),
    "Alice": (("--optimizer", "alice"), GALORE),
    "Alice-0": (("--optimizer", "alice", "--tracking", "0"), GALORE),
    "RACS": (("--optimizer", "racs"), GALORE),
    "SCALE": (("--optimizer", "scale"), FULL),
    "Muon": (("--optimizer", "muon"), MUON),
    "8-bit Muon": (("--optimizer", "muon", "--moment-bits", "8"), MUON),
    "4-bit Muon": (("--optimizer", "muon", "--moment-bits", "4"), MUON),
    "low rank": (("--optimizer", "adamw", "--adapter", "low-rank"), FULL),
    "LoRA": (("--optimizer", "lora-adamw"), FULL),
    "DoRA": (("--optimizer", "adamw", "--adapter", "dora"), FULL),
    "ReLoRA": (("--optimizer", "relora-adamw"), FULL),
    "QLoRA": (("--optimizer", "qlora-adamw"), FULL),
    "GradNormLoRP": (("--optimizer", "gradnorm-lorp-adamw"), GALORE),
    "8-bit GradNormLoRP": (
        ("--optimizer", "gradnorm-lorp-adamw", "--moment-bits", "8", "--weight-bits", "8"),
        GALORE,
    ),
    "Adafactor": (("--optimizer", "adafactor"), (0.001, 0.002, 0.005, 0.01)),
    "GaLore Adafactor": (("--optimizer", "galore-adafactor"), GALORE),
    # Alice without its parts, for a model with --rank 32, such as tiny.
    "Alice, plain": (
        ("--optimizer", "alice", "--compensation", "0", "--leading", "32", "--tracking", "0"),
        GALORE,
    ),
    "Alice, tracked": (
        ("--optimizer", "alice", "--compensation", "0", "--leading", "32"),
        GALORE,
    ),
    "Alice, switched": (("--optimizer", "alice", "--compensation", "0"), GALORE),
    # GaLore with other settings; tiny has 100 steps between refreshes.
    "GaLore, moments kept": (("--optimizer", "galore-adamw", "--moments", "keep"), GALORE),
    "GaLore, gap 50": (("--optimizer", "galore-adamw", "--update-proj-gap", "50"), GALORE),
    "GaLore, gap 500": (("--optimizer", "galore-adamw", "--update-proj-gap", "500"), GALORE),
    "GaLore, staggered": (("--optimizer", "galore-adamw", "--stagger"), GALORE),
    "GaLore, scale 1": (("--optimizer", "galore-adamw", "--scale", "1"), GALORE),
}


@dataclasses.dataclass(frozen=True)
class Comparison(Runs):
    """Trains each method at four learning rates or more, and prints a table."""

    methods: tuple[str, ...] = tuple(METHODS)[:14]
    """Rows of the table."""
    seeds: int = 1
    """Runs at each method's best learning rate, with seeds from 0."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a method reached."""

    rate: float  # the best one
    swept: dict[float, float]  # perplexity of seed 0 by learning rate
    perplexities: list[float]  # by seed, at the best rate
    summary: dict[str, Any]  # of seed 0 there

    @property
    def mean(self) -> float:
        """Mean perplexity over the seeds."""
        return statistics.fmean(self.perplexities)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 with one, infinite if one diverged."""
        if not math.isfinite(self.mean):
            return math.inf
        return statistics.stdev(self.perplexities) if len(self.perplexities) > 1 else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of weights and optimizer state."""
        return self.summary["weight_bytes"] + self.summary["optimizer_state_bytes"]


def main(config: Comparison) -> None:
    """Runs what is missing; writes table and plot anew after each method.

    A method that diverged at each learning rate has no row.
    """
    if unknown := [name for name in config.methods if name not in METHODS]:
        raise SystemExit(f"--methods {unknown[0]!r}: choose of {', '.join(METHODS)}")
    config.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}
    for method in config.methods:
        row = _row(config, method)
        if not row.summary:
            print(f"{method} diverged at each learning rate: no row", file=sys.stderr)
            continue
        rows[method] = row
        (config.out / "table.md").write_text(table(rows))
        _plot(rows, config.out / "quality.png")
    print((config.out / "table.md").read_text(), end="")


def table(rows: Mapping[str, Row]) -> str:
    """A table in Markdown, with the standard deviation where there are several seeds."""
    lines = [
        "| | perplexity | learning rate (each, seed 0) | trained params | weights, bytes "
        "| states, bytes | tokens/s |",
        "| --- " * 7 + "|",
    ]
    for method, row in rows.items():
        spread = f" ± {row.spread:.3f} (n={len(row.perplexities)})" if row.spread else ""
        swept = ", ".join(f"{rate}: {found:.2f}" for rate, found in row.swept.items())
        s = row.summary
        lines.append(
            f"| {method} | {row.mean:.3f}{spread} | {row.rate} ({swept}) | {s['trained_params']:,} "
            f"| {s['weight_bytes']:,} | {s['optimizer_state_bytes']:,} "
            f"| {s['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def _row(config: Comparison, method: str) -> Row:
    flags, rates = METHODS[method]

    def summary(rate: float, seed: int) -> dict[str, Any]:
        words = (*flags, "--learning-rate", rate, "--seed", seed)
        return trained(config, run_name(method, rate, seed), words)

    found = {rate: summary(rate, 0) for rate in rates}
    swept = {rate: _perplexity(one) for rate, one in found.items()}
    best = min(rates, key=swept.__getitem__)
    others = [_perplexity(summary(best, seed)) for seed in range(1, config.seeds)]
    return Row(best, swept, [swept[best], *others], found[best])


def run_name(method: str, rate: float, seed: int) -> str:
    """The name of a run's folder and record."""
    return f"{method.replace(' ', '-').lower()}-{rate}-{seed}"


def _perplexity(summary: Mapping[str, Any]) -> float:
    found = summary.get("eval_perplexity")  # null if it was not finite
    return math.inf if found is None else found


def _plot(rows: Mapping[str, Row], path: Path) -> None:
    with picture(path, (7, 4.5)) as figure:
        axes = figure.add_subplot()
        for method, row in rows.items():
            if not math.isfinite(row.mean):  # a seed diverged
                continue
            axes.errorbar(row.bytes / 1e6, row.mean, yerr=row.spread, fmt="o", capsize=3)
            beside = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(method, (row.bytes / 1e6, row.mean), **beside)
        axes.set(xlabel="weights and optimizer state, MB", ylabel="perplexity")
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Comparison))
