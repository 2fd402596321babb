"""GPUs that a step can be compiled for without having one, and what each can do at most.

XLA compiles for a *target*, the text of its `GpuTargetConfigProto`. The table has what differs
between cards; `--gpu` also takes a file with such a text.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

# Peak FLOP/s of matrix products with bfloat16 operands, and with float32 ones,
# which JAX multiplies as TF32 on NVIDIA's and as bfloat16 on Google's devices by default.
# Manufacturers' figures, dense, summed in float32.
PEAK_FLOPS: Mapping[str, Mapping[str, float]] = {
    "H200": {"bfloat16": 989e12, "float32": 494e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 378e12},
    "H100": {"bfloat16": 989e12, "float32": 494e12},
    "A100": {"bfloat16": 312e12, "float32": 156e12},
    "L40S": {"bfloat16": 362e12, "float32": 183e12},
    "L4": {"bfloat16": 121e12, "float32": 60e12},
    "A10": {"bfloat16": 125e12, "float32": 62.5e12},
    "RTX 4090": {"bfloat16": 165e12, "float32": 82.6e12},
    "RTX 4060 Ti": {"bfloat16": 44.1e12, "float32": 22.1e12},
    "RTX 3090": {"bfloat16": 71e12, "float32": 35.6e12},
    "RTX 3080": {"bfloat16": 59.5e12, "float32": 29.8e12},
    "RTX 3060": {"bfloat16": 25.5e12, "float32": 12.7e12},
    "TPU v4": {"bfloat16": 275e12, "float32": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12, "float32": 197e12},
    "TPU v5p": {"bfloat16": 459e12, "float32": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12, "float32": 918e12},
}

# By compute capability: threads and bytes of shared memory in a multiprocessor, its float32 units.
_ARCHITECTURES = {
    (8, 0): (2048, 167_936, 64),
    (8, 6): (1536, 102_400, 128),
    (8, 9): (1536, 102_400, 128),
    (9, 0): (2048, 233_472, 128),
}


class _Row(NamedTuple):
    """The numbers of a card's kind."""

    kind: str  # as the driver names it
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # GHz
    bandwidth: int  # bytes/s
    l2_cache: int  # bytes
    memory: int  # bytes


_TABLE = {
    "rtx-3060-12gb": _Row(
        "GeForce RTX 3060", (8, 6), 28, 1.78, 360 * 10**9, 2_359_296, 12_620_922_880
    ),
    "rtx-3080-10gb": _Row(
        "GeForce RTX 3080", (8, 6), 68, 1.71, 760 * 10**9, 5_242_880, 10_501_750_784
    ),
    "rtx-4060-ti-16gb": _Row(
        "GeForce RTX 4060 Ti", (8, 9), 34, 2.54, 288 * 10**9, 33_554_432, 17_175_150_592
    ),
    "rtx-4090-24gb": _Row(
        "GeForce RTX 4090", (8, 9), 128, 2.52, 1008 * 10**9, 75_497_472, 25_386_352_640
    ),
    "a100-80gb": _Row(
        "A100-SXM4-80GB", (8, 0), 108, 1.41, 2039 * 10**9, 41_943_040, 84_974_239_744
    ),
    "h100-80gb": _Row(
        "H100 80GB HBM3", (9, 0), 132, 1.98, 3352 * 10**9, 52_428_800, 84_942_979_072
    ),
    "h200-141gb": _Row(
        "H200", (9, 0), 132, 1.98, 4890 * 10**9, 62_914_560, 150_754_820_096
    ),
}  # fmt: skip
CARDS = tuple(_TABLE)

_TARGET = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {threads}
  core_count: {row.multiprocessors}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {row.bandwidth}
  l2_cache_size: {row.l2_cache}
  clock_rate_ghz: {row.clock}
  device_memory_size: {row.memory}
  cuda_compute_capability {{ major: {row.capability[0]} minor: {row.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  name: "NVIDIA {row.kind}"
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {row.kind}"
"""

EXTRA = "install the extra gpu-target (Linux on x86-64): pip install -e '.[train,gpu-target]'"


class Card(NamedTuple):
    """A GPU to compile for."""

    kind: str  # as the driver names it
    bandwidth: float  # of its memory, bytes/s
    target: str  # XLA's description

    def peak_flops(self, dtype: str) -> float | None:
        """Peak FLOP/s of products of a dtype; None if unknown."""
        return peak_flops(self.kind, dtype)


def peak_flops(kind: str, dtype: str) -> float | None:
    """The peak FLOP/s of a kind of device, or None if unknown."""
    kinds = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b(?! Ti| SUPER)", kind)]
    slower = re.search(r"Laptop|NVL", kind)  # variants under the same names
    return PEAK_FLOPS[kinds[0]][dtype] if kinds and not slower else None


def find_card(name: str) -> Card:
    """The card of a name, with or without its size, or of a target file.

    Raises ValueError if there is neither, or the file does not describe an NVIDIA GPU of compute
    capability 8.0 or higher.
    """
    known = {
        short: row for full, row in _TABLE.items() for short in (full, full.rpartition("-")[0])
    }
    if name in known:
        row = known[name]
        threads, shared, units = _ARCHITECTURES[row.capability]
        text = _TARGET.format(
            row=row, threads=threads, shared=shared, optin=shared - 1024, units=units
        )
        return Card(f"NVIDIA {row.kind}", row.bandwidth, text)
    if not Path(name).is_file():
        raise ValueError(f"--gpu {name!r}: expected one of {', '.join(CARDS)}, or a target file")
    return _read(name)


def _read(path: str) -> Card:
    text = Path(path).read_text("utf-8", errors="replace")
    fields = {
        "name": r'"([^"]+)"',
        "memory_bandwidth": r"(\d+)",
        "major": r"(\d+)",
        "device_memory_size": r"(\d+)",
    }
    found = {name: re.search(rf"\b{name}: *{value}", text) for name, value in fields.items()}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(
            f"--gpu {path!r}: the file has no {missing[0]}: expected XLA's GpuTargetConfigProto as "
            "text, with gpu_device_info"
        )
    kind, bandwidth, major, _ = (value[1] for value in found.values() if value)
    if int(major) < 8:
        raise ValueError(f"--gpu {path!r}: compute capability {major}: expected 8.0 or higher")
    return Card(kind, float(bandwidth), text)


def card_of_size(size: float) -> Card:
    """The smallest card of the table with at least `size` GiB.

    Raises ValueError if all are smaller.
    """
    sizes = {name: int(re.findall(r"(\d+)gb", name)[0]) for name in CARDS}
    name = min((name for name in CARDS if sizes[name] >= size), key=sizes.__getitem__, default=None)
    if name is None:
        raise ValueError(
            f"--card {size:g}: no card is as large: expected at most {max(sizes.values())} GiB"
        )
    return find_card(name)


def can_compile() -> bool:
    """Whether the wheels that compile for a GPU are installed."""
    return any(is_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def is_installed(module: str) -> bool:
    """Whether a module can be imported; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def devices(card: Card, count: int) -> list[jax.Device]:
    """A number of devices to compile programs for; no such GPU is needed.

    Raises ValueError if the wheels are not installed, or XLA refuses the target.
    """
    if not can_compile():
        raise ValueError(f"compiling for {card.kind} needs NVIDIA's compiler: {EXTRA}")
    if not os.environ.get("JAX_PLATFORMS"):
        # Leaves a GPU that is there to others, and the plugin accepts that none is there.
        jax.config.update("jax_platforms", "cpu")
    # XLA warns where a program takes more than a share of the card; the plan says what it takes.
    # The plugin reads this when it is loaded; JAX has set it to "1" unless a user did otherwise.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    try:
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=card.target, topology=f"1x1x{count}"
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"XLA refuses the target of {card.kind}: {reason}") from error
    return list(topology.devices)
