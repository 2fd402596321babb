"""Access to JSON and safetensors files, with errors that name the file.

Whole checkpoints are read, and refused, in `llama.py`, `roberta.py` and `peft.py` beside it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; ValueError if there is none."""
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=without_duplicates)
    except OSError as error:
        advice = "give a directory with a Hugging Face checkpoint"
        raise ValueError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object")
    return content


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these names and values in JSON; ValueError if a name is there twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Writes a safetensors file with the permissions that the umask says; OSError if it cannot.

    safetensors writes files that only their owner may read
    (https://github.com/safetensors/safetensors/issues/782).
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({**tensors}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)


def tensor_names(path: Path) -> set[str]:
    """Returns the names of the tensors in a safetensors file; ValueError if it is none."""
    with _open_tensors(path) as file:
        return {*file.keys()}


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor of floats; ValueError if it has another dtype."""
    with _open_tensors(path) as file:
        _check_dtype(file, path, name)
        return tuple(file.get_slice(name).get_shape())


def read_tensor(path: Path, name: str) -> Shaped[np.ndarray, "..."]:
    """Reads a tensor of floats.

    ValueError if it has another dtype, as quantized weights have, or a number that is not finite.
    """
    with _open_tensors(path) as file:
        _check_dtype(file, path, name)
        tensor = file.get_tensor(name)
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name} in {path} has a NaN or an infinity; load an earlier checkpoint")
    return tensor


def _check_dtype(file: Any, path: Path, name: str) -> None:
    dtype = file.get_slice(name).get_dtype()
    # Integers and 8-bit floats are quantized, and mean nothing without their scales.
    if dtype not in ("F16", "BF16", "F32", "F64"):
        raise ValueError(
            f"{name} in {path} has dtype {dtype}, only F16, BF16, F32 and F64 are supported; "
            "convert the checkpoint, or load another"
        )


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the weights must be stored as safetensors")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
