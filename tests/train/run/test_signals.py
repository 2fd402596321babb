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

from train.run.signals import NAMES, StopRequest


def busy(rounds: int) -> None:
    """Computes outside Python, without its lock and without looking for signals."""
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", rounds)


@pytest.fixture
def hang_up_not_ignored():
    """As in a terminal: pytest itself may run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up_not_ignored")
@pytest.mark.parametrize(("number", "name"), NAMES.items())
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
    assert "a further SIGTERM or Ctrl-C ends it at once" in text
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


@pytest.mark.usefixtures("hang_up_not_ignored")
@pytest.mark.parametrize("first", NAMES)
def test_a_closed_terminal_never_ends_a_run_that_stops_already(first):
    said = []
    with StopRequest(said.append) as stop:
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            os.kill(os.getpid(), number)
            busy(10_000)
    assert stop.signum == first
    assert len(said) == 1


def test_a_closed_terminal_stops_no_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            busy(10_000)
        assert stop.signum is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
