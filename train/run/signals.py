"""SIGTERM, Ctrl-C and a closed terminal let the step finish; a second SIGTERM or Ctrl-C doesn't."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Self

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}
_END = b"\0"


class StopRequest:
    """While entered, notes a first SIGTERM, SIGINT or SIGHUP in `signum`, and says so at once.

    SIGHUP comes when the terminal is closed, often twice: from the shell and from the system. It is
    ignored after another signal, and always if it was before, as under `nohup`.

    Python runs its own handlers only between two of its instructions, which is after XLA has
    compiled a step. So a thread reads the signals from the pipe that Python's C handler writes to.
    """

    def __init__(self, say: Callable[[str], object] | None = None) -> None:
        self.signum: int | None = None
        self._say = say or _to_stderr
        self._before: dict[signal.Signals, object] = {}

    @property
    def name(self) -> str:
        """The first signal as a user knows it."""
        return NAMES[signal.Signals(self.signum or signal.SIGINT)]

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        for number in NAMES:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for number in self._before:
            then = signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL
            signal.signal(number, then)

    def _listen(self) -> None:
        heard = False
        while (byte := os.read(self._read, 1)) != _END:
            if byte[0] not in self._before or (heard and byte[0] == signal.SIGHUP):
                continue
            if heard:  # and Python has not run `_note` yet
                os._exit(128 + byte[0])
            heard = True
            self._say(
                f"{NAMES[signal.Signals(byte[0])]}: the run stops after what it is computing now, "
                "and saves its last step; a further SIGTERM or Ctrl-C ends it at once, without that"
            )

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyrefly: ignore[bad-argument-type]
        signal.set_wakeup_fd(self._pipe_before)
        os.write(self._write, _END)  # closing it is no end: worker processes have it, too
        self._thread.join()
        os.close(self._read)
        os.close(self._write)


def _to_stderr(text: str) -> None:
    with suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr, flush=True)
