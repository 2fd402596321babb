"""RoBERTa and BERT checkpoints in Hugging Face's format, read and written.

Their matrices are (out, in), one per layer; ours are (in, out) and stacked over the layers.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import DTypeLike, Shaped

from models.encoder.config import EncoderConfig, weight_table
from models.encoder.model import Encoder
from models.hugging_face.files import read_json, read_tensor, tensor_shape
from models.hugging_face.llama import (
    check_layers,
    check_names,
    check_no_model,
    check_params,
    tensor_files,
    write_checkpoint,
)
from models.hugging_face.roberta_config import check_labels, from_theirs, to_theirs

# Paths of our weights by the names of their modules there; {} is the layer.
_LAYER = "encoder.layer.{}."
_LINEAR = {
    f"{_LAYER}attention.self.query": ("attention", "query"),
    f"{_LAYER}attention.self.key": ("attention", "key"),
    f"{_LAYER}attention.self.value": ("attention", "value"),
    f"{_LAYER}attention.output.dense": ("attention", "out"),
    f"{_LAYER}intermediate.dense": ("mlp", "up"),
    f"{_LAYER}output.dense": ("mlp", "down"),
}
_NORMS = {
    "embeddings.LayerNorm": ("embedding_norm",),
    f"{_LAYER}attention.output.LayerNorm": ("layers", "attention_norm"),
    f"{_LAYER}output.LayerNorm": ("layers", "mlp_norm"),
}
_NAMES: dict[str, tuple[str, ...]] = {
    "embeddings.word_embeddings.weight": ("embedding",),
    "embeddings.position_embeddings.weight": ("positions",),
    "embeddings.token_type_embeddings.weight": ("token_types",),
}
_NAMES |= {f"{name}.weight": (*path, "scale") for name, path in _NORMS.items()}
_NAMES |= {f"{name}.bias": (*path, "bias") for name, path in _NORMS.items()}
_NAMES |= {f"{name}.weight": ("layers", *path) for name, path in _LINEAR.items()}
_NAMES |= {f"{name}.bias": ("layers", f"{g}_bias", x) for name, (g, x) in _LINEAR.items()}
# Tensors with another use: heads of language models, and numbers that are computed here.
_NOT_READ = re.compile(r"lm_head\..*|cls\..*|(.*\.)?embeddings\.(position_ids|token_type_ids)")
_POOLER, _DENSE = "pooler.dense", "classifier.dense"


class _Place(NamedTuple):
    path: tuple[str, ...]  # of our weight
    layer: int | EllipsisType  # of a stack; ... for a weight outside the layers
    transposed: bool


def load_roberta(
    directory: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, **overrides: Any
) -> Encoder:
    """Reads a RoBERTa or BERT checkpoint in Hugging Face's format.

    It has config.json and model.safetensors, or shards of the latter and their index. A pooler and
    a classifier are read where the files have them; a head of a language model is not. Weights and
    computation get `dtype`; `overrides` are further fields of `EncoderConfig`, such as `dropout=0`.

    ValueError if there is no checkpoint, if it is damaged, quantized or of another architecture, or
    if the files contradict each other or have a tensor or a setting that is not understood.
    """
    directory = Path(directory)
    config = read_config(directory, dtype=dtype, param_dtype=dtype, **overrides)
    params: dict[Any, Any] = {
        path: jnp.asarray(stack) for path, stack in read_weights(directory, config)
    }
    if lacking := sorted(
        "/".join(path) for path in flatten_dict(weight_table(config)).keys() - params
    ):
        raise ValueError(
            f"{directory} has no weights for {lacking[0]} of the sizes that were asked for: leave "
            f"{', '.join(overrides)} out"
        )
    graph, _ = nnx.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))), nnx.Param)
    return nnx.merge(graph, unflatten_dict(params))


def read_config(directory: Path, **overrides: Any) -> EncoderConfig:
    """Reads config.json, and from the weights whether there are a pooler and a classifier."""
    theirs = read_json(directory / "config.json")
    config = from_theirs(theirs, overrides)
    files = tensor_files(directory)
    names = _head_names(config, files)
    found: dict[str, Any] = {"pooler": "pooler" in names}
    if "classifier" in names:
        # Without layers the tensor is as they store it: (classes, width).
        name = f"{names['classifier']}.weight"
        found["classes"] = tensor_shape(files[name], name)[0]
        check_labels(theirs, found["classes"], name)
    return dataclasses.replace(config, **found | overrides)


def read_weights(
    directory: Path, config: EncoderConfig
) -> Iterator[tuple[tuple[str, ...], Shaped[np.ndarray, "..."]]]:
    """Reads the weights of a checkpoint, of which `config` is the configuration.

    Yields the path and the array of each weight that `check_weights` finds, one at a time.
    Errors as for `load_roberta`.
    """
    files, found = check_weights(directory, config)
    places = _places(config, files)
    weights: dict[Any, Any] = flatten_dict(weight_table(config))
    for path, names in found.items():
        stack = np.empty(weights[path].shape, config.param_dtype)
        for name in names:
            tensor = read_tensor(files[name], name)
            stack[places[name].layer] = tensor.T if places[name].transposed else tensor
        yield path, stack


def check_weights(
    directory: Path, config: EncoderConfig
) -> tuple[dict[str, Path], dict[tuple[str, ...], list[str]]]:
    """Returns the file of each tensor, and of each weight its tensors, by the headers alone.

    The files may lack pooler and classifier only; a classifier of another number of classes is left
    out.
    ValueError unless the other tensors are those of `config`, by name and shape.
    """
    files = tensor_files(directory)
    check_layers(config.layers, files)
    places = _places(config, files)
    unexpected = {
        name
        for name in files.keys() - places.keys()
        if not _NOT_READ.fullmatch(name) and not _is_head(name)
    }
    check_names(missing=places.keys() - files.keys(), unexpected=unexpected)
    weights: dict[Any, Any] = flatten_dict(weight_table(config))
    found: dict[tuple[str, ...], list[str]] = {}
    for name, (path, layer, transposed) in places.items():
        expected = weights[path].shape[0 if layer is ... else 1 :]
        shape = tensor_shape(files[name], name)[:: -1 if transposed else 1]
        if shape == expected:
            found.setdefault(path, []).append(name)
        elif not path[0].startswith("classifier"):
            raise ValueError(
                f"{name} has shape {shape} as (in, out), but config.json says {expected}"
            )
    return files, found


def save_roberta(model: Encoder, directory: str | os.PathLike[str]) -> None:
    """Writes an encoder so that transformers reads it, as `from_pretrained` of its architecture.

    The weights keep their dtype. ValueError if the directory has a model in it, or the weights are
    not arrays of floats in the shapes that the configuration says.
    """
    directory = Path(directory)
    check_no_model(directory)
    params: dict[Any, Any] = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    check_params(params, flatten_dict(weight_table(model.config)))
    places = _places(model.config, None)

    def array(name: str) -> Shaped[np.ndarray, "..."]:
        path, layer, transposed = places[name]
        ours = np.asarray(params[path][layer])
        return np.ascontiguousarray(ours.T if transposed else ours)

    dtype = jnp.result_type(*(weight.dtype for weight in params.values()))
    config = to_theirs(dataclasses.replace(model.config, param_dtype=dtype))
    write_checkpoint(directory, {"model.safetensors": [*places]}, array, config, 0)


def _places(config: EncoderConfig, files: dict[str, Path] | None) -> dict[str, _Place]:
    """The place of each tensor, by its name in the files, or as it is written without files."""
    if files is None:
        prefix = _kind(config) if config.classes else ""
        heads = {"pooler": f"{prefix}{_POOLER}", "classifier": "classifier"}
        if config.pad_id is not None and config.classes:
            heads = {"pooler": _DENSE, "classifier": "classifier.out_proj"}
    else:
        prefix = _prefix(config, files)
        heads = _head_names(config, files)
    places = {}
    for name, path in _NAMES.items():
        # The embeddings are not transposed, and a vector is its own transpose.
        transposed = name.endswith("weight") and path[0] == "layers"
        layers: Any = range(config.layers) if "{}" in name else [...]
        for i in layers:
            theirs = _spelled(prefix + name.format(i), files)
            places[theirs] = _Place(path, i, transposed)
    for ours, name in heads.items():
        if getattr(config, {"pooler": "pooler", "classifier": "classes"}[ours]):
            places[f"{name}.weight"] = _Place((ours,), ..., True)
            places[f"{name}.bias"] = _Place((f"{ours}_bias",), ..., False)
    return places


def _kind(config: EncoderConfig) -> str:
    return "bert." if config.pad_id is None else "roberta."


def _prefix(config: EncoderConfig, files: dict[str, Path]) -> str:
    """What the encoder's tensors begin with: nothing where the model is the encoder alone."""
    return _kind(config) if any(name.startswith(_kind(config)) for name in files) else ""


def _spelled(name: str, files: dict[str, Path] | None) -> str:
    """A tensor's name as the files have it: BERT's first checkpoints call norms' weights gamma."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    old = old.replace("LayerNorm.bias", "LayerNorm.beta")
    return old if files is not None and old in files else name


def _head_names(config: EncoderConfig, files: dict[str, Path]) -> dict[str, str]:
    """The modules of pooler and classifier that the files have."""
    pooler = _DENSE if f"{_DENSE}.weight" in files else _prefix(config, files) + _POOLER
    classifier = "classifier" if config.pad_id is None else "classifier.out_proj"
    names = {"pooler": pooler, "classifier": classifier}
    return {ours: name for ours, name in names.items() if f"{name}.weight" in files}


def _is_head(name: str) -> bool:
    """Whether a tensor is a pooler's or a classifier's, which a model may have no use for."""
    heads = r"(pooler\.dense|classifier|classifier\.dense|classifier\.out_proj)"
    return bool(re.fullmatch(rf"(roberta\.|bert\.)?{heads}\.(weight|bias)", name))
