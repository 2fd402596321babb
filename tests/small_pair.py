"""The two processes of a small run, over Gloo."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from paths import ROOT
from small_run import ADAMW

# The quickest step to compile: what several processes share does not depend on the optimizer.
SETTINGS = {**ADAMW, "mesh": "data=2,fsdp=4"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pair(
    out: Path,
    fault=("metrics", "-1", "SIGTERM"),
    launcher: Callable[[int], dict[str, str]] | None = None,
    **settings,
) -> list[subprocess.Popen]:
    """The two processes of a run, with four devices each; `small_run` says what a `fault` is.

    `launcher` gives what one sets in the environment of each process, which has no flags then.
    """
    address = f"127.0.0.1:{free_port()}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    script, processes = [sys.executable, str(ROOT / "tests/small_run.py")], []
    for i in range(2):
        where = {"coordinator": address, "processes": 2, "process": i}
        where = {"launcher": True} if launcher else where
        text = json.dumps({**SETTINGS, **settings, **where, "out": str(out)})
        own = {**env, **(launcher(i) if launcher else {})}
        pipes: dict = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([*script, text, *fault], env=own, **pipes))
    return processes


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
