"""Runs of the trainer for the tables of the benchmarks; finished ones are reused.

A run is finished if its folder has summary.json, or if the table's file of records has its line, so
that a table of many hours can be continued on another machine: flags, settings and summary.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.run.metrics import given_up, read_metrics


@dataclasses.dataclass(frozen=True)
class Table:
    """Where the runs of a table are."""

    data_dir: Path
    """Folder of the data, as for the program that trains."""
    out: Path
    """Folder for the runs; finished ones are not repeated."""
    records: Path | None = None
    """A file with a JSON line of each finished run: those in it are not repeated, new ones are
    added."""
    bfloat16_products: bool = False
    """Train by benchmarks.bfloat16_products, for a CPU with AMX."""


@dataclasses.dataclass(frozen=True)
class Runs(Table):
    """The settings that all runs of a table of pre-training share."""

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
    """The summary of one run of `train.pretrain`, which is trained first if it is missing.

    Args:
        runs: the table's settings.
        name: of the run's folder.
        flags: further words of the command.
    """
    names = ("model", "tokenizer", "steps", "batch_size", "seq_len", "eval_tokens")
    words = [word for x in names for word in (_flag(x), getattr(runs, x))]
    # In the order of the text in which the runs of before were trained.
    words += ["--data-parts", 1, "--data", "c4", "--eval-every", runs.steps, *flags]
    return finished(runs, "train.pretrain", name, words)


def finished(
    table: Table, program: str, name: str, words: list[Any], init: Path | None = None
) -> dict[str, Any]:
    """The summary of one run, which is trained first if it is missing; empty if it diverged.

    Args:
        table: where runs and records are.
        program: the module that trains.
        name: of the run's folder and record.
        words: the command's flags, which those of a record must equal, with the table's own.
        init: folder of the model to begin with.

    Raises:
        SystemExit: a record or a folder of this name is of other flags, of another model in --init
            or of other data, or the program failed.
    """
    out, said = table.out / name, [str(word) for word in words]
    flags = [*(["--bfloat16-products"] if table.bfloat16_products else []), *said]
    places = {"data_dir": table.data_dir, **({} if init is None else {"init": init})}
    # By its name, which it has on another machine, too.
    model = {} if init is None else {"init": init.absolute().name}
    for record in read_records(table.records):
        if record["name"] == name and record["flags"] != flags:
            made = " ".join(record["flags"])
            raise SystemExit(f"--records {table.records}: its {name} was trained with {made}")
        if record["name"] == name and record.get("init") not in (None, model.get("init")):
            made = record["init"]
            raise SystemExit(f"--records {table.records}: its {name} began with a model {made}")
        if record["name"] == name:
            return record["summary"]
    _check_flags(table.out / f"{name}.flags.json", out, flags)
    if (out / "summary.json").exists():
        _check_places(out, places)
    else:
        modules = ["benchmarks.bfloat16_products"] if table.bfloat16_products else []
        command = [sys.executable, "-m", *modules, program, *said, "--out", out, "--resume"]
        command += [word for key, path in places.items() for word in (_flag(key), path)]
        code = subprocess.run([*map(str, command)], check=False, stdout=sys.stderr).returncode
        if code == 1 and _gave_up(out):  # a traceback ends with 1, too
            print(f"{name} diverged", file=sys.stderr)
            return {}
        if code:
            raise SystemExit(code)
    config, summary = (_read(out / f"{x}.json") for x in ("config", "summary"))
    if table.records is not None:
        settings = {key: value for key, value in config.items() if key not in _PLACES}
        record = {"name": name, "flags": flags, **model, "config": settings, "summary": summary}
        table.records.parent.mkdir(parents=True, exist_ok=True)
        with table.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return summary


def _check_flags(file: Path, run: Path, flags: list[str]) -> None:
    """Raises SystemExit if a run's folder is of other flags, which a file beside it has."""
    if not run.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(flags))
    # A folder without the file is of a version that wrote none.
    elif file.exists() and (made := json.loads(file.read_text())) != flags:
        raise SystemExit(f"{run} was trained with {' '.join(made)}: name another --out")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_places(run: Path, places: dict[str, Path]) -> None:
    """Raises SystemExit if a finished run began with another model, or had other data."""
    made = _read(run / "config.json")
    for name, path in places.items():
        there, here = made.get(name), os.path.expanduser(path)
        if there is not None and os.path.realpath(there) != os.path.realpath(here):
            raise SystemExit(f"{run} was trained with {_flag(name)} {there}: name another --out")


def _gave_up(run: Path) -> bool:
    """Whether a run has ended because too many steps in a row were not finite."""
    config = run / "config.json"
    if not config.exists():
        return False
    return given_up(read_metrics(run), _read(config).get("max_skipped", 10)) is not None


def read_records(path: Path | None) -> list[dict[str, Any]]:
    """The finished runs that a file has; none if there is no file."""
    text = path.read_text() if path and path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


_PLACES = ("data_dir", "init", "out")  # settings that name files of one machine
