"""LLaMA checkpoints in Hugging Face's format, read and written: config.json and safetensors.

Their matrices are (out, in), one per layer; ours are (in, out) and stacked over the layers. The
rotary convention is the same, so nothing is permuted.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from itertools import groupby
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import DTypeLike, Shaped

from models.hugging_face.files import (
    read_json,
    read_tensor,
    tensor_names,
    tensor_shape,
    write_json,
    write_tensors,
)
from models.hugging_face.llama_config import from_theirs, to_theirs
from models.llama.config import LlamaConfig, weight_table
from models.llama.model import Llama

_INDEX = "model.safetensors.index.json"
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"

# Paths of our weights by their tensors' names there; {} is the layer.
_NAMES: dict[str, tuple[str, ...]] = {
    _EMBEDDING: ("embedding",),
    "model.layers.{}.input_layernorm.weight": ("layers", "attention_norm"),
    "model.layers.{}.self_attn.q_proj.weight": ("layers", "attention", "query"),
    "model.layers.{}.self_attn.k_proj.weight": ("layers", "attention", "key"),
    "model.layers.{}.self_attn.v_proj.weight": ("layers", "attention", "value"),
    "model.layers.{}.self_attn.o_proj.weight": ("layers", "attention", "out"),
    "model.layers.{}.post_attention_layernorm.weight": ("layers", "mlp_norm"),
    "model.layers.{}.mlp.gate_proj.weight": ("layers", "mlp", "gate"),
    "model.layers.{}.mlp.up_proj.weight": ("layers", "mlp", "up"),
    "model.layers.{}.mlp.down_proj.weight": ("layers", "mlp", "down"),
    "model.norm.weight": ("norm",),
    _HEAD: ("head",),
}

MODULES = {name.removesuffix(".weight"): path for name, path in _NAMES.items() if "_proj" in name}
"""Paths of the layers' matrices by the names of their modules there; {} is the layer."""

_NAMES |= {
    f"{module}.bias": ("layers", f"{group}_bias", name)
    for module, (_, group, name) in MODULES.items()
}


class _Place(NamedTuple):
    path: tuple[str, ...]  # of our weight
    layer: int | EllipsisType  # a layer's tensor is transposed; all others have ...
    shape: tuple[int, ...]  # of their tensor


def load_llama(
    directory: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, **overrides: Any
) -> Llama:
    """Reads a LLaMA checkpoint in Hugging Face's format: config.json and model.safetensors.

    Shards of the latter need model.safetensors.index.json. It may be a Llama 1 to 3.2 or a model of
    the same layers: TinyLlama, SmolLM, Mistral without a sliding window. Weights and computation
    get `dtype`; `overrides` are further fields of `LlamaConfig`, such as `rematerialize=True`.

    ValueError if there is no checkpoint, if it is damaged, quantized or of another architecture, or
    if the files contradict each other or have a tensor or a setting that is not understood.
    """
    directory = Path(directory)
    theirs = read_json(directory / "config.json")
    config = from_theirs(theirs, {"dtype": dtype, "param_dtype": dtype, **overrides})
    params: dict[Any, Any] = {
        path: jnp.asarray(stack) for path, stack in read_weights(directory, config)
    }
    graph, _ = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
    return nnx.merge(graph, unflatten_dict(params))


def read_weights(
    directory: Path, config: LlamaConfig
) -> Iterator[tuple[tuple[str, ...], Shaped[np.ndarray, "..."]]]:
    """Reads the weights of a checkpoint, of which `config` is the configuration.

    Yields the path and the array of each of `weight_table`, one at a time, so that the host never
    has a second copy of the model; errors as for `load_llama`.
    """
    files, places = check_weights(directory, config), _places(config)
    for name in _frequency_names(config) & files.keys():
        _check_frequencies(name, read_tensor(files[name], name), config)
    if config.tied and _HEAD in files:
        _check_tied(files[_HEAD], read_tensor(files[_EMBEDDING], _EMBEDDING))
    weights: dict[Any, Any] = flatten_dict(weight_table(config))
    for path, names in groupby(places, lambda name: places[name].path):
        stack = None
        for name in names:
            layer, tensor = places[name].layer, read_tensor(files[name], name)
            if stack is None:  # a tensor has the sizes that config.json claims
                stack = np.empty(weights[path].shape, config.param_dtype)
            stack[layer] = tensor if layer is ... else tensor.T
        assert stack is not None
        yield path, stack


def check_weights(directory: Path, config: LlamaConfig) -> dict[str, Path]:
    """Returns the file of each tensor by its name, after a look at the files' headers alone.

    ValueError unless the tensors are those of `config`, by name and shape.
    """
    files = tensor_files(directory)
    check_layers(config.layers, files)
    places = _places(config)
    known = places.keys() | _frequency_names(config) | ({_HEAD} if config.tied else set())
    check_names(missing=places.keys() - files.keys(), unexpected=files.keys() - known)
    for name, place in places.items():
        if (shape := tensor_shape(files[name], name)) != place.shape:
            raise ValueError(f"{name} has shape {shape}, but config.json says {place.shape}")
    return files


def check_layers(layers: int, files: Collection[str]) -> None:
    """Raises ValueError if config.json claims more layers than there are tensors."""
    if layers > len(files):
        said = f"config.json says {layers} layers, and there are {len(files)} tensors"
        raise ValueError(f"{said}; config.json and weights must match")


def check_names(**wrong: Collection[str]) -> None:
    """Raises ValueError, by keyword such as `missing`, if there are names of wrong tensors."""
    for what, names in wrong.items():
        if names:
            some = ", ".join(sorted(names)[:3] + ["..."] * (len(names) > 3))
            raise ValueError(
                f"{len(names)} tensors are {what}: {some}; config.json and weights must match"
            )


def save_llama(
    model: Llama, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a LLaMA so that `transformers.AutoModelForCausalLM.from_pretrained` reads it.

    The weights keep their dtype. Every weight must be addressable from this process. A model of
    more than `max_shard_bytes` is written as several files and an index; one tensor may have more.
    ValueError if the directory has a model in it, `max_shard_bytes` is below 1, or the weights are
    not arrays of floats in the shapes that the configuration says.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be at least 1, such as 5e9")
    directory = Path(directory)
    check_no_model(directory)
    params: dict[Any, Any] = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    check_params(params, flatten_dict(weight_table(model.config)))
    places = _places(model.config)
    sizes = {
        name: math.prod(place.shape) * params[place.path].dtype.itemsize
        for name, place in places.items()
    }

    def array(name: str) -> Shaped[np.ndarray, "..."]:
        path, layer, _ = places[name]
        ours = np.asarray(params[path][layer])
        return np.ascontiguousarray(ours if layer is ... else ours.T)

    dtype = jnp.result_type(*(weight.dtype for weight in params.values()))
    config = to_theirs(dataclasses.replace(model.config, param_dtype=dtype))
    write_checkpoint(directory, _shards(sizes, max_shard_bytes), array, config, sum(sizes.values()))


def check_no_model(directory: Path) -> None:
    """Raises ValueError if a directory has a model in it."""
    stored = ("config.json", "adapter_config.json", "*.safetensors*")
    if present := sorted(path for name in stored for path in directory.glob(name)):
        raise ValueError(
            f"directory={directory} already has a model in it ({present[0].name}); nothing was "
            "written, choose another directory"
        )


def write_checkpoint(
    directory: Path,
    shards: dict[str, list[str]],
    array: Callable[[str], Shaped[np.ndarray, "..."]],
    config: dict[str, Any],
    total_size: int,
) -> None:
    """Writes the tensors of each file, by the file's name, and the content of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=directory) as partial:
        partial, weight_map = Path(partial), {}
        for file, names in shards.items():
            tensors = {name: array(name) for name in names}
            write_tensors(partial / file, tensors)
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            metadata = {"total_size": total_size}
            write_json(partial / _INDEX, {"metadata": metadata, "weight_map": weight_map})
        write_json(partial / "config.json", config)
        # config.json comes last: without it nothing reads the directory as a model.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(directory / path.name)


def _check_tied(file: Path, embedding: Shaped[np.ndarray, "V D"]) -> None:
    """Raises ValueError unless the head in a file, whose config ties it, is the embedding."""
    if not np.array_equal(read_tensor(file, _HEAD), embedding):
        raise ValueError(
            f"config.json says tie_word_embeddings=True, but {file} has a {_HEAD} that is not the "
            "embedding; say false there if it is the head, or delete the tensor"
        )


def check_params(params: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """Raises ValueError unless the weights can be written as they are; `expected` has each's."""
    for path, (shape, *_) in expected.items():
        weight, name = params[path], "/".join(path)
        if not isinstance(weight, jax.Array | np.ndarray):
            raise ValueError(
                f"{name} is a {type(weight).__name__}, not an array; merge adapters and dequantize "
                "weights first"
            )
        if weight.shape != shape or not jnp.issubdtype(weight.dtype, jnp.floating):
            raise ValueError(
                f"{name} is {weight.dtype}{list(weight.shape)}; it must be of floats and have "
                f"shape {list(shape)}"
            )


def tensor_files(directory: Path) -> dict[str, Path]:
    """Returns the file of each tensor, by the tensor's name; no other weights may lie beside."""
    single, index = directory / "model.safetensors", directory / _INDEX
    expected = None
    if index.exists():
        expected = read_json(index).get("weight_map")
        if not isinstance(expected, dict) or not all(isinstance(x, str) for x in expected.values()):
            raise ValueError(f"{index} has no weight_map that names the file of each tensor")
        for name, file in expected.items():
            if not file or Path(file).name != file:
                raise ValueError(
                    f"{index} says that {name} is in {file!r}: not the name of a file beside it"
                )
    elif not single.exists() and (pickled := sorted(directory.glob("*.bin"))):
        raise ValueError(
            f"{directory} has its weights in {pickled[0].name}, which could run any code when it "
            "is read: convert it with transformers, by from_pretrained(folder) and "
            "save_pretrained(other) of the model's class"
        )
    paths = [single] if expected is None else sorted({directory / x for x in expected.values()})
    # transformers prefers the single file to the index, and the base of an adapter to the model.
    others = {single, *directory.glob("model-*.safetensors"), directory / "adapter_config.json"}
    if beside := sorted(path for path in others - {*paths} if path.exists()):
        read = paths[0].name if expected is None else index.name
        raise ValueError(
            f"{directory} has {read} and {beside[0].name}, which does not belong to it; move the "
            "wrong one away"
        )
    files: dict[str, Path] = {}
    for path in paths:
        names = tensor_names(path)
        if expected is not None:
            listed = {name for name, file in expected.items() if directory / file == path}
            for name in sorted(names ^ listed):
                where = f"is in {path.name}" if name in names else f"is not in {path.name}"
                says = f"says {expected[name]}" if name in expected else "has no such tensor"
                raise ValueError(f"{name} {where}, but {index} {says}; copy the checkpoint again")
        files |= dict.fromkeys(names, path)
    return files


def _frequency_names(config: LlamaConfig) -> set[str]:
    """Returns names of rotary frequencies, which old checkpoints have."""
    layers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.layers)}
    return layers | {"model.rotary_emb.inv_freq"}


def _check_frequencies(name: str, found: Shaped[np.ndarray, "..."], config: LlamaConfig) -> None:
    """Raises ValueError unless rotary frequencies are those of the configuration's base.

    What transformers stored was never scaled, and it computes them again.
    """
    width = config.head_width
    expected = config.rope_theta ** -(np.arange(0, width, 2) / width)
    # Half-precision floats may store them.
    if found.shape != expected.shape or not np.allclose(found.astype(float), expected, 0.01, 1e-7):
        raise ValueError(
            f"{name} has other frequencies than rope_theta={config.rope_theta} in config.json; "
            "correct config.json, or delete the tensor"
        )


def _places(config: LlamaConfig) -> dict[str, _Place]:
    """Returns the place of every tensor of a checkpoint, by the tensor's name."""
    places = {}
    weights: dict[Any, Any] = flatten_dict(weight_table(config))
    for name, path in _NAMES.items():
        if path not in weights:  # a bias that the model does not have, or a tied head
            continue
        shape = weights[path].shape
        layers: Any = range(shape[0]) if "{}" in name else [...]
        theirs = shape[:0:-1] if "{}" in name else shape
        places |= {name.format(i): _Place(path, i, theirs) for i in layers}
    return places


def _shards(sizes: dict[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Returns file names and the tensors in each, in the model's order, from tensors' bytes."""
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(map(sizes.__getitem__, groups[-1])) + size > max_shard_bytes:
            groups.append([])
        groups[-1].append(name)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(groups, 1)}
