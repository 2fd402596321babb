"""JSON and safetensors files, with errors that name the file."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; ValueError if there is none."""
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_without_duplicates)
    except OSError as error:
        advice = "give a directory with a Hugging Face checkpoint"
        raise ValueError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Opens a safetensors file to read NumPy arrays; ValueError if that is not possible."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the weights must be stored as safetensors")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
