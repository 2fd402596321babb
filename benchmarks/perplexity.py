"""Perplexity of optimizers after the same steps on the same data, each at its best learning rate.

    python -m benchmarks.perplexity --data-dir DIR --out DIR

DIR is a data set written by `python -m train.prepare_c4`. Every run is `python -m train.pretrain`.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

RATES = {
    "adamw": (0.0005, 0.001, 0.002),
    "adafactor": (0.002, 0.005, 0.01),
    "galore-adamw": (0.005, 0.01, 0.02),
    "galore-adafactor": (0.01, 0.02, 0.04),
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Trains each optimizer at three learning rates and prints a table."""

    data_dir: Path
    """A data set written by `python -m train.prepare_c4`."""
    out: Path
    """Folder for the runs; those that have finished are not repeated."""
    optimizers: tuple[str, ...] = ("galore-adamw", "adamw")
    """Optimizers to compare."""
    model: str = "tiny"
    """Model to train."""
    tokenizer: str = "bytes"
    """`bytes` or a tokenizer.json."""
    steps: int = 2000
    """Steps of every run."""
    batch_size: int = 8
    """Sequences in a step."""
    seq_len: int = 128
    """Tokens in a sequence."""
    eval_tokens: int = 100_000
    """Validation tokens."""
    seed: int = 0
    """Seed of every run, and so of the order of the data."""


def run(config: Comparison, optimizer: str, rate: float) -> dict:
    """One training run's summary."""
    out = config.out / f"{optimizer}-{rate}"
    if not (out / "summary.json").exists():
        flags = {
            "model": config.model,
            "data": "c4",
            "data-dir": config.data_dir,
            "tokenizer": config.tokenizer,
            "optimizer": optimizer,
            "learning-rate": rate,
            "steps": config.steps,
            "batch-size": config.batch_size,
            "seq-len": config.seq_len,
            "eval-every": config.steps,
            "eval-tokens": config.eval_tokens,
            "seed": config.seed,
            "out": out,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "train.pretrain", *words, "--resume"], check=True)
    return json.loads((out / "summary.json").read_text())


def main(config: Comparison) -> None:
    """Runs what is missing and prints a table in Markdown."""
    print("| optimizer | learning rate | perplexity | optimizer state, bytes |")
    print("| --- | --- | --- | --- |", flush=True)
    for optimizer in config.optimizers:
        for rate in RATES[optimizer]:
            summary = run(config, optimizer, rate)
            print(
                f"| {optimizer} | {rate} | {summary['eval_perplexity']:.3f} "
                f"| {summary['optimizer_state_bytes']:,} |",
                flush=True,
            )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Comparison))
