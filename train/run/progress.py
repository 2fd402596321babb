"""What a run prints while it trains: a progress bar, and a line for each logged step.

Whoever reads it may have ended, as Ctrl-C ends `tee`, too, or the terminal was closed: that ends no
run.
"""

import datetime
import errno
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

_SHARE = 0.05  # of a step's loss in the smoothed one


def say(text: str) -> None:
    """Prints a line at once."""
    with _read_or_not():
        print(text, flush=True)


@contextmanager
def _read_or_not() -> Iterator[None]:
    """If nobody reads what is printed (a closed pipe or terminal), it goes nowhere from then on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Progress:
    """A live progress bar on a terminal, shown while this is entered, and lines that stay.

    `step` of `steps` were done before; `at_peak` is the tokens per second at all devices' peak
    FLOP/s, None if unknown. If `quiet`, nothing is printed.
    """

    def __init__(self, step: int, steps: int, at_peak: float | None, *, quiet: bool = False):
        from rich import progress
        from rich.console import Console

        self.console = Console(soft_wrap=True, highlight=False, quiet=quiet)
        self._bar = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[left]} left"),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=step, left="?")
        self._steps, self._at_peak = steps, at_peak
        self._first: tuple[int, float] | None = None
        self._smoothed: float | None = None
        self._tokens, self._seconds = 0, 0.0  # since the last line

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with _read_or_not():
            self._bar.stop()

    def log(self, text: str) -> None:
        """Prints a line."""
        with suppress(SystemExit), _read_or_not():  # of rich, where a pipe is closed
            self.console.print(text, markup=False)

    def step(self, line: dict[str, Any], tokens: int, seconds: float, show: bool) -> None:
        """Moves the bar, and prints a line if `show`; `line` is the step's in metrics.jsonl.

        `tokens` and `seconds` are those of the step: a printed line has the tokens per
        second since the line before, and the loss smoothed over about twenty steps.
        """
        step = line["step"]
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        if math.isfinite(line["loss"]):
            before = line["loss"] if self._smoothed is None else self._smoothed
            self._smoothed = before + (line["loss"] - before) * _SHARE
        left = self._left(step)
        self._bar.update(self._task, completed=step, left=left)
        if not show:
            return
        speed, self._tokens, self._seconds = self._tokens / self._seconds, 0, 0.0
        smoothed = "" if self._smoothed is None else f" (smoothed {self._smoothed:.4f})"
        parts = [
            f"step {step:{len(str(self._steps))}d}/{self._steps}",
            f"loss {line['loss']:.4f}{smoothed}",
            f"gradient norm {line['grad_norm']:.2f}",
            f"lr {line['learning_rate']:.2e}",
            f"{speed:,.0f} tokens/s",
        ]
        if self._at_peak:
            parts.append(f"MFU {speed / self._at_peak:.1%}")
        parts.append(f"{left} left")
        if line["skipped"]:
            parts.append(f"{line['skipped']} skipped (not finite)")
        self.log("  ".join(parts))

    def _left(self, step: int) -> str:
        """Remaining time at this process's pace, evaluations and checkpoints included."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return "?"
        first, start = self._first
        seconds = (now - start) / max(1, step - first) * (self._steps - step)
        return str(datetime.timedelta(seconds=round(seconds)))
