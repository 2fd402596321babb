"""Adapters in the format of Hugging Face's PEFT, read and written: LoRA and DoRA of a LLaMA.

A directory has adapter_config.json and adapter_model.safetensors. Its factors are transposed,
lora_A (rank, in) and lora_B (out, rank), one pair for each layer. A GradNormLoRP adapter is written
as DoRA, which has the same forward pass.
"""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree
from safetensors.numpy import save_file

from galore_optax import DoRA, GradNormLoRP, LoRA
from galore_optax.adapters.base import Adapter, is_adapter
from models.hugging_face.files import open_tensors, read_json, write_json
from models.hugging_face.llama import MODULES

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Names of our fields' tensors there. The first two are transposed, the last has one axis.
_TENSORS = {
    "a": "base_model.model.{}.lora_A.weight",
    "b": "base_model.model.{}.lora_B.weight",
    "magnitude": "base_model.model.{}.lora_magnitude_vector",
}

# Settings that could change the meaning of the weights, with the values that do not.
_OFF = (None, False, [], {})
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora"), _OFF),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save"), _OFF),
    **dict.fromkeys(("layer_replication", "target_parameters"), _OFF),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens"), (None,)),
}


def load_adapters(params: PyTree, directory: str | os.PathLike[str]) -> PyTree:
    """Returns a LLaMA's params with the LoRA or DoRA adapters of a PEFT checkpoint.

    The params are a nested dict, as `nnx.to_pure_dict` returns it; matrices may be quantized. Each
    adapter has the dtype of its matrix. ValueError if there is no such checkpoint, if it is of
    another kind, or if its tensors do not fit the params, layer for layer.
    """
    directory = Path(directory)
    config = _read_config(directory / _CONFIG)
    with open_tensors(directory / _WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    rank, kind = config["r"], DoRA if config.get("use_dora") else LoRA
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    dropout = float(config.get("lora_dropout") or 0.0)
    expected = {"a", "b", "magnitude"} if kind is DoRA else {"a", "b"}
    adapted: dict[Any, Any] = flatten_dict(params)
    for module, path in MODULES.items():
        base = adapted[path]
        fields = _take_fields(tensors, module, base.shape, rank)
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

    They are LoRA, DoRA or GradNormLoRP adapters, all of one kind, rank and scale. `base_model`
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
    rank = first.a.shape[-1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in adapters}),
        "r": rank,
        "lora_alpha": rank * getattr(first, "scale", 1.0),
        "lora_dropout": getattr(first, "dropout", 0.0),
        "use_dora": isinstance(first, DoRA | GradNormLoRP),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    write_json(directory / _CONFIG, config)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise ValueError(f"{_CONFIG}: {name} is missing; it must be a number")
    for name, accepted in _ACCEPTED.items():
        found = config.get(name, None if name == "peft_type" else accepted[0])
        if found not in accepted:
            raise ValueError(f"{_CONFIG}: {name}={found!r} is not supported, only {accepted[0]!r}")
    return config


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


def _adapters(params: PyTree) -> dict[str, Adapter]:
    """Returns the adapters of params by their modules' names there, with {} for the layer."""
    flat: dict[Any, Any] = flatten_dict(params)
    by_path = {path: x for path, x in flat.items() if is_adapter(x)}
    kinds = {(type(x), x.a.shape[-1], getattr(x, "scale", 1.0)) for x in by_path.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"params have adapters of {len(kinds)} kinds, ranks or scales; PEFT's format is for one"
        )
    for path, x in by_path.items():
        if path not in MODULES.values() or not isinstance(x, LoRA | GradNormLoRP):
            raise ValueError(
                f"{type(x).__name__} at {'/'.join(path)} has no place in PEFT's format; merge the "
                "adapters and save the model instead"
            )
    return {module: by_path[path] for module, path in MODULES.items() if path in by_path}
