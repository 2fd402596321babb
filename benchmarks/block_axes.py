"""Change of Adam's update when the moments are quantized in blocks along either axis of a matrix.

    python -m benchmarks.block_axes --run DIR

DIR is a run of `python -m train.pretrain` with Adam's moments in float32; its last checkpoint is
read. Prints ‖u' - u‖ / ‖u‖ with u = m / (√v + eps), for one matrix of each kind.
"""

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint

from benchmarks.four_bit_codes import change
from galore_optax.quantization.state import CODES


@dataclasses.dataclass(frozen=True)
class BlockAxes:
    """Reads moments and quantizes them."""

    run: Path
    """Folder of a run."""
    layer: int = 3
    """Layer whose matrices of each stack are quantized."""


def main(config: BlockAxes) -> None:
    """Prints a table in Markdown."""
    last = max((config.run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of where the arrays were, which does not matter here
        state = orbax.checkpoint.PyTreeCheckpointer().restore(last.absolute() / "rest")["optimizer"]
    columns = [(bits, axis) for bits in CODES for axis in (-1, -2)]
    print("| matrix |", " | ".join(f"{bits} bits, axis {axis}" for bits, axis in columns), "|")
    print("| --- " * (len(columns) + 1) + "|")
    moments = (jax.tree.leaves_with_path(optax.tree.get(state, name)) for name in ("mu", "nu"))
    for (path, m), (_, v) in zip(*moments, strict=True):
        layer = getattr(path[-1], "idx", config.layer)  # stacks are held apart, or whole
        if m.ndim < 2 or m.size < 4096 or layer != config.layer:
            continue
        if m.ndim == 3:
            m, v = m[layer], v[layer]
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        pair = jnp.asarray(m), jnp.asarray(v)
        changes = [f"{change([pair], *CODES[bits], axis)[0]:.3f}" for bits, axis in columns]
        print(f"| {name} {m.shape} |", " | ".join(changes), "|", flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BlockAxes))
