"""Adapters in the format of Hugging Face's PEFT, read and written: LoRA and DoRA of a LLaMA.

A directory has adapter_config.json and adapter_model.safetensors. Its factors are transposed,
lora_A (rank, in) and lora_B (out, rank), one pair for each layer. A GradNormLoRP adapter is written
as DoRA, which has the same forward pass.
"""

import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree

from galore_optax import DoRA, GradNormLoRP, LoRA
from galore_optax.adapters.base import Adapter, is_adapter
from models.hugging_face.files import (
    read_json,
    read_tensor,
    tensor_names,
    write_json,
    write_tensors,
)
from models.hugging_face.llama import MODULES

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Names of our fields' tensors there. The first two are transposed, the last has one axis.
_TENSORS = {
    "a": "base_model.model.{}.lora_A.weight",
    "b": "base_model.model.{}.lora_B.weight",
    "magnitude": "base_model.model.{}.lora_magnitude_vector",
}

# Keys with their own rules below.
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "rank_pattern", "alpha_pattern",
}  # fmt: skip
# Settings that could change the meaning of the weights, with the values that do not; null and no
# key are as the first.
_OFF = (False, [], {})
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # With the others, such as "pissa" and "olora", peft takes the initial factors off the base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "layers_pattern": ("layers", ["layers"], []),
    **dict.fromkeys(("use_rslora", "use_dora"), (False, True)),
    **dict.fromkeys(("lora_bias", "fan_in_fan_out", "use_qalora", "ensure_weight_tying"), _OFF),
    **dict.fromkeys(("modules_to_save", "layer_replication", "target_parameters"), _OFF),
    # An empty object turns these on.
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config", "velora_config"), ()),
    **dict.fromkeys(("use_bdlora", "megatron_config"), ()),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens"), ()),
}
# Names, and settings of a training or of what is refused above.
_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "merge_weights",
    "peft_version", "qalora_group_size", "revision",
}  # fmt: skip


def load_adapters(params: PyTree, directory: str | os.PathLike[str]) -> PyTree:
    """Returns a LLaMA's params with the LoRA or DoRA adapters of a PEFT checkpoint.

    The params are a nested dict, as `nnx.to_pure_dict` returns it; matrices may be quantized. Each
    adapter has the dtype of its matrix. ValueError if there is no such checkpoint, if it is of
    another kind, or if its tensors do not fit the params, layer for layer.
    """
    directory = Path(directory)
    config = _read_config(directory / _CONFIG)
    file = directory / _WEIGHTS
    tensors = {name: read_tensor(file, name) for name in tensor_names(file)}
    kind = DoRA if config.get("use_dora") else LoRA
    dropout = float(config.get("lora_dropout", 0.0))
    expected = {"a", "b", "magnitude"} if kind is DoRA else {"a", "b"}
    adapted: dict[Any, Any] = flatten_dict(params)
    for module, path in MODULES.items():
        base = adapted[path]
        if is_adapter(base) or not jnp.issubdtype(base.dtype, jnp.floating):
            found = type(base).__name__ if is_adapter(base) else base.dtype
            raise ValueError(f"{'/'.join(path)} is {found}, not a matrix of floats; merge adapters")
        rank, alpha = (_of_module(config, *names, module, base.shape[0]) for names in _PATTERNS)
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        fields = _take_fields(tensors, module, base.shape, rank)
        for key in map(module.format, range(base.shape[0])):
            if (targeted := _is_targeted(key, config)) != bool(fields):
                raise ValueError(
                    f"{key} has {'' if fields else 'no '}tensors in {file}, but {_CONFIG} "
                    f"{'targets' if targeted else 'does not target'} it"
                )
        if not fields:
            continue
        if {*fields} != expected:
            needed = f"{kind.__name__} has {', '.join(sorted(expected))}"
            raise ValueError(f"{module.format('N')} has {', '.join(fields)}, but {needed}")
        arrays = {name: jnp.asarray(array, base.dtype) for name, array in fields.items()}
        adapted[path] = kind(base, **arrays, scale=scale, dropout=dropout)
    if tensors:
        raise ValueError(
            f"{directory / _WEIGHTS} has {len(tensors)} tensors that belong to no matrix of this "
            f"model, such as {min(tensors)}"
        )
    return unflatten_dict(adapted)


def save_adapters(
    params: PyTree, directory: str | os.PathLike[str], *, base_model: str | None = None
) -> None:
    """Writes a LLaMA's adapters alone, so that `peft.PeftModel.from_pretrained` reads them.

    They are LoRA, DoRA or GradNormLoRP adapters, all of one kind and dropout. `base_model`
    tells readers of the file where the base model is. ValueError if the directory has adapters, or
    these cannot be written in this format.
    """
    directory = Path(directory)
    if present := [name for name in (_CONFIG, _WEIGHTS) if (directory / name).exists()]:
        raise ValueError(
            f"directory={directory} already has adapters in it ({present[0]}); nothing was "
            "written, choose another directory"
        )
    adapters = _adapters(params)
    tensors = {
        name.format(module.format(i)): np.ascontiguousarray(array.T)
        for module, adapter in adapters.items()
        for field, name in _TENSORS.items()
        for i, array in enumerate(np.asarray(getattr(adapter, field, ())))
    }
    first = next(iter(adapters.values()))
    ranks = {module: x.a.shape[-1] for module, x in adapters.items()}
    alphas = {module: ranks[module] * getattr(x, "scale", 1.0) for module, x in adapters.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": sorted({_last(module) for module in adapters}),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_last(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {_last(m): a for m, a in alphas.items() if a != alpha},
        "lora_dropout": getattr(first, "dropout", 0.0),
        "use_dora": isinstance(first, DoRA | GradNormLoRP),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / _WEIGHTS, tensors)
    write_json(directory / _CONFIG, config)


def _read_config(path: Path) -> dict[str, Any]:
    # The targets are peft's default for a LLaMA.
    config: dict[str, Any] = {"peft_type": None, "target_modules": ["q_proj", "v_proj"]}
    config |= {name: value for name, value in read_json(path).items() if value is not None}
    for name, accepted in _ACCEPTED.items():
        if name in config and config[name] not in accepted:
            only = f", only {' or '.join(map(repr, accepted))}" if accepted else ""
            raise ValueError(
                f"{path}: {name}={config[name]!r} is not supported{only}; convert the adapters "
                "with peft, or merge them there and load the model"
            )
    if unknown := sorted({*config} - _READ - {*_ACCEPTED} - _NO_EFFECT):
        raise ValueError(
            f"{path}: {unknown[0]}={config[unknown[0]]!r} is not known here and could change what "
            "the adapters compute; delete it if it does not, or merge them with peft"
        )
    for name, types, needed, least, most in (
        ("r", (int,), "an integer of at least 1", 1, _LARGEST),
        ("lora_alpha", (int, float), "a finite number", -_LARGEST, _LARGEST),
        ("lora_dropout", (int, float), "at least 0 and below 1", 0, 1),
    ):
        value = config.get(name, 0.0 if name == "lora_dropout" else None)
        if type(value) not in types or not least <= value < most:
            raise ValueError(f"{path}: {name}={value!r} must be {needed}")
    _check_patterns(path, config)
    for name, types in (
        ("target_modules", (str, list)),
        ("exclude_modules", (str, list)),
        ("layers_to_transform", (int, list)),
    ):
        if type(config.get(name, [])) not in types:
            raise ValueError(
                f"{path}: {name}={config[name]!r} must be {types[0].__name__} or a list of these"
            )
        if isinstance(config.get(name), str):
            _check_pattern(path, name, config[name])
    return config


_PATTERNS = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
_LARGEST = float(np.finfo(np.float32).max)


def _check_patterns(path: Path, config: dict[str, Any]) -> None:
    """Raises ValueError unless rank_pattern and alpha_pattern have numbers by module names."""
    kinds = (("rank_pattern", (int,), 1), ("alpha_pattern", (int, float), -_LARGEST))
    for name, types, least in kinds:
        patterns = config.get(name, {})
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {name}={patterns!r} must be an object")
        for key, value in patterns.items():
            if type(value) not in types or not least <= value < _LARGEST:
                raise ValueError(f"{path}: {name}[{key!r}]={value!r} must be a number of its kind")
            _check_pattern(path, name, key)


def _check_pattern(path: Path, name: str, pattern: str) -> None:
    """Raises ValueError unless a setting is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {name} has {pattern!r}: {error}") from None


def _of_module(config: dict[str, Any], name: str, pattern: str, module: str, layers: int) -> Any:
    """A setting of a module, which patterns of modules' names may change; the same in all layers.

    As in peft, the first pattern counts that matches a whole name, or its end after a dot.
    """
    patterns: dict[str, Any] = config.get(pattern, {})

    def of(key: str) -> Any:
        fit = (value for x, value in patterns.items() if re.fullmatch(rf"(.*\.)?({x})", key))
        return next(fit, config[name])

    values = {of(module.format(layer)) for layer in range(layers)}
    if len(values) > 1:
        raise ValueError(
            f"{_CONFIG}: {pattern} gives {module.format('N')} {name}={min(values)} to {max(values)}"
            " in its layers; adapters here have one for all layers"
        )
    return values.pop()


def _is_targeted(key: str, config: dict[str, Any]) -> bool:
    """Whether peft puts an adapter on a module of a layer, by its name."""

    def matches(modules: str | list[str]) -> bool:
        if isinstance(modules, str):
            return modules == "all-linear" or bool(re.fullmatch(modules, key))
        return any(f".{key}".endswith(f".{name}") for name in modules)

    modules, layers = config["target_modules"], config.get("layers_to_transform", [])
    if matches(config.get("exclude_modules", [])) or not matches(modules):
        return False
    if layers == [] or isinstance(modules, str) or key in modules:
        return True
    return int(key.split(".")[2]) in (layers if isinstance(layers, list) else [layers])


def _take_fields(
    tensors: dict[str, np.ndarray], module: str, weight_shape: tuple[int, int, int], rank: int
) -> dict[str, Float[np.ndarray, "layers ..."]]:
    """Removes a module's tensors and returns them stacked, by our fields' names."""
    layers, rows, columns = weight_shape
    shapes = {"a": (rows, rank), "b": (rank, columns), "magnitude": (columns,)}
    fields = {}
    for field, template in _TENSORS.items():
        names = [template.format(module.format(i)) for i in range(layers)]
        missing = [name for name in names if name not in tensors]
        if len(missing) == layers:
            continue
        if missing:
            raise ValueError(
                f"{_WEIGHTS} has no {missing[0]}: {module.format('N')} is adapted in some layers "
                "only; adapters here are of all layers or none"
            )
        for name in names:
            if (shape := tensors[name].T.shape) != shapes[field]:
                raise ValueError(
                    f"{name} is {shape} in our orientation (in, out), but must be "
                    f"{shapes[field]} for this model and rank"
                )
        fields[field] = np.stack([tensors.pop(name).T for name in names])
    return fields


def _last(module: str) -> str:
    """The last part of a module's name, which is that of one kind of matrix."""
    return module.rsplit(".", 1)[-1]


def _adapters(params: PyTree) -> dict[str, Adapter]:
    """Returns the adapters of params by their modules' names there, with {} for the layer."""
    flat: dict[Any, Any] = flatten_dict(params)
    by_path = {path: x for path, x in flat.items() if is_adapter(x)}
    kinds = {(type(x), getattr(x, "dropout", 0.0)) for x in by_path.values()}
    if not kinds:
        raise ValueError("params have no adapters: save the model instead, without --adapters")
    if len(kinds) != 1:
        raise ValueError(
            f"params have adapters of {len(kinds)} kinds or dropouts; PEFT's format is for one"
        )
    for path, x in by_path.items():
        if path not in MODULES.values() or not isinstance(x, LoRA | GradNormLoRP):
            raise ValueError(
                f"{type(x).__name__} at {'/'.join(path)} has no place in PEFT's format; merge the "
                "adapters and save the model instead"
            )
    return {module: by_path[path] for module, path in MODULES.items() if path in by_path}
