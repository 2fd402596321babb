"""A pre-training run of a second: a model of two narrow layers on a little of the built-in text.

As a command it takes the settings as JSON, and the point at which it kills itself; or `nan`, and
the step in which one process has a row that is not finite.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from paths import ROOT

from models.llama.config import SIZES, LlamaConfig
from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.data.text import load_text
from train.memory.fit import RECIPES
from train.pretrain import main
from train.run import assemble, checkpoint, metrics, training
from train.run.cli import run
from train.step import programs
from train.step.mesh import put_batch
from train.step.ordinary import Forward

MICRO = LlamaConfig(width=32, mlp_width=48, layers=2, heads=2, kv_heads=1, max_length=64)
SMALL = Pretrain(
    model="micro",  # pyrefly: ignore
    optimizer="galore-adamw",
    rank=4,
    update_proj_gap=3,
    learning_rate=0.01,
    steps=14,
    warmup_steps=2,
    batch_size=8,
    seq_len=32,
    eval_every=7,
    eval_tokens=1000,
    save_every=4,
)
NO_SUBSPACE = {"rank": None, "update_proj_gap": None}
ADAMW = {"optimizer": "adamw", **NO_SUBSPACE}
# All that a 10 GB card needs; rounded to the nearest, since by layers other numbers are drawn than
# for the whole stack.
LOW_BIT = {
    **RECIPES["10 GB card"], "layerwise": False, "rematerialize": False,
    "stochastic_rounding": False,
}  # fmt: skip


@functools.cache
def topics(split: str) -> list[str]:
    """A part of the built-in text: reading all of it takes each process 2.5 seconds."""
    from pydoc_data.topics import topics

    paragraphs = [text for name in sorted(topics) for text in topics[name].split("\n\n")]
    return [text for i, text in enumerate(paragraphs) if (i % 20 == 0) == (split == "validation")]


def load_few(name: str, split: str, *where: str | None) -> Sequence[str]:
    return topics(split) if name == "builtin" else load_text(name, split, *where)


assemble.load_text = load_few


def small(out: Path | str, **changes) -> Pretrain:
    SIZES["micro"] = MICRO
    return dataclasses.replace(SMALL, out=str(out), **changes)


def trained(steps: int, **changes):
    """What a run is made of, its first and last train state, and the losses of its steps."""
    parts = assemble.assemble(resolve(small("unused", **changes)), lambda _: None)
    state = parts.init(jax.random.key(0))
    for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(parts.abstract), strict=True):
        assert x.sharding == wanted.sharding
    first, losses = jax.tree.map(jnp.copy, state), []
    for batch, _ in parts.data.batches():
        state, told = parts.train_step(state, put_batch(parts.mesh, batch))
        losses.append(float(told["loss"]))
        if len(losses) == steps:
            break
    for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(parts.abstract), strict=True):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
    return parts, first, state, losses


def train(steps: int = 6, **changes) -> list[float]:
    """The losses of the first steps."""
    return trained(steps, **changes)[-1]


def losses(folder: Path) -> dict[tuple[str, int], float]:
    """Every loss of a run by kind and step, and none twice."""
    found = {}
    for line in metrics.read_metrics(folder):
        for kind in ("loss", "eval_loss", "grad_norm", "tokens", "learning_rate"):
            if kind in line:
                assert (kind, line["step"]) not in found
                found[kind, line["step"]] = line[kind]
    return found


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in folder.rglob("*")
    }


def spoil(checkpoint: Path) -> None:
    """Changes one byte in each file of the weights' numbers."""
    for path in checkpoint.glob("params/**/d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def unfinished(whole: Path, tmp_path: Path, *lost: str) -> Path:
    """A copy of a run without its summary and some of its checkpoints."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    (copy / "summary.json").unlink()
    for step in lost:
        shutil.rmtree(copy / "checkpoints" / step)
    return copy


def killed_command(settings: dict, where: str, step: int, signum: str) -> dict:
    script = [sys.executable, ROOT / "tests/small_run.py"]
    return {
        "args": [*script, json.dumps(settings), where, str(step), signum],
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
    }


def run_killed(settings: dict, where: str, step: int, signum: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        **killed_command(settings, where, step, signum),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def kill_at(where: str, step: int, signum: int) -> None:
    """Has the process kill itself when it writes a step's metrics, or has begun to save it."""
    owner, name = {
        "metrics": (metrics.MetricsLog, "write"),
        "save": (checkpoint.Checkpoints, "save"),
    }[where]
    original = getattr(owner, name)

    def patched(self, what, *rest, **options):
        if where == "save":
            original(self, what, *rest, **options)
        if step == (what["step"] if where == "metrics" else what):
            os.kill(os.getpid(), signum)
        if where == "metrics":
            original(self, what, *rest, **options)

    setattr(owner, name, patched)


# No byte of text in UTF-8.
BAD = 255


def break_at_bad_tokens(forward: Forward) -> Forward:
    """A model whose hidden states are not finite in a row with the token `BAD`."""

    def breaking(params, batch):
        hidden, head = forward(params, batch)
        bad = jnp.any(batch["inputs"] == BAD, axis=1)
        return jnp.where(bad[:, None, None], jnp.nan, hidden), head

    return breaking


def poison_last_row_at(step: int, process: int) -> None:
    """Has the last row of a step's batch be not finite, where one process puts it on its device."""
    make, put, batches = programs.make_forward, training.put_batch, itertools.count(1)

    def poisoning(mesh, batch):
        trains = threading.current_thread() is not threading.main_thread()
        if trains:  # each of two processes reads the text of its own rows alone
            own = slice(4, 8) if jax.process_index() == 1 else slice(4)
            assert batch["weights"].any(axis=1).nonzero()[0].tolist() == [*range(8)[own]]
        if trains and next(batches) == step and jax.process_index() == process:
            inputs = batch["inputs"].copy()
            inputs[-1] = BAD
            batch = {**batch, "inputs": inputs}
        return put(mesh, batch)

    programs.make_forward = lambda *args: break_at_bad_tokens(make(*args))
    training.put_batch = poisoning


if __name__ == "__main__":
    settings, where, step, signum = sys.argv[1:]
    if where == "nan":
        poison_last_row_at(int(step), process=1)
    else:
        kill_at(where, int(step), signal.Signals[signum])
    sys.argv = sys.argv[:1]
    run(lambda _: main(small(**json.loads(settings))), Pretrain, "small_run")
