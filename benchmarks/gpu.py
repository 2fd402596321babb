"""All measurements that need a GPU, in one call, the most important first.

    python -m benchmarks.gpu --prepare tokens.npy     # anywhere: tokens of the built-in text
    python -m benchmarks.gpu --tokens tokens.npy --out DIR
    python -m benchmarks.gpu --tokens tokens.npy --out DIR --model tiny --small tiny --steps 4

The last is for a CPU. Needs jax, flax, optax and orbax, no more. Each part runs in a process of its
own, whose memory ends with it, and adds a line to DIR/results.jsonl as soon as it has one; what
fails says so there.

1. A 7B inside 24, 16, 12 and 10 GB: the allocator limited, 50 steps of the recipe, losses finite
   and falling, the peak counter beside the plan.
2. Step times: layer-wise against ordinary, with and without exact clipping; 8-bit states against
   float ones; GaLore against AdamW.
3. A refresh of everything, and an ordinary optimizer step, beside optax.contrib.galore.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.training_step import SIDES, batch_of

RECIPES = {24: "8-bit GaLore", 16: "Q-GaLore", 12: "12 GB card", 10: "10 GB card"}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Measures, and writes as it goes."""

    tokens: str | None = None
    """File of token ids that --prepare wrote."""
    prepare: str | None = None
    """Only write the file --tokens, from the built-in text."""
    out: str = "gpu"
    """Folder for results.jsonl."""
    model: str = "llama-7b"
    """Model of the first part."""
    small: str = "llama-1b"
    """Model of the other parts."""
    limits: tuple[int, ...] = (24, 16, 12, 10)
    """Sizes of cards, in GiB, to which the first part is limited."""
    steps: int = 50
    """Steps of the first part."""
    timed: int = 10
    """Timed steps of the other parts."""
    batch_size: int = 16
    """Sequences of 256 tokens in a step that is timed."""
    budget: int = 570
    """Seconds after which no further part starts."""


# What the second part times.
TIMED = (
    "AdamW", "GaLore", "GaLore, layer-wise, clip previous", "GaLore, layer-wise", "8-bit GaLore",
    "Q-GaLore, layer-wise, clip previous",
)  # fmt: skip


def main(config: Gpu) -> int:
    """Runs the parts until the time is used up."""
    if config.prepare is not None:
        return _prepare(config.prepare)
    if config.tokens is None or not Path(config.tokens).is_file():
        raise ValueError(f"--tokens {config.tokens}: give the file that --prepare wrote")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    common = {"tokens": config.tokens, "steps": config.steps, "timed": config.timed}
    parts: list[dict[str, Any]] = [
        {"part": "inside", "name": f"{config.model} in {card} GiB", "model": config.model,
         "recipe": RECIPES.get(card, "10 GB card"), "card": card, "batch_size": 1}
        for card in config.limits
    ]  # fmt: skip
    small = {"model": config.small, "batch_size": config.batch_size}
    parts += [{"part": "timed", "name": name, "flags": SIDES[name], **small} for name in TIMED]
    parts.append(
        {"part": "optimizer", "name": f"optimizer of {config.small}", "model": config.small}
    )
    start = time.monotonic()
    for part in parts:
        left = config.budget - (time.monotonic() - start)
        if left < 10:
            _write(out, {"name": part["name"], "skipped": "no time left"})
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", json.dumps(common | part)]
        environment = dict(os.environ)
        if "card" in part:
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
            if share := _share(part["card"]):
                environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = share
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            _write(out, {"name": part["name"], "failed": f"not done in {left:.0f} s"})
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            _write(out, {"name": part["name"], **json.loads(line)})
        if done.returncode or not lines:
            _write(out, {"name": part["name"], "failed": done.stderr.strip()[-400:]})
    return 0


def _share(card: int) -> str | None:
    """The share of this GPU's memory that a program has on a card of this many GiB."""
    if shutil.which("nvidia-smi") is None:
        return None  # a CPU's is not limited
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    from train.memory.plan import CONTEXT

    total = float(asked.stdout.split()[0]) * 2**20
    return f"{(card * 2**30 - CONTEXT) / total:.5f}"


def _write(out: Path, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _prepare(path: str) -> int:
    import numpy as np

    from train.data.text import load_text
    from train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    text = load_text("builtin", "train", None)
    documents = [tokenizer.encode(text[i]) for i in range(min(len(text), 4000))]
    np.save(path, np.concatenate(documents).astype(np.int32))
    return 0


def _batches(tokens: str, batch_size: int, seq_len: int):
    """Rows cut from a file of token ids, over and over."""
    import numpy as np

    ids = np.load(tokens, mmap_mode="r")
    number, at = batch_size * seq_len, 0
    while True:
        if at + number + 1 > len(ids):
            at = 0
        yield batch_of(np.asarray(ids[at : at + number + 1]), batch_size, seq_len)
        at += number


def one(part: dict[str, Any]) -> None:
    """One part, in its own process; prints its results as JSON."""
    {"inside": inside, "timed": timed, "optimizer": optimizer}[part["part"]](part)


def _programs(part: dict[str, Any], **flags: Any):
    from train.config.resolve import resolve
    from train.config.settings import Pretrain
    from train.plan import programs_of

    settings = Pretrain(
        model=part["model"], dtype="bfloat16", batch_size=part["batch_size"], accumulate=1, **flags
    )
    config = resolve(settings)
    return config, programs_of(config)


def inside(part: dict[str, Any]) -> None:
    """Steps of a recipe with the allocator limited to a card's memory."""
    import jax
    import numpy as np

    from train.plan import RECIPES as FLAGS
    from train.plan import plan
    from train.step.mesh import put_batch

    config, programs = _programs(
        part, **FLAGS[part["recipe"]], steps=max(part["steps"], 2), warmup_steps=1
    )
    start = time.perf_counter()
    compiled = programs.train_step.lower(programs.abstract, programs.batch).compile()
    compiling = time.perf_counter() - start
    planned = plan(config, programs, compiled.memory_analysis())
    state = programs.init(jax.random.key(0))
    losses, seconds = [], []
    batches = _batches(part["tokens"], config.batch_size, config.seq_len)
    for _, batch in zip(range(part["steps"]), batches, strict=False):
        start = time.perf_counter()
        state, metrics = compiled(state, put_batch(programs.mesh, batch))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    device = programs.mesh.devices.flat[0]
    stats = device.memory_stats() or {}
    tenth = max(1, len(losses) // 10)
    print(
        json.dumps(
            {
                "recipe": part["recipe"],
                "device": device.device_kind,
                "limit_bytes": stats.get("bytes_limit"),
                "planned_bytes": planned.peak,
                "peak_bytes": stats.get("peak_bytes_in_use"),
                "compile_seconds": compiling,
                "step_seconds": float(np.median(seconds)),
                "finite": bool(np.isfinite(losses).all()),
                "first_losses": float(np.mean(losses[:tenth])),
                "last_losses": float(np.mean(losses[-tenth:])),
            }
        )
    )


def timed(part: dict[str, Any]) -> None:
    """The median of a training step."""
    import jax
    import numpy as np

    from train.step.mesh import put_batch

    config, programs = _programs(part, **part["flags"])
    compiled = programs.train_step.lower(programs.abstract, programs.batch).compile()
    state = programs.init(jax.random.key(0))
    batch = put_batch(
        programs.mesh, next(_batches(part["tokens"], config.batch_size, config.seq_len))
    )
    seconds = []
    for _ in range(2 + part["timed"]):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds[2:]))
    stats = programs.mesh.devices.flat[0].memory_stats() or {}
    print(
        json.dumps(
            {
                "model": config.model,
                "step_seconds": median,
                "first_step_seconds": seconds[0],  # with a refresh of everything
                "tokens_per_second": config.batch_size * config.seq_len / median,
                "peak_bytes": stats.get("peak_bytes_in_use"),
            }
        )
    )


def optimizer(part: dict[str, Any]) -> None:
    """`benchmarks.optimizer_step`: ordinary steps and refreshes beside optax.contrib.galore."""
    words = ["--model", part["model"], "--parts", "ordinary", "refresh", "--rounds", "5"]
    command = [sys.executable, "-m", "benchmarks.optimizer_step", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(json.dumps({"table": done.stdout}))


def _arguments(words: list[str]) -> Gpu:
    """Parses flags without tyro, which a bare GPU machine lacks."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    for field in dataclasses.fields(Gpu):
        several = field.name == "limits"
        kind = type(field.default) if isinstance(field.default, int) and not several else str
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=field.default,
            type=int if several else kind,
            nargs="+" if several else None,
        )
    given: dict[str, Any] = vars(parser.parse_args(words))
    given["limits"] = tuple(given["limits"])
    return Gpu(**given)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(json.loads(sys.argv[2]))
    else:
        try:
            sys.exit(main(_arguments(sys.argv[1:])))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
