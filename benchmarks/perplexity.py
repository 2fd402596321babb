"""Perplexity, memory and speed of methods after equal tokens in equal order, each at its best rate.

    python -m benchmarks.perplexity --data-dir DIR --out DIR

DIR is a data set written by `python -m train.prepare_c4`. Every run is `python -m train.pretrain`.
"""

import dataclasses

from benchmarks.runs import Runs, trained

FULL, GALORE, ADAPTER = (0.001, 0.002, 0.005), (0.01, 0.02, 0.04), (0.001, 0.002, 0.005)

# Flags, and the learning rates to choose from.
METHODS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "full rank": (("--optimizer", "adamw"), FULL),
    "GaLore": (("--optimizer", "galore-adamw"), GALORE),
    "8-bit GaLore": (("--optimizer", "galore-adamw8bit"), GALORE),
    "Q-GaLore": (("--optimizer", "q-galore-adamw8bit"), GALORE),
    "low rank": (("--optimizer", "adamw", "--adapter", "low-rank"), ADAPTER),
    "LoRA": (("--optimizer", "lora-adamw"), ADAPTER),
    "DoRA": (("--optimizer", "adamw", "--adapter", "dora"), ADAPTER),
    "ReLoRA": (("--optimizer", "relora-adamw"), ADAPTER),
    "QLoRA": (("--optimizer", "qlora-adamw"), ADAPTER),
    "GradNormLoRP": (("--optimizer", "gradnorm-lorp-adamw"), GALORE),
    "8-bit GradNormLoRP": (
        ("--optimizer", "gradnorm-lorp-adamw", "--moment-bits", "8", "--weight-bits", "8"),
        GALORE,
    ),
    "Adafactor": (("--optimizer", "adafactor"), (0.002, 0.005, 0.01)),
    "GaLore Adafactor": (("--optimizer", "galore-adafactor"), (0.01, 0.02, 0.04)),
}


@dataclasses.dataclass(frozen=True)
class Comparison(Runs):
    """Trains each method at three learning rates and prints a table."""

    methods: tuple[str, ...] = tuple(METHODS)[:11]
    """Rows of the table."""
    seed: int = 0
    """Seed of every run, and so of the order of the data."""


def main(config: Comparison) -> None:
    """Runs the missing ones and prints a table in Markdown."""
    print(
        "| | perplexity | learning rate (others) | trained params | weights, bytes "
        "| states, bytes | tokens/s |\n| --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for method in config.methods:
        flags, rates = METHODS[method]
        rows = {}
        for rate in rates:
            own = (*flags, "--learning-rate", rate, "--seed", config.seed)
            rows[rate] = trained(config, f"{method.replace(' ', '-').lower()}-{rate}", own)
        best = min(rates, key=lambda rate: rows[rate]["eval_perplexity"] or float("inf"))
        others = [f"{r}: {rows[r]['eval_perplexity'] or float('inf'):.2f}" for r in rates]
        row = rows[best]
        print(
            f"| {method} | {row['eval_perplexity']:.3f} | {best} ({', '.join(others)}) "
            f"| {row['trained_params']:,} | {row['weight_bytes']:,} "
            f"| {row['optimizer_state_bytes']:,} | {row['tokens_per_second']:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Comparison))
