"""How long XLA compiles the update of a model that is a list of layers.

Each layer has the seven matrices of a LLaMA, each a leaf of its own; 32 layers are those of 7B. The
time does not depend on the width, but a refresh of small matrices is compiled in less memory.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from galore_optax import galore, galore_adamw8bit

SIDES = {
    "optax.adamw": lambda: optax.adamw(1e-2),
    "optax.contrib.galore": lambda: contrib.galore(1e-2, rank=16),
    "GaLore": lambda: galore(16, optax.adamw(1e-2)),
    "GaLore, svd": lambda: galore(16, optax.adamw(1e-2), subspace="svd"),
    "8-bit GaLore": lambda: galore_adamw8bit(1e-2, 16),
}


def seconds(tx: optax.GradientTransformation, layers: int) -> float:
    """From a traced update to its compiled program, tracing included."""
    names = ("query", "key", "value", "out"), ("gate", "up"), ("down",)
    shapes = (64, 64), (64, 172), (172, 64)
    layer = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for group, shape in zip(names, shapes, strict=True)
        for name in group
    }
    params = [layer] * layers
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    jax.jit(tx.update).lower(params, state, params).compile()
    return time.perf_counter() - start


def main() -> None:
    """Prints a table, one row for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    args = parser.parse_args()
    heads = ["seconds", *(f"{7 * n} matrices" for n in args.layers)]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for side in args.sides:
        row = [f"{seconds(SIDES[side](), n):.1f}" for n in args.layers]
        print(f"| {side} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
