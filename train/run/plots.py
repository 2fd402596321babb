"""Plots: the training and evaluation losses of a run, and the memory that runs will take."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def plot_loss(lines: Iterable[Mapping[str, Any]], path: Path, title: str, unit: str) -> None:
    """Plots the lines of `metrics.jsonl`: each step's loss, a smoothed curve, the evaluations."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = list(lines)
    train = np.array([(m["step"], m["loss"]) for m in lines if m.get("loss") is not None])
    evals = np.array([(m["step"], m["eval_loss"]) for m in lines if m.get("eval_loss") is not None])
    # Figure rather than pyplot: no global state, no display.
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if len(train):
        blue = {"color": "tab:blue"}
        axes.plot(*train.T, alpha=0.25, linewidth=0.8, label="training, each step", **blue)
        axes.plot(train[:, 0], smooth(train[:, 1]), label="training, smoothed", **blue)
    if len(evals):
        axes.plot(*evals.T, "o-", color="tab:orange", markersize=4, label="evaluation")
        above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{evals[-1][1]:.3f}", evals[-1], **above)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(train) or len(evals):
        axes.legend(frameon=False)
    figure.savefig(path)


def plot_plan(plans: Mapping[str, Mapping[str, int]], path: Path, title: str) -> None:
    """Plots several plans as stacked bars, from the bytes of each one's parts by name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.5 * len(plans)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(plans))
    for part in next(iter(plans.values())):
        sizes = np.array([parts[part] / 2**30 for parts in plans.values()])
        if sizes.max() > left.max() / 1000:
            axes.barh(list(plans), sizes, left=left, label=part)
        left += sizes
    beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    for i, peak in enumerate(left):
        axes.annotate(f"{peak:,.2f}", (peak, i), **beside)
    axes.set(xlabel="GiB", title=title, xlim=(0, 1.12 * left.max()))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(frameon=False, ncols=7, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path)


def check_picture(file: str, name: str) -> None:
    """Raises ValueError unless a picture can be written with the file's ending."""
    from matplotlib.backend_bases import FigureCanvasBase

    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(file).suffix[1:].lower() not in endings:
        raise ValueError(f"{name} {file!r}: expected a name that ends in .{', .'.join(endings)}")


def smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """The mean around each value, over a window of `share` of the length."""
    half = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.nancumsum(values)])
    counts = np.concatenate([[0], np.cumsum(~np.isnan(values))])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
