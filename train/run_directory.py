"""A run's folder: who may write into it, and its config.json.

Everything is checked before the first byte is written, so a refused run leaves nothing behind.
"""

import json
import os
import shlex
import sys
from pathlib import Path

from train.config import Resolved, differences, to_json


def check(config: Resolved) -> str | None:
    """Says whether the run may use its folder, without touching anything.

    Returns:
        What a resumed run found that its user may not expect, or None.

    Raises:
        ValueError: if the folder holds another run, or this one and --resume was not given.
        OSError: if it cannot be written.
    """
    out = directory(config)
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    file = out / "config.json"
    # A run that was killed before it wrote its config.json has left only the hidden draft of it.
    if not out.is_dir() or not any(not p.name.startswith(".config.json") for p in out.iterdir()):
        _check_writable(out)
        return f"nothing to resume in {out}: starting anew" if config.resume else None
    if not file.is_file():
        raise ValueError(f"--out {out} is not empty and not a run (no config.json): name another")
    if not config.resume:
        raise ValueError(f"--out {out} holds a run: add --resume to go on, or name another folder")
    try:
        old = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    different = differences(old, to_json(config))
    if different:
        raise ValueError(
            f"--out {out} holds another run: {', '.join(different)}; give it the same flags "
            "or name another folder"
        )
    _check_writable(out)
    return None


def create(config: Resolved) -> Path:
    """Makes the folder and writes config.json, whole or not at all."""
    out = directory(config)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", to_json(config))
    return out


def directory(config: Resolved) -> Path:
    """The run's folder, absolute."""
    return Path(config.out).absolute()


def write_json(path: Path, value: object) -> None:
    """Replaces a file at once: a reader, or a kill, finds the old one or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def resume_command(config: Resolved) -> str:
    """What to type to go on."""
    file = directory(config) / "config.json"
    python = sys.executable or "python"
    return shlex.join([python, "-m", "train.pretrain", "--config", str(file), "--resume"])


def _check_writable(out: Path) -> None:
    existing = next(p for p in (out, *out.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"--out {out}: cannot write into {existing}; name another folder")
