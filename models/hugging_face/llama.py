"""Hugging Face's LLaMA checkpoints, read and written: config.json and safetensors.

Their matrices are (out, in), one per layer; ours are (in, out) and stacked over the layers. The
rotary convention is the same, so nothing is permuted.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.llama.config import LlamaConfig, Weight, weight_table
from models.llama.model import Llama

_INDEX = "model.safetensors.index.json"
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"

# Our weights by their names there; {} is the layer.
_NAMES = {
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
"""The layers' matrices by the names of their modules there, {} for the layer."""

# Our sizes by their names there.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
}


def load_llama(
    directory: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, **overrides: Any
) -> Llama:
    """Read a LLaMA checkpoint in Hugging Face's format.

    Args:
        directory: Holds config.json and model.safetensors, or shards of it with
            model.safetensors.index.json.
        dtype: Of the weights and of the computation, whatever the file's is.
        **overrides: Fields of `LlamaConfig` to set otherwise, such as `rematerialize=True`.

    Returns:
        The model. Where the checkpoint ties the head to the embedding, the head becomes a weight of
        its own that starts as a copy, and is trained, counted and saved as such.

    Raises:
        ValueError: If there is no checkpoint, if it is of another architecture or quantized, if
            its JSON is not as it should be, or if tensors are missing, unexpected or of another
            shape than config.json says.
    """
    directory = Path(directory)
    theirs = _read_json(directory / "config.json")
    config = _llama_config(theirs, {"dtype": dtype, "param_dtype": dtype, **overrides})
    files = _tensor_files(directory)
    tied = bool(theirs.get("tie_word_embeddings", False))
    _check_tensors(config, files, tied)

    abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    params = nnx.to_pure_dict(state)
    for name, path in _NAMES.items():
        *parents, last = path
        branch = _at(params, parents)
        shape = branch[last].shape
        # One stack at a time, so that the host never holds a second copy of the model.
        stack = np.empty(shape, config.param_dtype)
        layers = range(shape[0]) if "{}" in name else [...]
        for layer in layers:
            tensor = (_EMBEDDING if tied and name == _HEAD else name).format(layer)
            with safe_open(files[tensor], framework="numpy") as file:
                array = file.get_tensor(tensor)
            stack[layer] = array.T if _is_transposed(name, array.ndim) else array
        branch[last] = jnp.asarray(stack)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def save_llama(
    model: Llama, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a LLaMA so that `transformers.AutoModelForCausalLM.from_pretrained` reads it.

    The weights keep their dtype. Every weight must be addressable from this process.

    Args:
        model: The model.
        directory: Made if need be; it must not hold a model already.
        max_shard_bytes: Most bytes of weights in one file; beyond it, several files and an index. A
            single larger tensor gets a file of its own.

    Raises:
        ValueError: If the directory holds a model, or `max_shard_bytes` is below 1.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: at least 1 is needed, such as 5e9")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    present = sorted([*directory.glob("config.json"), *directory.glob("*.safetensors*")])
    if present:
        raise ValueError(
            f"directory={directory} already holds a model ({present[0].name}); nothing was "
            "written, choose another directory"
        )
    config = model.config
    shards = _shards(config, max_shard_bytes)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    written: list[Path] = []  # under temporary names, the last one first to be missed
    try:
        for file_name, names in shards.items():
            arrays = {name: _their_array(params, name) for name in names}
            written.append(directory / f"{file_name}.partial")
            save_file(arrays, written[-1], metadata={"format": "pt"})
        if len(shards) > 1:
            shapes = _their_shapes(config)
            total = sum(math.prod(shape) for shape in shapes.values())
            index = {
                "metadata": {"total_size": total * jnp.dtype(config.param_dtype).itemsize},
                "weight_map": {name: file for file, names in shards.items() for name in names},
            }
            written.append(directory / f"{_INDEX}.partial")
            written[-1].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.append(directory / "config.json.partial")
        written[-1].write_text(json.dumps(_their_config(config), indent=2, sort_keys=True) + "\n")
        # config.json comes last: without it nothing reads the directory as a model.
        for path in written:
            path.rename(path.with_suffix(""))
    finally:
        for path in written:
            path.unlink(missing_ok=True)


def _llama_config(theirs: dict[str, Any], overrides: dict[str, Any]) -> LlamaConfig:
    """`LlamaConfig` of the content of a config.json; ValueError where this LLaMA differs."""
    refused = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    for name, accepted in refused.items():
        found = theirs.get(name, None if name == "model_type" else accepted)
        if found != accepted:
            raise ValueError(f"config.json: {name}={found!r} is not supported, only {accepted!r}")
    if theirs.get("quantization_config") is not None:
        raise ValueError(
            f"config.json: quantization_config={theirs['quantization_config']!r}: quantized "
            "checkpoints are not supported; dequantize this one first"
        )

    # Transformers 5 puts theta and type into rope_parameters, before that theta stood at top level
    # and rope_scaling was null or a scaling.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope parameters {rope!r} are not supported, only an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: rope type {kind!r} is not supported, only 'default'")
    if rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not supported, only 1")
    theta = rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))

    optional = {
        "num_key_value_heads": theirs.get("num_attention_heads"),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }
    given = {name: value for name, value in theirs.items() if value is not None}
    found: dict[str, Any] = {name: given.get(name, optional.get(name)) for name in _SIZES}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"config.json: {missing[0]} is missing; a LLaMA's names its sizes")
    for name, value in {**found, "rope_theta": theta}.items():
        real = name in ("rms_norm_eps", "rope_theta")
        if type(value) is not int and not (real and type(value) is float):
            needed = "number" if real else "whole number"
            raise ValueError(f"config.json: {name}={value!r}: a {needed} is needed")
    fields: dict[str, Any] = {ours: found[name] for name, ours in _SIZES.items()}
    fields["rope_theta"] = float(theta)
    unknown = sorted(set(overrides) - set(LlamaConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"{unknown[0]}={overrides[unknown[0]]!r} is no field of LlamaConfig; the fields are "
            + ", ".join(LlamaConfig.__dataclass_fields__)
        )
    config = LlamaConfig(**fields | overrides)
    head_dim = theirs.get("head_dim") or config.head_width
    if head_dim != config.head_width:
        raise ValueError(
            f"config.json: head_dim={head_dim} is not supported, only hidden_size / "
            f"num_attention_heads, {config.head_width}"
        )
    return config


def _their_config(config: LlamaConfig) -> dict[str, Any]:
    """The content of config.json, with the keys of transformers 4 and of 5."""
    return {name: getattr(config, ours) for name, ours in _SIZES.items()} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "head_dim": config.head_width,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "torch_dtype": jnp.dtype(config.param_dtype).name,
        # What a token means is the tokenizer's affair: transformers would assume 1 and 2.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor, by the tensor's name."""
    index, single = directory / _INDEX, directory / "model.safetensors"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ValueError(f"{index} has no weight_map that names the file of each tensor")
        files = sorted({directory / name for name in weight_map.values()})
    else:
        files = [single]
    tensors = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing; the weights are needed as safetensors")
        try:
            with safe_open(path, framework="numpy") as file:
                tensors |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    return tensors


def _check_tensors(config: LlamaConfig, files: dict[str, Path], tied: bool) -> None:
    """ValueError naming the tensors that `config` does not expect, or expects and misses."""
    shapes = _their_shapes(config)
    if tied:
        del shapes[_HEAD]
    # Old checkpoints carry the rotary frequencies, which follow from the configuration; a tied head
    # may be written twice.
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if tied:
        ignored.add(_HEAD)
    for what, names in {
        "missing": set(shapes) - set(files),
        "unexpected": set(files) - set(shapes) - ignored,
    }.items():
        if names:
            first = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"{len(names)} tensors are {what}: "
                f"{first}{', ...' if len(names) > 3 else ''}; config.json and weights must match"
            )
    for name, shape in shapes.items():
        with safe_open(files[name], framework="numpy") as file:
            found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            raise ValueError(f"{name} has shape {found}, but config.json asks for {shape}")


def _shards(config: LlamaConfig, max_shard_bytes: int) -> dict[str, list[str]]:
    """File names and the tensors in each, in the model's order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in _their_shapes(config).items():
        tensor_bytes = math.prod(shape) * jnp.dtype(config.param_dtype).itemsize
        if groups[-1] and size + tensor_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(groups, 1)}


def _their_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this configuration."""
    table = weight_table(config)
    shapes = {}
    for name, path in _NAMES.items():
        weight: Weight = _at(table, path)
        shape = weight.shape[1:] if "{}" in name else weight.shape
        shape = shape[::-1] if _is_transposed(name, len(shape)) else shape
        layers = range(config.layers) if "{}" in name else [0]
        shapes |= {name.format(layer): shape for layer in layers}
    return shapes


def _their_array(params: dict[str, Any], tensor: str) -> np.ndarray:
    """One tensor of theirs, such as "model.layers.3.mlp.up_proj.weight"."""
    parts = tensor.split(".")
    layer = int(parts[2]) if parts[1] == "layers" else ...
    name = ".".join("{}" if part.isdigit() else part for part in parts)
    array = np.asarray(_at(params, _NAMES[name])[layer])
    return np.ascontiguousarray(array.T if _is_transposed(name, array.ndim) else array)


def _is_transposed(name: str, ndim: int) -> bool:
    """Whether a tensor is a layer's matrix; embedding and head have a row for each id here, too."""
    return ndim == 2 and "{}" in name


def _at(tree: Any, path: Any) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); a directory with a Hugging Face LLaMA "
            "checkpoint is needed"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
