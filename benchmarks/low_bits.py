"""Perplexity with low-bit states, bases and weights, over several seeds.

    python -m benchmarks.low_bits --data-dir DIR --out DIR

DIR is a data set written by `python -m train.prepare_c4`. Every run is `python -m train.pretrain`
with the same settings, but for what the table's rows name; a seed sets the weights and the order of
the data, the same for every row.
"""

import dataclasses
import statistics
import sys
from typing import Literal

from benchmarks.runs import Runs, trained

VARIANTS: dict[str, tuple[str, ...]] = {
    "GaLore": ("--optimizer", "galore-adamw"),
    "8-bit GaLore": ("--optimizer", "galore-adamw8bit"),
    "4-bit GaLore": ("--optimizer", "galore-adamw8bit", "--moment-bits", "4"),
    "Q-GaLore": ("--optimizer", "q-galore-adamw8bit"),
    "Q-GaLore, fixed gap": (
        "--optimizer", "q-galore-adamw8bit", "--adaptive-refresh", "False",
    ),
    "Q-GaLore, rounded to nearest": (
        "--optimizer", "q-galore-adamw8bit", "--stochastic-rounding", "False",
    ),
    "12 GB card": ("--optimizer", "q-galore-adamw8bit", "--moment-bits", "4"),
    "10 GB card": (
        "--optimizer", "q-galore-adamw8bit", "--moment-bits", "4", "--side", "larger",
        "--embedding-bits", "8",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LowBits(Runs):
    """Trains each variant with each seed and prints a table."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    variants: tuple[Literal[tuple(VARIANTS)], ...] = tuple(VARIANTS)  # pyrefly: ignore
    """Rows of the table; the others are compared with the first."""
    learning_rate: float = 0.01
    """Peak learning rate."""
    update_proj_gap: int = 25
    """Steps between two subspaces; the first gap where it adapts."""


def run(config: LowBits, name: str, seed: int) -> tuple[float, int, int, int]:
    """Perplexity, bytes of states and of weights, and the count of refreshes."""
    folder = f"{name.replace(' ', '-').replace(',', '').lower()}-{seed}"
    flags = (
        *VARIANTS[name],
        *("--learning-rate", config.learning_rate),
        *("--update-proj-gap", config.update_proj_gap),
        *("--seed", seed),
    )
    summary = trained(config, folder, flags)
    return (
        summary["eval_perplexity"],
        summary["optimizer_state_bytes"],
        summary["weight_bytes"],
        int(summary["refreshes"]),
    )


def main(config: LowBits) -> None:
    """Runs the missing ones, seed by seed, and prints a table in Markdown."""
    results = {name: [] for name in config.variants}
    for seed in config.seeds:
        for name in config.variants:
            results[name].append(run(config, name, seed))
            print(f"{name}, seed {seed}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(
        "| | perplexity by seed | mean | to the first | states, bytes | weights, bytes "
        "| refreshes |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    reference = statistics.mean(r[0] for r in results[config.variants[0]])
    for name, rows in results.items():
        perplexities = [row[0] for row in rows]
        mean = statistics.mean(perplexities)
        print(
            f"| {name} | {', '.join(f'{p:.3f}' for p in perplexities)} | {mean:.3f} "
            f"| {mean / reference - 1:+.1%} | {rows[0][1]:,} | {rows[0][2]:,} "
            f"| {statistics.mean(row[3] for row in rows):.0f} |"
        )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(LowBits))
