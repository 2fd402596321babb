"""Checks memory plans: planned peaks beside what processes really take, on this machine.

    python -m benchmarks.plan_holds

A process compiles the step and stores it; another loads it and runs three steps. The growth of its
resident memory since the step was loaded is compared with the plan's peak. (Compiling takes memory,
too, which is not the step's.)
"""

import dataclasses
import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.memory.plan import plan
from train.plan import programs_of


@dataclasses.dataclass(frozen=True)
class PlanHolds:
    """Plans and runs each model with each optimizer."""

    models: tuple[str, ...] = ("llama-60m", "llama-130m")
    """Models."""
    optimizers: tuple[str, ...] = ("adamw", "galore-adamw", "galore-adamw8bit")
    """Optimizers."""
    layerwise: tuple[bool, ...] = (False, True)
    """Whether to run ordinary steps, layer-wise ones or both."""
    batch_size: int = 8
    """Sequences of 256 tokens."""


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path) -> None:
    """In a process of its own: prints the peak of three steps, in bytes."""
    stored = pickle.loads((folder / "step").read_bytes())
    step = deserialize_and_load(*stored["step"])
    shapes = stored["shapes"]
    jax.block_until_ready(jnp.zeros(8) + 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident()
    # One by one, and without a program that would hold all of it twice.
    arrays = [jax.device_put(jnp.zeros(s, d), jax.devices()[0]) for s, d in shapes]
    state, batch = jax.tree.unflatten(stored["tree"], arrays)
    state = state._replace(key=jax.random.key(0))
    del arrays
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    print(_peak() - before)


def main(config: PlanHolds) -> None:
    """Prints a table in Markdown."""
    print("| model | optimizer | layer-wise | planned, MB | measured, MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for model in config.models:
        for optimizer in config.optimizers:
            for layerwise in config.layerwise:
                settings = Pretrain(
                    model=model,  # pyrefly: ignore
                    optimizer=optimizer,  # pyrefly: ignore
                    batch_size=config.batch_size,
                    layerwise=layerwise,
                )
                resolved = resolve(settings)
                programs = programs_of(resolved)
                step = programs.train_step.lower(programs.abstract, programs.batch).compile()
                planned = plan(resolved, programs, [step]).peak
                abstract = programs.abstract._replace(key=jax.ShapeDtypeStruct((), jnp.int32))  # pyrefly: ignore
                leaves, tree = jax.tree.flatten((abstract, programs.batch))
                with tempfile.TemporaryDirectory() as folder:
                    stored = {
                        "step": serialize(step),
                        "shapes": [(x.shape, x.dtype) for x in leaves],
                        "tree": tree,
                    }
                    (Path(folder) / "step").write_bytes(pickle.dumps(stored))
                    command = [sys.executable, "-m", "benchmarks.plan_holds", folder]
                    out = subprocess.run(command, check=True, capture_output=True, text=True)
                measured = int(out.stdout)
                print(
                    f"| {model} | {optimizer} | {'yes' if layerwise else 'no'} "
                    f"| {planned / 1e6:,.0f} | {measured / 1e6:,.0f} | {measured / planned:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        measure(Path(sys.argv[1]))
    else:
        import tyro

        main(tyro.cli(PlanHolds))
