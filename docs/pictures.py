"""Draws the documentation's pictures into this folder.

    python -m docs.pictures

The energies come from `subspaces.npz` in this folder, which `python -m benchmarks.subspaces` wrote.
The bytes are counted on abstract params, so that nothing of a model's size is allocated.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from galore_optax import galore_adafactor, galore_adamw, state_bytes
from models.llama import SIZES, dimension_numbers
from models.llama.config import Weight, weight_table
from train.config.defaults import DEFAULTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

HERE = Path(__file__).parent
INK, FAINT = "#1f2430", "#8a91a0"
FULL, SMALL, BASIS, WEIGHTS = "#c9ced8", "#d9622b", "#2f6fb0", "#e4e7ec"
METHODS = {  # from the names in `subspaces.npz` to label and colour
    "svd": ("exact SVD", INK),
    "randomized": ("randomized", SMALL),
    "power": ("power", BASIS),
    "random": ("random", FAINT),
}

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "text.color": INK,
        "mathtext.fontset": "cm",
        "savefig.dpi": 160,
        "savefig.bbox": "tight",
    }
)


def step() -> None:
    """Draws one step as a row of matrices, to scale: gradient, basis, R, N, update."""
    figure, axes = plt.subplots(figsize=(8.4, 2.2))
    n, m, r = 4.096, 11.008, 1.024
    x = 0.0

    def matrix(width: float, height: float, colour: str, label: str, shape: str, note: str) -> None:
        nonlocal x
        top = (n + height) / 2
        axes.add_patch(Rectangle((x, top - height), width, height, fc=colour, ec="white", lw=1.5))
        axes.text(x + width / 2, top + 0.5, label, size=12, ha="center")
        axes.text(x + width / 2, top + 2.2, shape, size=6.5, ha="center", color=FAINT)
        axes.text(x + width / 2, -0.5, note, size=8, ha="center", va="top")
        x += width

    def between(text: str, width: float) -> None:
        nonlocal x
        axes.text(x + width / 2, n / 2, text, size=9, ha="center", va="center", color=FAINT)
        x += width

    matrix(m, n, FULL, "$G$", "4096 x 11008", "gradient")
    between("→", 3.4)
    matrix(r, n, BASIS, "$P$", "4096 x 1024", "basis of\nthe subspace")
    between("$P^{T}G$ →", 5.2)
    matrix(m, r, SMALL, "$R$", "1024 x 11008", "the optimizer's\ngradient")
    between("inner →", 5.2)
    matrix(m, r, SMALL, "$N$", "1024 x 11008", "the optimizer's\nupdate")
    between("$PN$ →", 4.6)
    matrix(m, n, FULL, "$\\Delta W$", "4096 x 11008", "update of the\nwhole weight")
    axes.set(xlim=(-0.1, x + 0.1), ylim=(-3, n + 3), aspect="equal")
    axes.axis("off")
    figure.savefig(HERE / "step.png")
    plt.close(figure)


def energy() -> None:
    """Draws energy against rank, and the energy that new and old bases of one rank keep."""
    found = np.load(HERE / "subspaces.npz")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), width_ratios=(1, 1.15))
    steps, spectrum = found["steps"], found["spectrum"]
    shades = plt.get_cmap("Oranges")(np.linspace(0.35, 0.95, len(steps)))
    for at, line, shade in zip(steps, spectrum, shades, strict=True):
        left.plot(np.arange(1, len(line) + 1), line, color=shade, lw=1.6, label=f"{at}")
    left.set(
        title="Energy in the leading directions",
        xlabel=f"rank (width {spectrum.shape[1]})",
        xscale="log",
        ylim=(0, 1.02),
    )
    left.set_xticks(ticks := [1, 2, 4, 8, 16, 32, 64, 128], [f"{tick}" for tick in ticks])
    left.minorticks_off()
    left.legend(title="step", frameon=False, fontsize=8, title_fontsize=8, loc="lower right")
    j = int(np.argmin(np.abs(found["ranks"] - spectrum.shape[1] / 4)))
    kinds = {"this": "this\nbatch", "next": "the next\nbatch", "old": f"{steps[1]} steps\nlater"}
    for i, name in enumerate(found["methods"]):
        label, colour = METHODS[str(name)]
        # Without the first two stops, whose bases were found from nearly random weights.
        height = [np.nanmean(found[kind][2:, i, j, 0]) for kind in kinds]
        places = np.arange(len(kinds)) + 0.2 * (i - 1.5)
        right.bar(places, height, 0.18, color=colour, label=label)
        for place, value in zip(places, height, strict=True):
            right.text(place, value + 0.015, f"{value:.2f}", ha="center", size=6.5, color=colour)
    right.set(title=f"Energy kept by bases of rank {found['ranks'][j]}", ylim=(0, 1.12))
    right.set_xticks(range(len(kinds)), list(kinds.values()), color=INK)
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(HERE / "energy.png")
    plt.close(figure)


def bf16_params(size: str) -> Any:
    """A model's weights without their values."""
    return jax.tree.map(
        lambda weight: jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16),
        weight_table(SIZES[size]),
        is_leaf=lambda x: isinstance(x, Weight),
    )


def bytes_of(size: str) -> dict[str, dict[str, int]]:
    """Returns the bytes of a model's BF16 weights and of each optimizer's state."""
    params = bf16_params(size)
    rank = DEFAULTS[size]["rank"]
    common: dict[str, Any] = {"weight_dimension_numbers": dimension_numbers}
    optimizers = {
        "AdamW": optax.adamw(1e-3),
        "GaLore AdamW": galore_adamw(0.01, rank, **common),
        "GaLore AdamW, larger side": galore_adamw(0.01, rank, side="larger", **common),
        "GaLore AdamW, both sides": galore_adamw(0.01, rank, side="both", **common),
        "GaLore Adafactor": galore_adafactor(0.01, rank, momentum=0.9, **common),
    }
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return {
        name: {"weights": weights, **state_bytes(jax.eval_shape(tx.init, params))}
        for name, tx in optimizers.items()
    }


def memory() -> dict[str, dict[str, dict[str, int]]]:
    """Draws the bytes of weights and state by method and size, and returns them."""
    sizes = ("llama-60m", "llama-350m", "llama-1b", "llama-7b")
    counted = {size: bytes_of(size) for size in sizes}
    figure, row = plt.subplots(1, len(sizes), figsize=(8.4, 2.5), sharey=True)
    kinds = (
        ("weights", WEIGHTS),
        ("moments", SMALL),
        ("projections", BASIS),
    )  # as state_bytes says
    for axes, size in zip(row, sizes, strict=True):
        draw_bars(axes, counted[size], kinds)
        axes.set_title(f"{size}, GB")
    row[0].invert_yaxis()
    row[0].legend(
        labels=["weights", "moments", "bases"], ncols=3, frameon=False, fontsize=8,
        loc="upper left", bbox_to_anchor=(0, -0.12),
    )  # fmt: skip
    figure.savefig(HERE / "memory.png")
    plt.close(figure)
    return counted


def draw_bars(axes: Axes, methods: dict[str, dict[str, int]], kinds: tuple) -> None:
    """Draws a horizontal bar for each method, divided by kind, with its total in GB."""
    names = list(methods)
    start = np.zeros(len(names))
    for kind, colour in kinds:
        width = np.array([methods[name][kind] for name in names]) / 1e9
        axes.barh(names, width, 0.62, left=start, color=colour, label=kind)
        start += width
    for i, total in enumerate(start):
        axes.text(total + 0.02 * start.max(), i, f"{total:.2f}", va="center", size=7.5)
    axes.set(xticks=[], xlim=(0, 1.25 * start.max()), xlabel="")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)


if __name__ == "__main__":
    step()
    energy()
    for size, methods in memory().items():
        for method, parts in methods.items():
            figures = ", ".join(f"{kind} {n / 1e9:.3f}" for kind, n in parts.items())
            print(f"{size}, {method}: {figures} GB")
