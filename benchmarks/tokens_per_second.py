"""Tokens a second of whole training steps, in turns with transformers and galore-torch.

    python -m benchmarks.tokens_per_second --peer-python PYTHON

PYTHON has torch, transformers and galore-torch. Both sides train the same LLaMA with GaLore's AdamW
and gradient clipping at norm 1 on random tokens; they take turns, one step each, in one run.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Contest:
    """Times steps of both sides in turns."""

    peer_python: str | None = None
    """A Python with torch, transformers and galore-torch; without it only ours is timed."""
    model: str = "llama-60m"
    """Model to train."""
    batch_size: int = 4
    """Sequences in a step."""
    seq_len: int = 256
    """Tokens in a sequence."""
    steps: int = 15
    """Steps of each side that count, after three that don't."""


def ours(model: Any, batch_size: int, seq_len: int) -> Callable[[], float]:
    """A function that runs one step of this trainer and returns its loss."""
    import jax
    import numpy as np

    from train.config.resolve import resolve
    from train.config.settings import Pretrain
    from train.run.assemble import assemble
    from train.step.mesh import put_batch

    config = resolve(
        Pretrain(model=model, batch_size=batch_size, seq_len=seq_len, steps=10_000, accumulate=1)
    )
    parts = assemble(config, lambda text: None)
    state = parts.init(jax.random.key(0))
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, (batch_size, seq_len + 1), dtype=np.int32)
    batch = put_batch(
        parts.mesh,
        {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.broadcast_to(np.arange(seq_len, dtype=np.int32), tokens[:, 1:].shape),
            "segment_ids": np.ones((batch_size, seq_len), np.int32),
            "weights": np.ones((batch_size, seq_len), np.float32),
        },
    )

    def step() -> float:
        nonlocal state
        state, metrics = parts.train_step(state, batch)
        return float(metrics["loss"])

    return step


def serve(step: Callable[[], float]) -> None:
    """Takes a step for every line on standard input and answers with its seconds and loss."""
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(time.perf_counter() - start, loss, flush=True)


def _turns(command: list[str]) -> Iterator[float]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while True:
            process.stdin.write("step\n")
            process.stdin.flush()
            seconds, loss = process.stdout.readline().split()
            assert float(loss) == float(loss), "the loss is not a number"
            yield float(seconds)
    finally:
        process.kill()
        process.wait()


def main(config: Contest) -> None:
    """Prints a line of Markdown for each side."""
    shape = [config.model, str(config.batch_size), str(config.seq_len)]
    commands = {"galore-optax": [sys.executable, "-m", "benchmarks.tokens_per_second", *shape]}
    if config.peer_python is not None:
        peer = str(Path(__file__).with_name("peer_galore_torch.py"))
        commands["transformers + galore-torch"] = [config.peer_python, peer, *shape]
    sides = {name: _turns(command) for name, command in commands.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(WARM_UP + config.steps):
        for name, turns in sides.items():
            taken = next(turns)
            if step >= WARM_UP:
                seconds[name].append(taken)
    tokens = config.batch_size * config.seq_len
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print("| side | median s | least s | tokens/s (median) |")
    print("| --- | --- | --- | --- |")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.3f} | {min(taken):.3f} | {tokens / median:.0f} |")
    first, *others = seconds.values()
    for other in others:
        ratios = [b / a for a, b in zip(first, other, strict=True)]
        print(f"ratio of speeds, step by step: median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        serve(ours(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    else:
        import tyro

        main(tyro.cli(Contest))
