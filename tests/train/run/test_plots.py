"""The pictures of a run and of a plan: all that is drawn is inside, and no number is long."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from paths import ROOT

from train.run.plots import plot_loss, plot_plan

TITLE = "a-model-with-a-long-name-of-many-words, q-galore-adamw8bit, batch 512 x 4096 tokens"


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    return figures


def check(figure: Figure) -> None:
    figure.draw_without_rendering()
    edge = figure.bbox
    (axes,), (legend,) = figure.axes, figure.legends
    texts = [figure._suptitle, axes.xaxis.label, axes.yaxis.label, *axes.texts, *legend.get_texts()]
    assert any("batch 512 x 4096" in " ".join(x.get_text().split()) for x in texts)
    for text in filter(Text.get_text, texts):
        box = text.get_window_extent()
        assert box.x0 >= edge.x0 - 1, text
        assert box.x1 <= edge.x1 + 1, text
        assert not re.search(r"\d{7}", text.get_text())


def test_the_losses_of_a_run_that_diverged(drawn, tmp_path):
    lines = [{"step": n, "loss": 10.0**n} for n in range(1, 34)]
    lines += [{"step": n, "eval_loss": 10.0**n + 0.123} for n in (0, 20, 33)]
    plot_loss(lines, tmp_path / "loss.png", TITLE, "nats per token")
    check(drawn[0])


@pytest.mark.parametrize("scale", [1.0, 3e-4])
def test_the_parts_of_plans(drawn, tmp_path, scale):
    names = "weights", "projections", "moments", "counters", "gradients", "activations", "temporar"
    parts = dict(zip(names, np.array([135, 5, 30, 0, 4, 30, 10]) * 1e8 * scale, strict=True))
    plot_plan({"q-galore-adamw8bit": parts, "adamw": parts}, tmp_path / "plan.png", TITLE)
    check(drawn[0])
    unit = drawn[0].axes[0].get_xlabel()
    assert unit == ("GiB" if scale == 1 else "MiB")


def test_a_notebooks_backend_and_the_users_settings_do_not_keep_a_run_from_its_picture(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\ntext.latex.preamble: \\none\n")
    own = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path)}
    program = (
        "import sys; sys.modules['matplotlib_inline'] = None\n"  # as if it were not installed
        "from pathlib import Path; from train.run.plots import check_picture, plot_loss\n"
        "check_picture('a.png', '--plot')\n"
        "plot_loss([{'step': 1, 'loss': 2.0}], Path('loss.png'), 'a$_$b_c, adamw', 'per token')\n"
    )
    env = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, check=False)
    assert done.returncode == 0
    assert (tmp_path / "loss.png").stat().st_size > 10_000
