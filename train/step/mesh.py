"""The device mesh, and how arrays are split over it: one table from logical axes to mesh axes.

Three mesh axes: `data` splits the batch alone; `fsdp` splits the batch and the weights (along the
model's width); `tensor` splits the weights' other axis. XLA inserts the communication.
"""

import ctypes
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from galore_optax.quantization.array import is_quantized

AXES = ("data", "fsdp", "tensor")

# The mesh axis that splits an array's axis of each name.
RULES: Mapping[str | None, str | None] = {
    "vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp",
    "layer": None, None: None,
}  # fmt: skip

BATCH = PartitionSpec(("data", "fsdp"))
OWN = PartitionSpec("data")  # of an axis with an entry for each device of `--compress-gradients`


def parse_mesh(text: str | None) -> dict[str, int]:
    """Reads `data=2,fsdp=4`; axes that are not named have size 1."""
    sizes = dict.fromkeys(AXES, 1)
    if text is None:
        return sizes
    seen = set()
    for part in text.split(","):
        name, _, size = part.partition("=")
        name, size = name.strip(), size.strip()
        if name not in sizes or name in seen or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {text!r}: expected sizes of {', '.join(AXES)}, each named at most once, "
                f"such as data=2,fsdp=4; {part!r} is not one"
            )
        seen.add(name)
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str | None, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `--mesh`, such as `data=2,fsdp=4` over all devices; None: the first alone.

    With several processes all devices are those of all, and None is `data=N`. `devices` are others
    than those of this process, which a program is to be compiled for.
    """
    if devices is None:
        devices = available_devices()
        text = f"data={len(devices)}" if text is None and jax.process_count() > 1 else text
    sizes = parse_mesh(text)
    devices = devices[:1] if text is None else devices
    product = math.prod(sizes.values())
    if product != len(devices):
        raise ValueError(
            f"--mesh {text!r} asks for {product} devices, there are {len(devices)}: "
            f"choose sizes whose product is {len(devices)}, such as data={len(devices)}"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def available_devices() -> list[jax.Device]:
    """`jax.devices()`; raises ValueError if the platform that JAX was told to use has none."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        # JAX's plugin for NVIDIA GPUs, installed to compile for them, would print a traceback
        # because there is no driver; JAX then goes on without it.
        logging.getLogger("jax._src.xla_bridge").addFilter(_is_not_about_cuda)
    try:
        return jax.devices()
    # JAX asserts where the environment names a platform whose plugin is not installed.
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS") or "any platform"
        reason = " ".join(str(error).split()) or "no such platform here"
        raise ValueError(
            f"JAX has no device of {asked} ({reason}): set the environment variable JAX_PLATFORMS "
            "to cpu, or install JAX for the device"
        ) from error


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    return "jax_plugins.xla_cuda" not in record.getMessage()


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that each device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def heads_sharding(mesh: Mesh, kv_heads: int) -> NamedSharding | None:
    """The sharding of queries, keys and values (batch, length, heads, head); None on one device."""
    if mesh.size == 1:
        return None
    heads = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*BATCH, None, heads))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts into which a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(mesh: Mesh, shapes: Any, logical_axes: Any) -> tuple[Any, list[str]]:
    """The sharding of each param, and a line for each that is not split as `RULES` says.

    A mesh axis that does not divide its axis of a matrix splits the other one, if it divides that.
    `logical_axes` has for each leaf of `shapes` a tuple of names (keys of `RULES`).
    """
    notes: list[str] = []

    def place(path, leaf, names):
        spec, note = _place(dict(mesh.shape), leaf.shape, names)
        if note:
            notes.append(f"{jax.tree_util.keystr(path, simple=True, separator='/')} {note}")
        if not is_quantized(leaf):
            return NamedSharding(mesh, spec)
        # No block is split; scales that are quantized themselves have blocks along another axis.
        blocks = [None if i - leaf.ndim == leaf.axis else axes for i, axes in enumerate(spec)]
        scales = NamedSharding(mesh, PartitionSpec(*([] if is_quantized(leaf.scales) else blocks)))
        codes = NamedSharding(mesh, spec if leaf.code.bits == 8 else PartitionSpec(*blocks))
        return jax.tree.map(lambda part: codes if part is leaf.codes else scales, leaf)

    return jax.tree.map_with_path(place, shapes, logical_axes, is_leaf=is_quantized), notes


def _place(
    mesh: dict[str, int], shape: tuple[int, ...], names: tuple[str | None, ...]
) -> tuple[PartitionSpec, str]:
    """An array's spec, and in what it differs from `RULES`."""
    split: list[list[str]] = [[] for _ in shape]

    def try_split(axis: str, d: int) -> bool:
        divides = shape[d] % math.prod(mesh[a] for a in (*split[d], axis)) == 0
        split[d] += [axis] if divides else []
        return divides

    rules = [(axis, d) for d, name in enumerate(names) if (axis := RULES[name]) and mesh[axis] > 1]
    notes = []
    for axis, d in [(axis, d) for axis, d in rules if not try_split(axis, d)]:
        note = f"{shape}: {axis}={mesh[axis]} does not divide axis {d} ({names[d]}), "
        others = [o for o in range(len(shape)) if o != d and RULES[names[o]] is not None]
        other = next((o for o in others if try_split(axis, o)), None)
        if other is None:
            notes.append(note + "nor another: a copy on each device")
        else:
            notes.append(note + f"splits axis {other} ({names[other]}) instead")
    spec = PartitionSpec(*(tuple(axes) if len(axes) > 1 else (*axes, None)[0] for axes in split))
    return spec, "; ".join(notes)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a batch `(B, L)` on the devices; each process puts its own rows, the others may be 0."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in batch.items()
    }


def own_rows(mesh: Mesh, batch_size: int) -> set[int]:
    """The rows of a batch that this process puts on its devices."""
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    return {row for place in places.values() for row in np.arange(batch_size)[place].tolist()}


def abstract_batch(batch_size: int, seq_len: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The `ShapeDtypeStruct`s of a batch of `put_batch`."""
    ids = jax.ShapeDtypeStruct((batch_size, seq_len), np.int32, sharding=NamedSharding(mesh, BATCH))
    names = ("inputs", "targets", "positions", "segment_ids")
    return {**dict.fromkeys(names, ids), "weights": ids.update(dtype=np.float32)}
