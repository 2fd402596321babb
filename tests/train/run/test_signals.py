"""Signals are heard while Python cannot run its handlers, as during a compilation."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from paths import ROOT

from train.run.signals import StopRequest


def busy(rounds: int) -> None:
    """Computes outside Python, without its lock and without looking for signals."""
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", rounds)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGT")])
def test_a_signal_is_answered_while_a_step_is_compiled(number, name):
    said = []
    with StopRequest(lambda text: said.append((time.monotonic(), text))) as stop:
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        busy(3_000_000)
        end = time.monotonic()
    assert stop.signum == number
    (at, text), *others = said
    assert not others
    assert at < end - 0.1
    assert text.startswith(name)
    assert "a second one ends it at once" in text
    assert stop.name.startswith(name)


def test_a_second_signal_ends_the_process_while_a_step_is_compiled():
    script = (
        "import hashlib\nfrom train.run.signals import StopRequest\n"
        "with StopRequest():\n    print('in', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)"
    )
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], env=there, **pipes) as process:
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("Ctrl-C: the run stops")
        process.send_signal(signal.SIGINT)
        # By the signal itself if Python has run its handler, before it began to compute.
        assert process.wait(20) in (130, -signal.SIGINT)


def test_what_was_there_before_is_back():
    before = signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before[1])
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(before[1])) == before
