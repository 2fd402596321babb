"""The lines of a run: loss and smoothed loss, gradient norm, tokens per second of the interval."""

import math
import os
import subprocess
import sys

from paths import ROOT

from train.run.progress import Progress


def test_a_line_has_the_smoothed_loss_the_gradient_norm_and_the_speed_of_its_interval(capsys):
    progress = Progress(0, 40, at_peak=None)
    for step in range(1, 41):
        line = {"step": step, "loss": 4.0 if step % 2 else 2.0, "learning_rate": 0.01}
        line |= {"grad_norm": 0.5, "skipped": 0, "tokens_per_second": 7}
        if step == 30:
            line["loss"] = math.nan
        # Twice as fast in the second half.
        progress.step(line, tokens=100, seconds=1.0 if step <= 20 else 0.5, show=step % 20 == 0)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 20/40  loss 2.0000 (smoothed 3.3")
    assert "  gradient norm 0.50  " in first
    assert "  100 tokens/s" in first
    assert "  200 tokens/s" in second
    assert "nan" not in second
    assert "MFU" not in first


def test_a_line_has_the_share_of_the_devices_peak_if_that_is_known_and_what_was_skipped(capsys):
    progress = Progress(0, 40, at_peak=400)
    line = {"step": 1, "loss": 4.0, "learning_rate": 0.01, "grad_norm": 0.5, "skipped": 2}
    progress.step(line, tokens=100, seconds=1.0, show=True)
    out = capsys.readouterr().out
    assert "  100 tokens/s  MFU 25.0%  " in out
    assert out.endswith("  2 skipped (not finite)\n")


def test_a_run_goes_on_when_nobody_reads_what_it_prints():
    program = (
        "import os, sys\n"
        "from train.run.progress import Progress, say\n"
        "progress = Progress(0, 40, at_peak=None)\n"
        "for print_line in (say, progress.log):\n"
        "    here, there = os.pipe()\n"
        "    os.dup2(there, 1)\n"
        "    os.close(here), os.close(there)\n"  # as of `tee`, which Ctrl-C has ended
        "    for _ in range(3): print_line('a line')\n"
        "sys.exit(5)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (5, "")


def test_a_run_goes_on_when_its_terminal_is_closed():
    program = (
        "import os, pty, sys\n"
        "from train.run.progress import Progress, say\n"
        "master, terminal = pty.openpty()\n"
        "os.dup2(terminal, 1)\n"
        "with Progress(0, 40, at_peak=None) as progress:\n"
        "    assert progress.console.is_terminal\n"
        "    os.close(master)\n"
        "    for print_line in {}: print_line('a line')\n"
        "say('another')\n"
        "os._exit(5)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    for lines in ("()", "(say,)", "(progress.log,)"):
        command = [sys.executable, "-c", program.format(lines)]
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
        assert done.returncode == 5, done.stderr
