"""How the processes of a run meet before JAX joins them, and tell each other why one does not come.

JAX would wait for minutes, and abort with a page of its stack, if one process has ended with an
error, or has another --processes, or the same --process as another one. Process 0 listens at the
coordinator's address, which JAX uses afterwards. Each other process sends a line of JSON, and gets
one back as soon as all are there or something is wrong.
"""

import dataclasses
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

# After this time a process says which others it waits for.
HINT_SECONDS = 20
# How long a process that ended with an error waits for the others, to tell them.
_TELLING_SECONDS = 30
# Most bytes of a message.
_LONGEST = 4096


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process is in its run."""

    coordinator: str  # HOST:PORT
    count: int
    index: int
    device: int | None = None  # of its host; None: all

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator; an IPv6 address may be in brackets."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def meet(place: Place, seconds: float) -> None:
    """Returns once all processes are there.

    Raises OSError if some are not after `seconds`, if process 0 cannot listen at the coordinator's
    address, if another process has ended, or if their flags contradict each other.
    """
    if place.index:
        problem = _ask(place, seconds)
    else:
        try:
            with _listening(place) as server:
                problem = _gather(server, place, seconds)
        except OSError as error:
            problem = str(error)
            with suppress(OSError):  # the run's process 0, if it is there, says that it is
                problem = _ask(place, seconds=1) or problem
    if problem is not None:
        raise OSError(problem)


def tell(place: Place) -> None:
    """Tells the others, as far as they come soon, that this process has ended with an error."""
    with suppress(OSError):  # there is no other
        if place.index:
            _ask(place, _TELLING_SECONDS, stopped=True)
        else:
            with _listening(place) as server:
                _gather(server, place, _TELLING_SECONDS, _stopped(0))


def _stopped(index: int) -> str:
    return f"process {index} of the run has stopped: it says why"


@contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
    try:
        family, *_, address = socket.getaddrinfo(*place.address, type=socket.SOCK_STREAM)[0]
        server = socket.create_server(address[:2], family=family, backlog=place.count)
    except OSError as error:
        code = error.errno or 0
        reason = os.strerror(code) if code > 0 else error.strerror  # an unknown host's is below 0
        raise OSError(
            f"--coordinator {place.coordinator}: process 0 cannot listen there ({reason}); give "
            "an address of its host and a free port"
        ) from None
    with server:
        yield server


class _Others:
    """The connections that process 0 has, and what each process has said."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.said: dict[socket.socket, dict[str, Any]] = {}

    def missing(self) -> list[int]:
        there = {said["process"] for said in self.said.values()}
        return [i for i in range(1, self.place.count) if i not in there]

    def hear(self, connection: socket.socket) -> str | None:
        """Reads from a connection; what is wrong, if anything."""
        try:
            text = connection.recv(_LONGEST)
        except OSError:
            text = b""
        if connection in self.said:
            return None if text else _stopped(self.said[connection]["process"])
        try:
            found = json.loads(text)
            said = {name: int(found[name]) for name in ("process", "processes", "stopped")}
        except (ValueError, TypeError, KeyError, RecursionError):
            return None  # no process of a run
        before = {0, *(other["process"] for other in self.said.values())}
        self.said[connection] = said
        index, count = said["process"], said["processes"]
        if count != self.place.count:
            has = f"process {index} has --processes {count}, process 0 {self.place.count}"
            return f"{has}: give all the same number"
        if index in before:
            return f"two processes have --process {index}: give each a number of its own"
        return _stopped(index) if said["stopped"] else None


def _gather(
    server: socket.socket, place: Place, seconds: float, own: str | None = None
) -> str | None:
    """Waits for the others, and tells them and returns what is wrong; None if nothing is.

    If this process has a problem of its `own`, it waits for all of them, to tell them that.
    """
    others, start, hinted, problem = _Others(place), time.monotonic(), own is not None, own
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(server, selectors.EVENT_READ)
        while others.missing() and problem == own:
            passed, missing = time.monotonic() - start, _listed(others.missing())
            if passed > seconds:
                said = f"the processes of the run do not meet at {place.coordinator}"
                problem = own or f"{said}: {missing} did not come"
                break
            if passed > HINT_SECONDS and not hinted:
                hinted = True
                _say(f"still waiting for {missing} of the run at {place.coordinator}")
            for key, _ in selector.select(0.5):
                if key.fileobj is server:
                    connection = stack.enter_context(server.accept()[0])
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection: Any = key.fileobj
                found = others.hear(connection)
                problem = problem or found
                if found or connection not in others.said:
                    selector.unregister(connection)
        for connection in others.said:
            _send(connection, {"problem": problem})
        for connection in others.said:  # they close first, so that the port is free
            connection.settimeout(5)
            with suppress(OSError):
                connection.recv(1)
    return problem


def _ask(place: Place, seconds: float, stopped: bool = False) -> str | None:
    """Says to process 0 that this one is there or has `stopped`, and returns what is wrong."""
    start, hinted = time.monotonic(), False
    said = f"the processes of the run do not meet at {place.coordinator}"
    while True:
        try:
            connection = socket.create_connection(place.address, timeout=5)
            break
        except OSError as error:
            reason = error.strerror or error
        passed = time.monotonic() - start
        if passed > seconds:
            raise OSError(f"{said}: process 0 does not answer ({reason})")
        if passed > HINT_SECONDS and not hinted and not stopped:
            hinted = True
            advice = "is it started, with the same --coordinator?"
            _say(f"process 0 does not answer at {place.coordinator} yet ({reason}): {advice}")
        time.sleep(0.3)
    with connection:
        own = {"process": place.index, "processes": place.count, "stopped": stopped}
        _send(connection, own)
        connection.settimeout(max(1.0, seconds - (time.monotonic() - start)) + 5)
        try:
            return json.loads(connection.recv(_LONGEST))["problem"]
        except OSError as error:
            raise OSError(
                f"{said}: process 0 does not answer ({error.strerror or error})"
            ) from None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise OSError(f"{said}: process 0 has ended, or is another program") from None


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # it has ended
        connection.sendall(json.dumps(message).encode())


def _listed(indices: list[int]) -> str:
    some = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {some}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
