"""Runs of `train.pretrain` for the tables of the benchmarks; finished ones are reused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Runs:
    """The settings that all runs of a table share."""

    data_dir: Path
    """A data set written by `python -m train.prepare_c4`."""
    out: Path
    """Folder for the runs; finished ones are not repeated."""
    model: str = "tiny"
    """Model to train."""
    tokenizer: str = "bytes"
    """`bytes` or a tokenizer.json."""
    steps: int = 800
    """Steps of every run."""
    batch_size: int = 8
    """Sequences in a step."""
    seq_len: int = 128
    """Tokens in a sequence."""
    eval_tokens: int = 100_000
    """Validation tokens."""


def trained(runs: Runs, name: str, flags: tuple[Any, ...]) -> dict[str, Any]:
    """The summary of one run, which is trained first if it is missing.

    Args:
        runs: the table's settings.
        name: of the run's folder.
        flags: further words of the command.
    """
    out = runs.out / name
    if not (out / "summary.json").exists():
        common = {k: v for k, v in vars(runs).items() if k in _COMMON}
        words = [w for k, v in common.items() for w in (f"--{k.replace('_', '-')}", v)]
        # The order of the text in which the runs of before were trained.
        words += [
            "--data-parts",
            1,
            "--data",
            "c4",
            "--eval-every",
            runs.steps,
            "--out",
            out,
            "--resume",
            *flags,
        ]
        command = [sys.executable, "-m", "train.pretrain", *map(str, words)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((out / "summary.json").read_text())


_COMMON = {field.name for field in dataclasses.fields(Runs)} - {"out"}
