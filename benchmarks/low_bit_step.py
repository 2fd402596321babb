"""Time of an optimizer step with low-bit state, beside the same with float32 state.

    python -m benchmarks.low_bit_step --model llama-60m

All params of a model, float32, with embedding and head; steps of the sides in turns in one run,
none with a refresh. A step is `update` and `apply_updates` in one program that overwrites params
and state; with `--no-overwrite` it makes new ones, with `--no-apply` it is `update` alone. Ratios
are of medians.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import adamw8bit, galore_adamw, galore_adamw8bit
from models.llama.axes import dimension_numbers
from models.llama.config import SIZES, Weight, weight_table
from train.config.defaults import DEFAULTS


@dataclasses.dataclass(frozen=True)
class LowBitStep:
    """Times optimizer steps."""

    model: str = "llama-60m"
    """Model whose params are updated."""
    layers: int | None = None
    """Instead of the model's, to fit the memory."""
    rounds: int = 10
    """Steps of each side."""
    apply: bool = True
    """Whether the same program applies the updates, or returns them."""
    overwrite: bool = True
    """Whether the params, if they are applied to, and the state are donated."""


def main(config: LowBitStep) -> None:
    """Prints a table in Markdown."""
    size = SIZES[config.model]
    size = dataclasses.replace(size, layers=config.layers or size.layers)
    shapes = jax.tree.map(
        lambda weight: weight.shape, weight_table(size), is_leaf=lambda x: isinstance(x, Weight)
    )

    def tree(seed: int) -> Any:
        keys = iter(jax.random.split(jax.random.key(seed), 100))
        return jax.tree.map(
            lambda shape: 1e-3 * jax.random.normal(next(keys), shape),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    rank, where = DEFAULTS[config.model]["rank"], {"weight_dimension_numbers": dimension_numbers}
    never: dict[str, Any] = {"update_proj_gap": 1_000_000, **where}
    sides: dict[str, tuple[str, optax.GradientTransformation]] = {
        "AdamW": ("AdamW", optax.adamw(1e-3)),
        "AdamW, 8 bits": ("AdamW", adamw8bit(1e-3, weight_decay=1e-4)),
        "AdamW, 4 bits": ("AdamW", adamw8bit(1e-3, weight_decay=1e-4, bits=4)),
        "GaLore": ("GaLore", galore_adamw(1e-3, rank, **never)),
        "GaLore, 8 bits": ("GaLore", galore_adamw8bit(1e-3, rank, **never)),
        "GaLore, 8 bits, bases in 4": (
            "GaLore", galore_adamw8bit(1e-3, rank, projection_bits=4, **never),
        ),
    }  # fmt: skip
    grads, steps, states, temporaries = tree(1), {}, {}, {}
    for name, (_, tx) in sides.items():

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates) if config.apply else updates), state

        params = tree(0)
        state = jax.jit(tx.init)(params)
        given = ((0, 1) if config.apply else (1,)) if config.overwrite else ()
        lowered = jax.jit(step, donate_argnums=given).lower(params, state, grads)
        steps[name] = lowered.compile()
        temporaries[name] = steps[name].memory_analysis().temp_size_in_bytes
        states[name] = params, state

    def take(name: str) -> None:
        params, state = states[name]
        new, state = jax.block_until_ready(steps[name](params, state, grads))
        states[name] = (new if config.apply else params), state

    seconds = {name: [] for name in sides}
    for turn in range(2 + config.rounds):  # the first steps find the bases
        for name in sides:
            start = time.perf_counter()
            take(name)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    held = {name: sum(x.nbytes for x in jax.tree.leaves(s[1])) for name, s in states.items()}
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    weights = sum(x.size for x in jax.tree.leaves(grads))
    print(
        f"{config.model}, {size.layers} layers, {weights:,} params, float32, jax {jax.__version__}"
    )
    print("| | median, ms | to the float32 state's | state, MB | temporaries, MB |")
    print("| --- | --- | --- | --- | --- |")
    for name, (reference, _) in sides.items():
        ratio = medians[name] / medians[reference]
        print(
            f"| {name} | {1e3 * medians[name]:.0f} | {ratio:.2f} | {held[name] / 1e6:.1f} "
            f"| {temporaries[name] / 1e6:.0f} |"
        )
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(states["GaLore, 8 bits"][0]))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(LowBitStep))
