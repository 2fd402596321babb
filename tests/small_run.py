"""A pre-training run of a second: a model of two narrow layers on a little of the built-in text.

As a command it takes the settings as JSON, and the point at which it kills itself.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

from models.llama.config import SIZES, LlamaConfig
from train.config.resolve import Pretrain

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


def small(out: Path | str, **changes) -> Pretrain:
    SIZES["micro"] = MICRO
    return dataclasses.replace(SMALL, out=str(out), **changes)


def kill_at(where: str, step: int, signum: int) -> None:
    """Has the process kill itself when it writes a step's metrics, or has begun to save it."""
    from train import checkpoint, metrics

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


if __name__ == "__main__":
    settings, where, step, signum = sys.argv[1:]
    from train.pretrain import main
    from train.run.cli import run

    kill_at(where, int(step), signal.Signals[signum])
    sys.argv = sys.argv[:1]
    run(lambda _: main(small(**json.loads(settings))), Pretrain, "small_run")
