"""Perplexity with bfloat16 weights, moments and products, over several seeds.

    python -m benchmarks.bfloat16 --out FILE
    python -m benchmarks.bfloat16 --out FILE2 --optimizers adamw --steps 1500 --batch-size 1

Trains `tiny` on the built-in text as `python -m train.pretrain` does, with the same settings but
for optimizer and row of the table. A seed sets the weights and the order of the data, the same for
every row. Perplexities are kept in FILE, which is for one length of the runs, and not computed
again.
"""

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import jax

from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.memory.plan import stored
from train.run.assemble import TextParts, assemble
from train.step.mesh import put_batch

_BF16 = {"dtype": "bfloat16"}
_NEAREST = {**_BF16, "stochastic_rounding": False}
# Settings of the rows, of optimizers whose moments are floats and of the 8-bit ones.
FLOATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "moments bfloat16, weights to nearest (published)": {**_NEAREST, "state_dtype": "bfloat16"},
    "moments bfloat16, weights at random": {**_BF16, "state_dtype": "bfloat16"},
    "moments float32, weights to nearest": _NEAREST,
    "moments float32, weights at random (default)": _BF16,
    "moments and weights float32": {**_BF16, "weight_dtype": "float32"},
}
EIGHT_BITS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "weights to nearest (published)": _NEAREST,
    "weights at random (default)": _BF16,
    "weights float32": {**_BF16, "weight_dtype": "float32"},
}


@dataclasses.dataclass(frozen=True)
class BFloat16:
    """Trains each variant of each optimizer with each seed and prints a table."""

    out: Path
    """File of results (JSON)."""
    optimizers: tuple[str, ...] = ("galore-adamw", "adamw")
    """Optimizers of the table."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    steps: int = 600
    """Steps of every run."""
    batch_size: int = 2
    """Sequences of 128 tokens in a step."""
    eval_tokens: int = 30_000
    """Validation tokens."""


def perplexity(step: Any, parts: TextParts, first: TextParts, seed: int, steps: int) -> float:
    """Of one run on the data of `parts`, with the programs of `first`."""
    state = first.init(jax.random.key(seed))
    for i, (batch, _) in enumerate(parts.data.batches()):
        state, told = step(state, put_batch(first.mesh, batch))
        jax.block_until_ready(told)
        if i + 1 == steps:
            break
    sums = [first.eval_step(state.params, put_batch(first.mesh, x)) for x in parts.evaluation]
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    return math.exp(sum(losses) / sum(tokens))


def row(config: BFloat16, optimizer: str, name: str, variant: dict[str, Any], done: dict) -> None:
    """Adds the missing seeds of one row to `done`, and writes them to the file.

    SystemExit if those that are there have other settings.
    """
    key = f"{optimizer} | {name}"
    common = {k: getattr(config, k) for k in ("steps", "batch_size", "eval_tokens")}
    own = done.setdefault(key, {"perplexity": {}, "settings": common})
    if own.get("settings", common) != common:  # files of before have none
        raise SystemExit(f"--out {config.out} has runs with {own['settings']}: name another file")
    missing = [seed for seed in config.seeds if str(seed) not in own["perplexity"]]
    first = step = None
    for seed in missing:
        settings = Pretrain(optimizer=optimizer, seed=seed, **common, **variant)  # pyrefly: ignore
        # The order of the text in which the seeds of before were trained.
        settings = dataclasses.replace(settings, data_parts=1)
        parts = assemble(resolve(settings), lambda _: None)
        if first is None:  # compiled once: GaLore's own random choices are the first seed's
            first = parts
            step = parts.train_step.lower(parts.abstract, parts.batch).compile()
            weights, states = stored(parts)
            own |= {"weights": weights, "states": sum(states.values())}
        own["perplexity"][str(seed)] = perplexity(step, parts, first, seed, config.steps)
        print(key, seed, own["perplexity"][str(seed)], file=sys.stderr, flush=True)
        config.out.write_text(json.dumps(done, indent=1))


def main(config: BFloat16) -> None:
    """Runs the missing ones and prints a table in Markdown."""
    done = json.loads(config.out.read_text()) if config.out.exists() else {}
    print("| | perplexity by seed | mean | to float32 | states, bytes | weights, bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for optimizer in config.optimizers:
        reference = 0.0
        for name, variant in (EIGHT_BITS if "8bit" in optimizer else FLOATS).items():
            row(config, optimizer, name, variant, done)
            own = done[f"{optimizer} | {name}"]
            by_seed = [own["perplexity"][str(seed)] for seed in config.seeds]
            mean = statistics.mean(by_seed)
            reference = reference or mean
            print(
                f"| `{optimizer}`, {name} | {', '.join(f'{p:.3f}' for p in by_seed)} | {mean:.3f} "
                f"| {mean / reference - 1:+.1%} | {own['states']:,} | {own['weights']:,} |",
                flush=True,
            )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BFloat16))
