"""What GPUs would run: bytes moved, kernels, least time and memory of compiled programs.

    python -m benchmarks.gpu_program                       # the whole table, some ten minutes
    python -m benchmarks.gpu_program --rows step-galore step-adamw

No GPU is needed: XLA compiles for a card that is not there (the extra gpu-target).
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from galore_optax import (
    GaLoreDimensionNumbers,
    adamw8bit,
    alice,
    apollo_adamw,
    apollo_mini_adamw,
    fira_adamw,
    galore_adamw,
    galore_adamw8bit,
    muon,
    racs,
    scale_sgd,
    state_bytes,
)
from models.llama.config import SIZES
from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.memory.cards import devices, find_card
from train.memory.fit import RECIPES
from train.memory.program import count
from train.plan import planned

_MATRICES = {"weight_dimension_numbers": GaLoreDimensionNumbers(-2, -1)}
_B1 = {"model": "llama-1b", "dtype": "bfloat16", "optimizer": "galore-adamw"}
_B7 = {"model": "llama-7b", "dtype": "bfloat16", "layerwise": True}
_Q_GALORE = {**_B7, "optimizer": "q-galore-adamw8bit"}
_8BIT = {**_B7, "optimizer": "galore-adamw8bit"}
_MESH = {**_B1, "batch_size": 128, "mesh": "data=2,fsdp=4"}


class Optimizer(NamedTuple):
    """A step of an optimizer on the matrices of a model's layers, all of them in bfloat16."""

    model: str
    make: Callable[[], Any]
    refreshes: bool = False  # whether the refresh of all matrices is counted, and nothing else


# By name: the card, and an optimizer's step or the flags of a training step.
ROWS: Mapping[str, tuple[str, Optimizer | Mapping[str, Any]]] = {
    "step-adamw": ("h100", Optimizer("llama-1b", lambda: optax.adamw(1e-3))),
    "step-galore": ("h100", Optimizer("llama-1b", lambda: galore_adamw(1e-2, 512, **_MATRICES))),
    "step-galore8bit": (
        "h100",
        Optimizer("llama-1b", lambda: galore_adamw8bit(1e-2, 512, **_MATRICES)),
    ),
    "step-fira": ("h100", Optimizer("llama-1b", lambda: fira_adamw(1e-2, 512, **_MATRICES))),
    "step-apollo": ("h100", Optimizer("llama-1b", lambda: apollo_adamw(1e-2, 512, **_MATRICES))),
    "step-apollo-mini": (
        "h100",
        Optimizer("llama-1b", lambda: apollo_mini_adamw(1e-2, **_MATRICES)),
    ),
    "step-alice": ("h100", Optimizer("llama-1b", lambda: alice(1e-2, 512, **_MATRICES))),
    "step-alice-0": (
        "h100",
        Optimizer("llama-1b", lambda: alice(1e-2, 512, tracking=0, **_MATRICES)),
    ),
    "step-racs": ("h100", Optimizer("llama-1b", lambda: racs(1e-2, **_MATRICES))),
    "step-scale": ("h100", Optimizer("llama-1b", lambda: scale_sgd(1e-2, False, **_MATRICES))),
    "step-muon8bit": ("h100", Optimizer("llama-1b", lambda: muon(1e-2, bits=8, **_MATRICES))),
    "step-muon4bit": ("h100", Optimizer("llama-1b", lambda: muon(1e-2, bits=4, **_MATRICES))),
    "step-adamw8bit": ("h100", Optimizer("llama-1b", lambda: adamw8bit(1e-3))),
    "refresh-7b": (
        "h100",
        Optimizer("llama-7b", lambda: galore_adamw(1e-2, 1024, **_MATRICES), refreshes=True),
    ),
    "7b-q-galore-batch-1": ("rtx-4090", {**_Q_GALORE, "clip": "previous", "batch_size": 1}),
    "7b-galore8bit-batch-16": ("rtx-4090", {**_8BIT, "clip": "previous", "batch_size": 16}),
    "1b-galore-batch-16": ("h100", {**_B1, "batch_size": 16}),
    "memory-galore8bit-batch-16": ("rtx-4090", {**_8BIT, "batch_size": 16}),
    "memory-q-galore-batch-16": ("rtx-4090", {**_Q_GALORE, "batch_size": 16}),
    "memory-q-galore-batch-1": ("rtx-4090", {**_Q_GALORE, "batch_size": 1}),
    "memory-12gb": ("rtx-3060", {**_B7, **RECIPES["12 GB card"], "batch_size": 1}),
    "memory-10gb": ("rtx-3080", {**_B7, **RECIPES["10 GB card"], "batch_size": 1}),
    "mesh-ordinary": ("h100", _MESH),
    "mesh-layerwise": ("h100", {**_MESH, "layerwise": True}),
}


@dataclasses.dataclass(frozen=True)
class GpuProgram:
    """Compiles programs for GPUs that need not be there, and prints what they do."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Names of rows; all by default."""


def matrices(model: str, at: SingleDeviceSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """The matrices of all layers (layer, in, out) in bfloat16."""
    size = SIZES[model]
    width, mlp = size.width, size.mlp_width
    shapes = {name: (width, width) for name in ("query", "key", "value", "out")}
    shapes |= {"gate": (width, mlp), "up": (width, mlp), "down": (mlp, width)}
    return {
        name: jax.ShapeDtypeStruct((size.layers, *shape), jnp.bfloat16, sharding=at)
        for name, shape in shapes.items()
    }


def optimizer_step(card_name: str, row: Optimizer) -> dict[str, Any]:
    """Compiles an optimizer's step; what it does, and the bytes that it cannot but move."""
    card = find_card(card_name)
    at = SingleDeviceSharding(devices(card, 1)[0])
    params, tx = matrices(row.model, at), row.make()

    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, jax.tree.map(lambda x: x.update(sharding=None), params))
    state = jax.tree.map(lambda x: x.update(sharding=at), state)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    text, peak = compiled.as_text() or "", card.peak_flops("bfloat16")
    memory = compiled.memory_analysis()
    assert peak is not None
    assert memory is not None
    done = count(text, card.bandwidth, peak)
    found = {"memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes}
    if row.refreshes:
        dear = count(text, card.bandwidth, peak, max)
        return {**found, **dear.and_then(done, -1).as_json()}
    weights = sum(x.size * x.dtype.itemsize for x in params.values())
    least = 3 * weights + 2 * sum(state_bytes(state).values())
    return {**found, **done.as_json(), "share": done.bytes_moved / least}


def training_step(card: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles a training step; what it does, and the memory of a device."""
    plan, done = planned(resolve(Pretrain(accumulate=1, **flags)), find_card(card))
    return {**done, "memory": plan.peak}


def line(name: str, card: str, found: Mapping[str, Any], seconds: float) -> str:
    """A row of the table in Markdown."""
    sent = ", ".join(
        f"{kind} {x['count']:,} ({x['bytes'] / 1e9:.2f} GB)"
        for kind, x in found["collectives"].items()
    )
    cells = (
        name,
        card,
        f"{found['bytes_moved'] / 1e9:.1f}",
        f"{found['share']:.2f}" if "share" in found else "",
        f"{found['kernels']:,}",
        f"{found['floor_seconds'] * 1e3:.1f}",
        f"{found['products_flops'] / 1e12:.2f}",
        f"{found['memory'] / 1e9:.2f}",
        f"{seconds:.0f}",
        sent,
    )
    return f"| {' | '.join(cells)} |"


def main(config: GpuProgram) -> None:
    """Prints a table in Markdown."""
    unknown = [name for name in config.rows if name not in ROWS]
    if unknown:
        raise SystemExit(f"--rows {unknown[0]!r}: expected names of {', '.join(ROWS)}")
    head = (
        "program,card,moved GB,of the least,kernels,at least ms,TFLOP,memory GB,compiled in s,sent"
    )
    names = head.split(",")
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}", flush=True)
    for name in config.rows:
        card, row = ROWS[name]
        start = time.perf_counter()
        if isinstance(row, Optimizer):
            found = optimizer_step(card, row)
        else:
            found = training_step(card, row)
        print(line(name, card, found, time.perf_counter() - start), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    import tyro

    main(tyro.cli(GpuProgram))
