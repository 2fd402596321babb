"""What the axes of each weight mean: for GaLore, for the layerwise step and for sharding."""

import dataclasses
from typing import Any

import jax

from galore_optax.adapters.base import is_adapter
from galore_optax.projection.dimension_numbers import GaLoreDimensionNumbers
from galore_optax.quantization.array import is_quantized
from models.llama.config import SIZES, LlamaConfig, Params, Weight, weight_table

_MATRICES = {"attention", "mlp"}


def dimension_numbers(params: Params) -> Params:
    """Returns GaLore's `weight_dimension_numbers` for params, or for a part of them.

    None, for embedding, norms, biases, head, and the magnitudes of adapters, means training at
    full rank, as published.
    """
    matrix = GaLoreDimensionNumbers(-2, -1)

    def choose(path: Any, _: Any) -> GaLoreDimensionNumbers | None:
        # A stack of vectors, (layer, out), one for each matrix.
        magnitude = any(getattr(entry, "name", None) == "magnitude" for entry in path)
        return matrix if _names(path) & _MATRICES and not magnitude else None

    return jax.tree.map_with_path(choose, params, is_leaf=is_quantized)


def param_axes(params: Params) -> Params:
    """Returns the number of axes of each param within one layer; None for params outside layers."""

    def choose(path: Any, _: Any) -> int | None:
        names = _names(path)
        return (2 if names & _MATRICES else 1) if "layers" in names else None

    return jax.tree.map_with_path(choose, params, is_leaf=is_quantized)


def logical_axes(params: Params, table: dict[str, Any] | None = None) -> Params:
    """Returns a tree like `params` of tuples of logical axis names, for sharding rules.

    `table` is the model's `weight_table`, by default a LLaMA's. The names are "layer", "vocab",
    "embed", "heads" and "mlp"; None is an axis that is never split. An adapter of a weight
    (layer, in, out) has factors (layer, in, None) and (layer, None, out).
    """
    if table is None:  # names do not depend on the size
        table = weight_table(dataclasses.replace(SIZES["tiny"], attention_bias=True, mlp_bias=True))

    def choose(path: Any, x: Any) -> Any:
        entry: Any = table
        for key in path:
            entry = entry[key.key]
        if not is_adapter(x):
            return entry.axes
        *layers, rows, columns = entry.axes
        parts = {"base": entry.axes, "a": (*layers, rows, None), "b": (*layers, None, columns)}
        parts["magnitude"] = (*layers, columns)
        present = {name: axes for name, axes in parts.items() if getattr(x, name, None) is not None}
        return dataclasses.replace(x, **present)

    return jax.tree.map_with_path(
        choose, params, is_leaf=lambda x: is_adapter(x) or is_quantized(x)
    )


def smaller_sides(config: LlamaConfig) -> list[int]:
    """Returns the smaller side of each matrix that GaLore projects; a rank below it compresses."""
    return sides_in(weight_table(config))


def sides_in(table: dict[str, Any]) -> list[int]:
    """The same from the `weight_table` of any model."""
    weights = jax.tree.leaves_with_path(table, is_leaf=lambda x: isinstance(x, Weight))
    return [min(x.shape[-2:]) for path, x in weights if _names(path) & _MATRICES]


def _names(path: Any) -> set[str | None]:
    """Returns the dict keys in a path; unstacked leaves also have an index, adapters a field."""
    return {getattr(entry, "key", None) for entry in path}
