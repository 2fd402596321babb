"""Plots: the training and evaluation losses of a run, and the memory that runs will take."""

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from train.memory.units import unit_of


@contextmanager
def picture(path: Path, size: tuple[float, float], title: str = "", width: int = 75) -> Iterator:
    """A figure of some inches, which is written at the end, with a title in lines of a `width`.

    The user's settings of matplotlib are not used: LaTeX may be missing, for instance.
    """
    _without_backend_of_others()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Figure rather than pyplot: no global state, no display.
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        yield figure
        if title:  # with names of folders: a $ begins no formula
            figure.suptitle(textwrap.fill(title, width), parse_math=False)
        figure.savefig(path)


def _without_backend_of_others() -> None:
    """Has matplotlib, once it is imported, not look for the backend that a notebook names.

    Commands of a notebook inherit its MPLBACKEND, and this environment may lack that package.
    """
    if os.environ.get("MPLBACKEND", "").startswith("module://"):
        os.environ["MPLBACKEND"] = "agg"


def plot_loss(lines: Iterable[Mapping[str, Any]], path: Path, title: str, unit: str) -> None:
    """Plots the lines of `metrics.jsonl`: each step's loss, a smoothed curve, the evaluations."""
    lines = list(lines)
    train = np.array([(m["step"], m["loss"]) for m in lines if m.get("loss") is not None])
    evals = np.array([(m["step"], m["eval_loss"]) for m in lines if m.get("eval_loss") is not None])
    with picture(path, (8, 4.8), title) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        if len(train):
            blue = {"color": "tab:blue"}
            axes.plot(*train.T, alpha=0.25, linewidth=0.8, label="training, each step", **blue)
            axes.plot(train[:, 0], smooth(train[:, 1]), label="training, smoothed", **blue)
        if len(evals):
            axes.plot(*evals.T, "o-", color="tab:orange", markersize=4, label="evaluation")
            beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            last, at_the_edge = evals[-1][1], ("axes fraction", "data")
            axes.annotate(f"{last:.4g}", (1, last), xycoords=at_the_edge, **beside)
        axes.set(xlabel="step", ylabel=f"loss ({unit})")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(train) or len(evals):
            figure.legend(frameon=False, ncols=3, loc="outside lower center")


def plot_subspaces(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Plots the lines of `subspace.jsonl`: rows are matrices, by param and layer."""
    names = [*lines[0]["energy"]]
    layers = [len(lines[0]["energy"][name]) for name in names]
    ends = np.cumsum([0, *layers])
    parts = {"energy": "share of the gradient's energy kept", "turned": "turned since the last"}
    height = min(12, 3 + 0.12 * ends[-1])
    with picture(path, (10, height), title, 90) as figure:
        both = figure.subplots(1, 2, sharey=True)
        steps = [line["step"] for line in lines]
        for axes, (kind, what) in zip(both, parts.items(), strict=True):
            none = [[None] * count for count in layers]
            rows = [
                np.concatenate([line[kind].get(n, x) for n, x in zip(names, none, strict=True)])
                for line in lines
            ]
            values = np.array(rows, float).T
            image = axes.imshow(values, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
            axes.set(title=what, xlabel="step")
            shown = np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))
            axes.set_xticks(shown, [f"{steps[i]:,}" for i in shown])
            axes.set_yticks((ends[:-1] + ends[1:] - 1) / 2, names)
            for end in ends[1:-1]:
                axes.axhline(end - 0.5, color="white", linewidth=0.8)
            figure.colorbar(image, ax=axes)
        both[0].set_ylabel("layers of each param, the first on top")


def plot_plan(plans: Mapping[str, Mapping[str, int]], path: Path, title: str) -> None:
    """Plots several plans as stacked bars, from the bytes of each one's parts by name."""
    with picture(path, (8, 2 + 0.5 * len(plans)), title) as figure:
        axes = figure.add_subplot()
        left = np.zeros(len(plans))
        unit, size = unit_of(max(sum(parts.values()) for parts in plans.values()))
        for part in next(iter(plans.values())):
            sizes = np.array([parts[part] / size for parts in plans.values()])
            if sizes.max() > left.max() / 1000:
                axes.barh(list(plans), sizes, left=left, label=part)
            left += sizes
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        for i, peak in enumerate(left):
            axes.annotate(f"{peak:,.4g}", (peak, i), **beside)
        axes.set(xlabel=unit, xlim=(0, 1.12 * left.max()))
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
        figure.legend(frameon=False, ncols=4, loc="outside lower center")


def check_picture(file: str, name: str) -> None:
    """Raises ValueError unless a picture can be written with the file's ending."""
    _without_backend_of_others()
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
