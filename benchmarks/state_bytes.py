"""Bytes of weights and optimizer states at the papers' sizes, beside the papers' figures.

    python -m benchmarks.state_bytes

Measured from the shapes that the transformations themselves give (`jax.eval_shape`): nothing is
allocated. Weights are bfloat16, or in groups of INT8 with Q-GaLore. GB is 1e9 bytes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import (
    adamw8bit,
    galore_adamw,
    galore_adamw8bit,
    q_galore_adamw8bit,
)
from galore_optax.memory import state_bytes, tree_bytes
from models.llama.axes import dimension_numbers
from models.llama.config import SIZES, Weight, weight_table
from train.config.defaults import DEFAULTS
from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.config.weights import stored_weights

# Weights and states of the papers' tables in GB, by method and model.
PAPER = {
    "Adam": {"llama-60m": 0.36, "llama-130m": 0.76, "llama-350m": 2.06, "llama-1b": 7.80},
    "GaLore": {"llama-60m": 0.24, "llama-130m": 0.52, "llama-350m": 1.22, "llama-1b": 4.38},
    "Q-GaLore": {"llama-60m": 0.18, "llama-130m": 0.39, "llama-350m": 0.88, "llama-1b": 3.08},
}


def params_of(model: str) -> Any:
    """Shapes of a model's weights in bfloat16."""
    return jax.tree.map(
        lambda weight: jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16),
        weight_table(SIZES[model]),
        is_leaf=lambda x: isinstance(x, Weight),
    )


def quantized(params: Any) -> Any:
    """The params with the projected matrices in INT8, as in Q-GaLore."""
    config = resolve(Pretrain(optimizer="q-galore-adamw8bit"))
    key = jax.random.key(0)
    return jax.eval_shape(lambda p: stored_weights(config, p, dimension_numbers, key), params)


def methods(rank: int) -> dict[str, optax.GradientTransformation]:
    """The methods by name; the last ones have INT8 weights."""
    where: dict[str, Any] = {"weight_dimension_numbers": dimension_numbers}
    return {
        "Adam": optax.adam(1e-3),
        "8-bit Adam": adamw8bit(1e-3),
        "4-bit Adam": adamw8bit(1e-3, bits=4),
        "GaLore": galore_adamw(1e-3, rank, **where),
        "8-bit GaLore": galore_adamw8bit(1e-3, rank, **where),
        "8-bit GaLore, INT4 P": galore_adamw8bit(1e-3, rank, projection_bits=4, **where),
        "Q-GaLore": q_galore_adamw8bit(1e-3, rank, **where),
        "Q-GaLore, 4-bit moments": q_galore_adamw8bit(1e-3, rank, bits=4, **where),
    }


def main() -> None:
    print(
        f"{'model':11}{'method':25}{'weights':>9}{'bases':>9}{'moments':>9}{'sum':>9}"
        f"{'paper':>7}{'states of BF16 Adam':>21}"
    )
    for model in [*PAPER["Adam"], "llama-7b"]:
        params = params_of(model)
        adam = None
        for name, tx in methods(DEFAULTS[model]["rank"]).items():
            held = quantized(params) if name.startswith("Q-") else params
            weights = tree_bytes(held)
            kinds = state_bytes(jax.eval_shape(tx.init, held))
            states = sum(kinds.values())
            adam = adam or states
            parts = (weights, kinds["projections"], kinds["moments"], weights + states)
            figures = "".join(f"{part / 1e9:9.3f}" for part in parts)
            paper = PAPER.get(name, {}).get(model, "")
            print(f"{model:11}{name:25}{figures}{paper:>7}{states / adam:>20.1%}")


if __name__ == "__main__":
    main()
