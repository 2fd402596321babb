"""The two processes of a small run, over Gloo."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from paths import ROOT
from small_run import ADAMW

# The quickest step to compile: what several processes share does not depend on the optimizer.
SETTINGS = {**ADAMW, "mesh": "data=2,fsdp=4"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pair(out: Path, fault=("metrics", "-1", "SIGTERM"), **settings) -> list[subprocess.Popen]:
    """The two processes of a run, with four devices each; `small_run` says what a `fault` is."""
    where = {"coordinator": f"127.0.0.1:{free_port()}", "processes": 2}
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    own = [json.dumps({**SETTINGS, **settings, **where, "process": i}) for i in range(2)]
    script = [sys.executable, str(ROOT / "tests/small_run.py")]
    return [
        subprocess.Popen(
            [*script, text[:-1] + f', "out": "{out}"}}', *fault],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for text in own
    ]


def wait_for(out: Path, step: int) -> None:
    """Returns once a step's metrics are written."""
    file, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (file.exists() and f'"step": {step},' in file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(processes: list[subprocess.Popen], out: Path, step: int, which: int, signum: int):
    """Sends one process a signal once a step's metrics are written; the exit codes and stderr."""
    wait_for(out, step)
    processes[which].send_signal(signum)
    return ended(processes, 60)


def ended(processes: list[subprocess.Popen], seconds: float) -> tuple[list[int], list[str]]:
    """The exit codes and stderr of processes that end within some seconds."""
    said = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], said
