"""Whole training steps of `train.pretrain` with one flag or another, in turns in one process.

    python -m benchmarks.training_step --sides GaLore "8-bit GaLore"

Ids are random and no step looks for a new subspace. Ratios of medians are to the first side.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np

from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.plan import programs_of
from train.step.mesh import make_mesh, put_batch

_GALORE = {"optimizer": "galore-adamw", "update_proj_gap": 1_000_000}
_BY_LAYERS = {**_GALORE, "layerwise": True}
SIDES: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "8-bit AdamW": {"optimizer": "adamw8bit"},
    "GaLore": _GALORE,
    "8-bit GaLore": {**_GALORE, "optimizer": "galore-adamw8bit"},
    "Q-GaLore": {**_GALORE, "optimizer": "q-galore-adamw8bit"},
    "GaLore, layer-wise": _BY_LAYERS,
    "GaLore, layer-wise, clip previous": {**_BY_LAYERS, "clip": "previous"},
    "Q-GaLore, layer-wise, clip previous": {
        **_BY_LAYERS, "clip": "previous", "optimizer": "q-galore-adamw8bit",
    },
    "GaLore, microbatches": {**_GALORE, "accumulate": 4},
    "GaLore, microbatches in the subspace": {
        **_GALORE, "accumulate": 4, "accumulate_in_subspace": True,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """Times training steps."""

    sides: tuple[Literal[tuple(SIDES)], ...] = tuple(SIDES)  # pyrefly: ignore
    """Sides to compare."""
    model: str = "llama-60m"
    """Model to train."""
    batch_size: int = 4
    """Sequences per step: one microbatch, unless a side has four."""
    seq_len: int = 256
    """Tokens in a sequence."""
    rounds: int = 6
    """Steps of each side, after one that is not counted."""


def batch_of(ids: np.ndarray, batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    """Rows of tokens, and what follows each, as one document; of `batch_size * seq_len + 1` ids."""
    shape = batch_size, seq_len
    return {
        "inputs": ids[:-1].reshape(shape),
        "targets": ids[1:].reshape(shape),
        "positions": np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def main(config: TrainingStep) -> None:
    """Prints a table in Markdown."""
    shape = config.batch_size, config.seq_len
    common: dict[str, Any] = {
        "model": config.model, "batch_size": shape[0], "seq_len": shape[1], "accumulate": 1,
    }  # fmt: skip
    steps, states, temporaries = {}, {}, {}
    for name in config.sides:
        programs = programs_of(resolve(Pretrain(**{**common, **SIDES[name]})))
        steps[name] = programs.train_step.lower(programs.abstract, programs.batch).compile()
        states[name] = programs.init(jax.random.key(0))
        temporaries[name] = steps[name].memory_analysis().temp_size_in_bytes
    ids = np.random.default_rng(0).integers(256, size=shape[0] * shape[1] + 1, dtype=np.int32)
    batch = put_batch(make_mesh(None), batch_of(ids, *shape))
    seconds = {name: [] for name in config.sides}
    for _ in range(config.rounds + 1):
        for name in config.sides:
            start = time.perf_counter()
            states[name], metrics = steps[name](states[name], batch)
            jax.block_until_ready(metrics)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    print(f"{config.model}, {shape[0]} x {shape[1]} tokens, float32, jax {jax.__version__}")
    print("| | a step, s | tokens/s | time to the first | temporaries, MB |")
    print("| --- | --- | --- | --- | --- |")
    for name, median in medians.items():
        print(
            f"| {name} | {median:.3f} | {shape[0] * shape[1] / median:,.0f} "
            f"| {median / medians[config.sides[0]]:.2f} | {temporaries[name] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(TrainingStep))
