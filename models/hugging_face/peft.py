"""Adapters in the format of Hugging Face's PEFT, read and written: LoRA and DoRA of a LLaMA.

A directory holds adapter_config.json and adapter_model.safetensors. Their factors are transposed,
lora_A (rank, in) and lora_B (out, rank), one pair for each layer. A GradNormLoRP adapter is written
as DoRA, whose forward pass is the same.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import load_file, save_file

from galore_optax.adapters.base import Adapter, is_adapter
from galore_optax.adapters.gradnorm_lorp import GradNormLoRP
from galore_optax.adapters.lora import DoRA, LoRA
from models.hugging_face.llama import MODULES

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Our fields by the ends of their names there, and whether theirs are transposed.
_PARTS = {
    "a": (".lora_A.weight", True),
    "b": (".lora_B.weight", True),
    "magnitude": (".lora_magnitude_vector", False),
}

# What would change the meaning of the weights, with the values that do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "trainable_token_indices": (None,),
    "target_parameters": ([], None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
}


def load_adapters(params: PyTree, directory: str | os.PathLike[str]) -> PyTree:
    """A LLaMA's params with the LoRA or DoRA adapters that a PEFT checkpoint holds.

    Args:
        params: The params of the base model, as `nnx.to_pure_dict` gives them; matrices may be
            quantized.
        directory: With adapter_config.json and adapter_model.safetensors.

    Returns:
        The params with adapters in the place of the adapted matrices, in these matrices' dtypes.

    Raises:
        ValueError: If there is no such checkpoint, if it is of another kind, or its tensors do not
            fit the params, layer for layer.
    """
    directory = Path(directory)
    config, tensors = _read(directory)
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    adapted = jax.tree.map(lambda x: x, params)
    found = set()
    for module, path in MODULES.items():
        parent = adapted
        for name in path[:-1]:
            parent = parent[name]
        base = parent[path[-1]]
        parts = {}
        for field, (end, transposed) in _PARTS.items():
            names = [f"{_PREFIX}{module.format(i)}{end}" for i in range(base.shape[0])]
            present = [name for name in names if name in tensors]
            found |= {*present}
            if not present:
                continue
            if len(present) < len(names):
                missing = next(name for name in names if name not in tensors)
                raise ValueError(
                    f"{directory / _WEIGHTS} has no {missing}: {module.format('N')} is adapted in "
                    "some layers only; adapters here are of all layers or none"
                )
            stack = [tensors[name].T if transposed else tensors[name] for name in names]
            parts[field] = jnp.asarray(_stacked(stack, base.shape, field, rank, names), base.dtype)
        if parts:
            parent[path[-1]] = _adapter(base, parts, config, scale, module)
    if unknown := sorted({*tensors} - found):
        raise ValueError(
            f"{directory / _WEIGHTS} holds {len(unknown)} tensors that belong to no matrix of this "
            f"model, such as {unknown[0]}"
        )
    return adapted


def save_adapters(
    params: PyTree, directory: str | os.PathLike[str], *, base_model: str | None = None
) -> None:
    """Write a LLaMA's adapters alone, so that `peft.PeftModel.from_pretrained` reads them.

    Args:
        params: Params with LoRA, DoRA or GradNormLoRP adapters, all of one kind, rank and scale.
        directory: Made if need be; it must not hold adapters already.
        base_model: Where the base model is, for those who read it.

    Raises:
        ValueError: If there are no adapters, they cannot be written in this format, or the
            directory holds some.
    """
    directory = Path(directory)
    present = [name for name in (_CONFIG, _WEIGHTS) if (directory / name).exists()]
    if present:
        raise ValueError(
            f"directory={directory} already holds adapters ({present[0]}); nothing was written, "
            "choose another directory"
        )
    adapters = _adapters(params)
    tensors = {}
    for module, adapter in adapters.items():
        for field, (end, transposed) in _PARTS.items():
            for i, array in enumerate(np.asarray(getattr(adapter, field, ()))):
                name = f"{_PREFIX}{module.format(i)}{end}"
                tensors[name] = np.ascontiguousarray(array.T if transposed else array)
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
    (directory / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _adapters(params: PyTree) -> dict[str, Adapter]:
    """The adapters of params by their modules' names there, with {} for the layer."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_adapter)
    by_path = {tuple(entry.key for entry in path): x for path, x in leaves if is_adapter(x)}
    kinds = {(type(x), x.a.shape[-1], getattr(x, "scale", 1.0)) for x in by_path.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"params hold adapters of {len(kinds)} kinds, ranks or scales; PEFT's format is for one"
        )
    adapters = {module: by_path.pop(path) for module, path in MODULES.items() if path in by_path}
    other = [x for x in adapters.values() if not isinstance(x, LoRA | GradNormLoRP)]
    if by_path or other:
        what = "/".join(next(iter(by_path))) if by_path else type(other[0]).__name__
        raise ValueError(
            f"{what} has no place in PEFT's format; merge the adapters and save the model instead"
        )
    return adapters


def _adapter(
    base: Any, parts: dict[str, Any], config: dict[str, Any], scale: float, module: str
) -> Adapter:
    dora = bool(config.get("use_dora"))
    wanted = {"a", "b", "magnitude"} if dora else {"a", "b"}
    if {*parts} != wanted:
        raise ValueError(
            f"{module.format('N')} has {', '.join(sorted(parts))}, but "
            f"{'DoRA' if dora else 'LoRA'} has {', '.join(sorted(wanted))}"
        )
    dropout = float(config.get("lora_dropout") or 0.0)
    return (DoRA if dora else LoRA)(base, **parts, scale=scale, dropout=dropout)


def _stacked(
    stack: list[np.ndarray], shape: tuple[int, ...], field: str, rank: int, names: list[str]
) -> np.ndarray:
    _, rows, columns = shape
    wanted = {"a": (rows, rank), "b": (rank, columns), "magnitude": (columns,)}[field]
    for array, name in zip(stack, names, strict=True):
        if array.shape != wanted:
            raise ValueError(
                f"{name} is for {array.shape} in our orientation (in, out), but {wanted} is needed "
                "for this model and rank"
            )
    return np.stack(stack)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        config = json.loads((directory / _CONFIG).read_text())
        tensors = load_file(directory / _WEIGHTS)
    except Exception as error:  # safetensors raises its own, and OSError without a file name
        raise ValueError(
            f"{directory} cannot be read as PEFT adapters ({' '.join(str(error).split())}); a "
            f"directory with {_CONFIG} and {_WEIGHTS} is needed"
        ) from error
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise ValueError(f"{_CONFIG}: {name} is missing; LoRA's names its rank and its scale")
    for name, accepted in _REFUSED.items():
        found = config.get(name, accepted[0] if name != "peft_type" else None)
        if found not in accepted:
            raise ValueError(f"{_CONFIG}: {name}={found!r} is not supported, only {accepted[0]!r}")
    return config, tensors
