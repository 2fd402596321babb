"""Finds the 4-bit codes that change Adam's update least, on the moments of a LLaMA in training.

    python -m benchmarks.four_bit_codes

Trains `tiny` for some steps, quantizes the moments and prints the relative change of the update,
‖u' - u‖ / ‖u‖ with u = m / (√v + eps), over all moments of 4,096 elements and more; and the largest
element of u', which shows second moments that were rounded down too far.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax.quantization.array import quantize
from galore_optax.quantization.codes import Code, Dynamic, Table
from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.run.assemble import assemble
from train.step.mesh import put_batch


@dataclasses.dataclass(frozen=True)
class FourBitCodes:
    """Trains and compares."""

    optimizers: tuple[str, ...] = ("galore-adamw", "adamw")
    """Optimizers whose moments are quantized."""
    steps: int = 160
    """Steps of training before the moments are read."""


def candidates() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Magnitudes above zero of signed (8) and unsigned (15) codes."""
    eight, fifteen = np.arange(1, 9) / 8, np.arange(1, 16) / 15
    dynamic = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]  # 3 decades of bnb's
    signed = {
        "linear": eight,
        "power 1.5": eight**1.5,
        "squares": eight**2,
        "cubes": eight**3,
        "dynamic": np.array(dynamic),
    }
    unsigned = {
        "linear": fifteen,
        "squares": fifteen**2,
        "fourth powers": fifteen**4,
        "geometric from 1e-3": 10 ** np.linspace(-3, 0, 15),
        "geometric from 1e-4": 10 ** np.linspace(-4, 0, 15),
        "geometric from 1e-6": 10 ** np.linspace(-6, 0, 15),
    }
    return signed, unsigned


def table(magnitudes: np.ndarray, signed: bool) -> Table:
    """The code of these magnitudes; the largest only without a sign."""
    positive = magnitudes.tolist()
    negative = [-x for x in positive[-2::-1]] if signed else []
    return Table((*negative, 0.0, *positive))


def moments(config: FourBitCodes, optimizer: str) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs of first and second moments, stacks by matrix."""
    settings = Pretrain(optimizer=optimizer, data_parts=1)  # pyrefly: ignore
    parts = assemble(resolve(settings), lambda _: None)
    state = parts.init(jax.random.key(0))
    for step, (batch, _) in enumerate(parts.data.batches()):
        if step == config.steps:
            break
        state, _ = parts.train_step(state, put_batch(parts.mesh, batch))
    mu, nu = (jax.tree.leaves(optax.tree.get(state.optimizer, name)) for name in ("mu", "nu"))
    return [(m, v) for m, v in zip(mu, nu, strict=True) if m.size >= 4096]


def change(
    pairs: list[tuple[jax.Array, jax.Array]],
    first: Code | None,
    second: Code | None,
    block: int,
    axis: int | None = None,
) -> tuple[float, float]:
    """Relative change of the update, and its largest element."""
    squares, total, largest = 0.0, 0.0, 0.0
    for m, v in pairs:
        held_m = m if first is None else quantize(m, first, block=block, axis=axis).dequantize()
        held_v = v if second is None else quantize(v, second, block=block, axis=axis).dequantize()
        exact, held = (a / (jnp.sqrt(b) + 1e-8) for a, b in ((m, v), (held_m, held_v)))
        squares += float(jnp.sum((held - exact) ** 2))
        total += float(jnp.sum(exact**2))
        largest = max(largest, float(jnp.max(jnp.abs(held))))
    return (squares / total) ** 0.5, largest


def main(config: FourBitCodes) -> None:
    """Prints a table in Markdown for each optimizer."""
    signed, unsigned = candidates()
    for optimizer in config.optimizers:
        pairs = moments(config, optimizer)
        rows: dict[str, tuple[Code | None, Code | None, int]] = {
            "exact": (None, None, 128),
            "8 bits": (Dynamic(True), Dynamic(False), 256),
        }
        rows |= {f"m {name}": (table(x, True), None, 128) for name, x in signed.items()}
        rows |= {f"v {name}": (None, table(x, False), 128) for name, x in unsigned.items()}
        chosen = table(signed["squares"], True), table(unsigned["geometric from 1e-4"], False)
        rows["both as chosen"] = (*chosen, 128)
        print(f"\n| {optimizer} | change of the update | largest element |\n| --- | --- | --- |")
        for name, codes in rows.items():
            error, largest = change(pairs, *codes)
            print(f"| {name} | {error:.4f} | {largest:.1f} |", flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(FourBitCodes))
