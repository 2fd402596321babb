"""A run's folder: who may write into it, its config.json, and whether the run in it is finished.

All is checked before the first byte is written: a refused run changes nothing. One process at a
time writes; the kernel releases its lock when it ends, even if it is killed.
"""

import errno
import fcntl
import glob
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from train.config.resume import FROM_HERE, changes, differences
from train.config.settings import HISTORY, ResolvedTraining, flag, read_fields, to_json
from train.config.source import with_copies

# It stays in the folder, empty: if it were deleted, two processes could each lock a file.
_LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check(config: ResolvedTraining) -> str | None:
    """Checks that the run may use its folder, and changes nothing.

    Returns what the user of a resumed run may not expect, or None. Raises ValueError if another
    process writes into the folder, or if it has another run, or this one and --resume was not
    given; OSError if it cannot be written.
    """
    lock = directory(config) / _LOCK
    if lock.exists():
        with lock.open("a") as file:
            _lock(file)  # until it is closed; `hold` locks it for the run
    return _check(config)


@contextmanager
def hold(config: ResolvedTraining) -> Iterator[str | None]:
    """Makes the run's folder, and keeps other processes out of it while entered.

    Checks again, since another process may have used it, with the results and errors of `check`.
    Raises OSError also if the file system has no locks or is full.
    """
    out = directory(config)
    with _full_named(out):
        out.mkdir(parents=True, exist_ok=True)
        with (out / _LOCK).open("a") as file:
            _lock(file)
            yield _check(config)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes a folder of --out, and keeps other processes from writing into it while entered.

    Nothing is left of it if nothing was written. ValueError if another process writes into it;
    OSError also if the file system has no locks or is full.
    """
    lock = folder / _LOCK
    made = [path for path in (lock, folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _full_named(folder), lock.open("a") as file:
        _lock(file)
        try:
            yield
        finally:
            for path in made:
                with suppress(OSError):  # something is in it
                    path.unlink() if path == lock else path.rmdir()


@contextmanager
def _full_named(out: Path) -> Iterator[None]:
    """Names the folder in the error of a full disk that names nothing."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        raise OSError(f"--out {out}: cannot write into it: {error.strerror}") from error


def _lock(file: TextIO) -> None:
    """Locks an open file until it is closed or the process ends."""
    out = Path(file.name).parent
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # `claim` deletes the lock that it made: one opened before is that of the folder no more.
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        reason = "another process is writing there; wait for its end, or name another folder"
        raise ValueError(f"--out {out} is in use: {reason}") from None
    except OSError as error:
        reason, advice = error.strerror, "name a folder on a file system that has locks"
        raise OSError(f"--out {out}: cannot be locked ({reason}); {advice}") from error


def _check(config: ResolvedTraining) -> str | None:
    out = directory(config)
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    file = out / "config.json"
    # A run that was killed before it wrote its config.json leaves the lock and a draft of it.
    begun = {_LOCK, _draft(file).name}
    if not out.is_dir() or all(path.name in begun for path in out.iterdir()):
        _check_writable(out)
        return f"nothing to resume in {out}: starting a new run" if config.resume else None
    if not file.is_file():
        raise ValueError(f"--out {out} is not empty and not a run (no config.json): name another")
    if not config.resume:
        raise ValueError(f"--out {out} has a run: add --resume to go on, or name another folder")
    different = differences(_settings(file)[0], to_json(config))
    if different:
        advice = "these cannot change; leave them out, or name another folder"
        raise ValueError(f"--out {out} has another run: {', '.join(different)}; {advice}")
    _check_writable(out)
    return None


def _check_writable(out: Path) -> None:
    if glob.has_magic(str(out)):
        # Orbax looks for its files with `etils.epath.Path.glob`, which takes the path as a pattern:
        # it finds none in `[a]`, and would find those of `ab` for `a*`.
        reason = "checkpoints cannot be written into a path with *, ? or ["
        raise ValueError(f"--out {out}: {reason}; name another folder")
    check_can_be_made(out, "--out")


def check_can_be_made(folder: Path, name: str) -> None:
    """Raises OSError with the flag's name if a folder cannot be made or written; leaves nothing.

    ValueError for a URL, of which `Path` would make a folder `gs:`.
    """
    parts = folder.parts
    at = next((i for i, part in enumerate(parts) if re.fullmatch("[a-z][a-z0-9+]+:", part)), None)
    if at is not None and not Path(*parts[: at + 1]).exists():
        url = "/".join([parts[at] + "/", *parts[at + 1 :]])
        advice = "mount the object store (gcsfuse, mount-s3) and name that folder"
        raise ValueError(f"{name} {url} is no folder: {advice}")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    problem = f"{name} {folder}: cannot write into {there}"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"{problem}; name another folder")
    made: list[Path] = []
    try:
        for path in reversed((folder, *folder.parents)):
            if not path.exists():
                path.mkdir()
                made.append(path)
    except OSError as error:
        raise OSError(f"{problem} ({error.strerror}); name another folder") from None
    finally:
        for path in reversed(made):
            with suppress(OSError):  # another process uses it already
                path.rmdir()


def check_can_be_written(file: Path, name: str) -> None:
    """Raises OSError with the flag's name if a file cannot be written; changes nothing."""
    there = file.exists()
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise OSError(f"{name} {file} cannot be written ({error.strerror}); name another") from None
    if not there:
        file.unlink()


def write_config(
    config: ResolvedTraining, kept: Mapping[str, Mapping[str, Path]], step: int = 0
) -> list[str]:
    """Writes config.json into the folder, which exists, and what the run needs beside it.

    `kept` has the files that are copied by name, and these by the folder's name, unless it is
    there and the run has begun. The history gets the settings that a run resumed after `step`
    changes; returns a phrase for each.
    """
    file, new = directory(config) / "config.json", to_json(config)
    changed, history = {}, []
    if file.exists():
        old, history = _settings(file)
        changed = changes(with_copies(file.parent, old), new)
    if changed:
        history = [*history, {"step": step, "changed": changed}]
    write_json(file, new | ({HISTORY: history} if history else {}))
    (file.parent / "summary.json").unlink(missing_ok=True)  # of before more --steps
    for folder, files in kept.items():
        _keep(file.parent / folder, files, replace=step == 0)
    return [f"{flag(name)} {old} -> {new}" for name, (old, new) in changed.items()]


def seen(config: ResolvedTraining) -> list[str]:
    """The names in a run's folder that decide how a run is resumed: all its processes see them."""
    out = directory(config)
    names = ("config.json", "summary.json", "checkpoints/*")
    return sorted(str(path.relative_to(out)) for name in names for path in out.glob(name))


def _settings(file: Path) -> tuple[dict[str, Any], list[Any]]:
    """The settings in a config.json, and their history."""
    fields = read_fields(file)
    return fields, fields.pop(HISTORY, [])


def _keep(folder: Path, files: Mapping[str, Path], *, replace: bool) -> None:
    """Copies files into a new folder, which appears when it is whole, or may replace another."""
    if folder.exists():
        there = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        if not replace or there == {name: path.read_bytes() for name, path in files.items()}:
            return
    draft = _draft(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name, path in files.items():
        shutil.copyfile(path, draft / name)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def finished(config: ResolvedTraining) -> bool:
    """Whether the run in the folder is finished: summary.json is written last, at once.

    It goes on with more --steps, or with another --patience if that ended it. ValueError if it has
    done more steps.
    """
    file = directory(config) / "summary.json"
    if not file.is_file():
        return False
    done = read_fields(file).get("steps", config.steps)
    if type(done) is not int:
        raise ValueError(f"{file} has steps={done!r}, not an integer; delete it and --resume")
    if config.steps < done:
        raise ValueError(f"--steps {config.steps}: the run in {file.parent} has done {done}")
    before, _ = _settings(file.parent / "config.json")
    if config.steps != done and any(
        getattr(config, name) != before.get(name) for name in ("steps", "patience")
    ):
        return False
    changed = sorted({*changes(before, to_json(config))} & {*FROM_HERE})
    if changed:
        said = ", ".join(map(flag, changed))
        raise ValueError(
            f"{said} has no effect: the run in {file.parent} is finished; give more --steps, too"
        )
    return True


def directory(config: ResolvedTraining) -> Path:
    """The run's folder, absolute."""
    return Path(config.out).absolute()


def has_checkpoint(config: ResolvedTraining) -> bool:
    """Whether the run goes on from a checkpoint, as far as the names in its folder say."""
    return config.resume and any((directory(config) / "checkpoints").glob("[0-9]*"))


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON with `write_at_once`."""
    write_at_once(path, json.dumps(value, indent=2) + "\n")


def write_at_once(path: Path, text: str) -> None:
    """Replaces a file at once: a reader, or a kill, finds the old file or the new one."""
    draft = _draft(path)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def resume_command(config: ResolvedTraining) -> str:
    """The command that resumes the run, or this process of it."""
    python, file = sys.executable or "python", str(directory(config) / "config.json")
    command = [python, "-m", config.command, "--config", file, "--resume"]
    if config.launcher:
        command.append("--launcher")
    for name in ("coordinator", "processes", "process"):
        if (value := getattr(config, name)) is not None:
            command += [flag(name), str(value)]
    return shlex.join(command)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.draft")
