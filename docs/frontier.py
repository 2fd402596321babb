"""Draws README's picture: perplexity against bytes of the optimizer's state.

    python -m docs.frontier

Perplexities are those of `benchmarks/records/quality.jsonl`, which `python -m benchmarks.quality
--records` writes. Bytes are counted on the abstract params of the 1B model, at the paper's rank.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path

import jax
import tyro

from benchmarks.quality import METHODS, run_name
from benchmarks.runs import read_records
from docs.pictures import FAINT, HERE, INK, SMALL, bf16_params, plt
from galore_optax import state_bytes
from train.config.optimizers import OPTIMIZERS, make_recipe
from train.config.resolve import resolve
from train.config.settings import Pretrain

RECORDS = HERE.parent / "benchmarks" / "records" / "quality.jsonl"


def gigabytes(flags: tuple[str, ...]) -> float:
    """The GB of an optimizer's state for the 1B model, all floats in BF16."""
    config = tyro.cli(Pretrain, args=["--model", "llama-1b", "--dtype", "bfloat16", *flags])
    if "state_dtype" in OPTIMIZERS[config.optimizer].options and config.moment_bits is None:
        config = dataclasses.replace(config, state_dtype="bfloat16")
    state = jax.eval_shape(make_recipe(resolve(config)).init, bf16_params("llama-1b"))
    return sum(state_bytes(state).values()) / 1e9


def perplexities(records: Path) -> dict[str, list[float]]:
    """Those of each method by seed, at the learning rate that is best with seed 0."""
    found = {r["name"]: r["summary"]["eval_perplexity"] for r in read_records(records)}
    best: dict[str, list[float]] = {}
    for method, (_, rates) in METHODS.items():
        if "," in method:  # without its parts, or with other settings
            continue
        tried = {r: found[name] for r in rates if (name := run_name(method, r, 0)) in found}
        if tried:
            rate = min(tried, key=tried.__getitem__)
            names = (run_name(method, rate, seed) for seed in itertools.count())
            best[method] = [found[x] for x in itertools.takewhile(found.__contains__, names)]
    return best


def main() -> None:
    """Draws all methods, and a line through those that no other beats in both."""
    found = perplexities(RECORDS)
    sizes = {name: gigabytes(METHODS[name][0]) for name in found}
    means = {name: statistics.fmean(x) for name, x in found.items()}
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    ahead = [
        x for x in found if not any(sizes[y] <= sizes[x] and means[y] < means[x] for y in found)
    ]
    line = sorted((sizes[name], means[name]) for name in ahead)
    axes.plot(*zip(*line, strict=True), color=FAINT, lw=1, drawstyle="steps-post", zorder=0)
    named: list[tuple[float, float]] = []  # where names are
    for name in sorted(found, key=means.__getitem__, reverse=True):
        size, values, colour = sizes[name], found[name], SMALL if name in ahead else INK
        spread = statistics.stdev(values) if len(values) > 1 else 0
        axes.errorbar(size, means[name], yerr=spread, fmt="o", ms=5, capsize=3, color=colour)
        beside = [height for at, height in named if 0.8 < at / size < 1.25]
        named.append((size, min([means[name], *(height - 0.09 for height in beside)])))
        above = (8, 3 if name in ahead else -3)  # the line
        axes.annotate(name, named[-1], above, textcoords="offset points", size=8, color=colour)
    axes.set(
        xlabel="optimizer state of a 1B LLaMA, GB",
        ylabel="perplexity per byte of a small model",
        xscale="log",
    )
    axes.set_xticks(ticks := [0.125, 0.25, 0.5, 1, 2, 4, 8], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.15)
    figure.savefig(HERE / "frontier.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
