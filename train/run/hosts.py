"""The processes of a run on several hosts: how they join, and what they do and decide together.

Each process is started with the same flags, reads the parts of the text that fill its own rows of a
batch, and puts these on its devices. All compute and write checkpoints; the first alone prints, and
writes the other files of the run.
"""

import argparse
import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config.flags import TrainingFlags
from train.config.settings import flag
from train.data.sequences import Position, Positions
from train.run.meeting import Place, meet, tell
from train.run.signals import StopRequest

# A process that is silent for this time is taken for dead, and the others end.
_HEARTBEAT_SECONDS = 30
# By then all processes must have been started.
_MEETING_SECONDS = 180
# What is in an error of a collective whose other side is gone.
_LOST = ("Gloo", "NCCL", "nccl", "UNAVAILABLE")
# What the processes of torchrun, and of launchers like it, find in their environment.
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")

_AT_END: list[Callable[[], None]] = []
MET: list[Place | None] = []  # where this process has begun to meet the others, if it has


def join(config: TrainingFlags) -> None:
    """Joins the run's other processes, before JAX is used; without flags for it there are none.

    Raises ValueError if the flags, or what the launcher says, do not name the processes, and
    OSError if the others do not answer.
    """
    where = {name: getattr(config, name) for name in ("coordinator", "processes", "process")}
    given = [flag(name) for name, value in where.items() if value is not None]
    if config.launcher and given:
        raise ValueError(f"--launcher says what {', '.join(given)} says: leave one of them out")
    if not config.launcher and len(given) not in (0, len(where)):
        raise ValueError(
            f"{', '.join(given)} without the others: a run of several processes needs "
            "--coordinator HOST:PORT, --processes and --process, or --launcher"
        )
    if config.launcher:
        initialize(_of_launcher())
    elif given:
        count, index = config.processes, config.process
        assert count is not None
        assert index is not None
        if not 0 <= index < count:
            raise ValueError(f"--process {index}: expected 0 to {count - 1}, below --processes")
        assert config.coordinator is not None
        initialize(Place(config.coordinator, count, index))


def _of_launcher() -> Place | None:
    """Where this process is by torchrun's environment; JAX finds it from that of the others."""
    found = {name: os.environ[name] for name in _TORCHRUN if name in os.environ}
    if len(found) < len(_TORCHRUN):
        return None
    address, port, *numbers = found.values()
    local = os.environ.get("LOCAL_RANK")
    try:
        count, index = map(int, numbers)
        device = None if local is None else int(local)
    except ValueError as error:
        raise ValueError(
            f"--launcher: {', '.join(_TORCHRUN)} in the environment: {error}"
        ) from None
    return Place(f"{address}:{port}", count, index, device)


def place_of(args: Sequence[str]) -> Place | None:
    """Where a command's arguments put its process, though they may be wrong otherwise."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--launcher", action="store_true")
    for name in ("--processes", "--process"):
        parser.add_argument(name, type=int)
    try:
        found, _ = parser.parse_known_args(args)
        if found.launcher:
            return _of_launcher()
        place = Place(found.coordinator, found.processes, found.process)
        return place if None not in vars(found).values() and place.address else None
    except (argparse.ArgumentError, ValueError, AttributeError):
        return None


def tell_others(args: Sequence[str]) -> None:
    """Tells the other processes of a command with an error that has not met them yet."""
    place = None if MET else place_of(args)
    if place is not None:
        print("telling the other processes of the run ...", file=sys.stderr, flush=True)
        tell(place)


def initialize(place: Place | None) -> None:
    """Meets the other processes of a run at a place; None is a place that JAX finds out."""
    coordinator = None if place is None else place.coordinator
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator {coordinator}: expected HOST:PORT, such as 10.0.0.1:29500")
    MET.append(place)
    if place is not None:
        print(
            f"waiting for {place.count} processes at {coordinator} ...", file=sys.stderr, flush=True
        )
        meet(place, _MEETING_SECONDS)
    # On CPUs two programs' collectives may not run at once: Gloo would mix up their messages.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    say_if_aborted()
    try:
        jax.distributed.initialize(
            coordinator,
            None if place is None else place.count,
            None if place is None else place.index,
            local_device_ids=None if place is None else place.device,
            initialization_timeout=_MEETING_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
            # There alone, and not at all addresses of the host, as JAX does.
            coordinator_bind_address=coordinator,
        )
    except ValueError as error:
        raise ValueError(
            f"--launcher: the environment has no launcher's variables ({_one_line(error)}): "
            "give --coordinator HOST:PORT, --processes and --process"
        ) from error
    except RuntimeError as error:
        at = "" if coordinator is None else f" at {coordinator}"
        raise OSError(f"the processes of the run do not meet{at}: {_one_line(error)}") from error


def say_if_aborted() -> None:
    """Has a process say what has happened if JAX, Gloo or NCCL aborts this one.

    Where another process of the run is gone, they do, from C++ and with a page of its stack.
    """
    code = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
    text = (
        "error: this process of the run was ended from outside or with an error above, most likely "
        "because another one has ended or did not come: start all of them again, with --resume"
    )
    listener = subprocess.Popen(
        [sys.executable, "-c", code, text], stdin=subprocess.PIPE, start_new_session=True, text=True
    )

    def end_well() -> None:
        assert listener.stdin is not None
        with contextlib.suppress(OSError):
            listener.stdin.write("ended by itself")
            listener.stdin.close()
        listener.wait()

    atexit.register(end_well)
    _AT_END.append(end_well)


def end_alone(code: int) -> None:
    """Ends a process of several with an error of its own; does nothing if there is one process.

    Python would wait at its end for the others, which wait for what this one was to compute.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        for function in _AT_END:
            function()
        os._exit(code)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def several() -> bool:
    """Whether the run has several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that prints, and writes what all would write alike."""
    return jax.process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """All processes leave this without an error, or each with one: none waits for one that ended.

    Raises OSError in those that have no error of their own.
    """
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = raised
    if several():
        from jax.experimental.multihost_utils import process_allgather

        failed = process_allgather(np.asarray(error is not None)).nonzero()[0]
        if error is None and failed.size:
            error = OSError(f"process {failed[0]} of the run has stopped: it says why")
        if error is not None:
            jax.distributed.shutdown()
    if error is not None:
        raise error


def check_same(values: Mapping[str, Any]) -> None:
    """Raises ValueError that names the values in which this process differs from the first one."""
    if not several():
        return
    from jax.experimental.multihost_utils import broadcast_one_to_all

    names = sorted(values)
    texts = [json.dumps([name, values[name]], sort_keys=True) for name in names]
    own = np.array([zlib.crc32(text.encode()) for text in texts], np.uint32)
    # All processes have the same names: settings of one command, and what its parts are made of.
    first = np.asarray(broadcast_one_to_all(own))
    if different := [n for n, x, y in zip(names, own, first, strict=True) if x != y]:
        raise ValueError(
            f"process {jax.process_index()} has other settings or data than process 0 "
            f"({', '.join(different)}): start all with the same flags and files"
        )


def furthest(positions: Positions | None) -> Positions | None:
    """Each part's position in the process that reads it: in others it is where they began."""
    if positions is None or not several():
        return positions
    from jax.experimental.multihost_utils import process_allgather

    numbers = np.array(positions, np.int64).view(np.int32)  # as JAX has none of 64 bits
    found = np.array(process_allgather(numbers)).view(np.int64)
    # Of two positions in one part, the later one is the larger tuple.
    return tuple(Position(*max(part)) for part in zip(*found.tolist(), strict=True))


class PeerLost(OSError):
    """Another process of the run has ended."""


@contextmanager
def peers_loss_as_os_error() -> Iterator[None]:
    """Raises what JAX raises when another process has ended as a PeerLost that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = _one_line(error)
        if not several() or not any(name in text for name in _LOST):
            raise
        raise PeerLost(
            "another process of the run has ended, or cannot be reached: start all of them again "
            f"with --resume ({text[:200]})"
        ) from error


class SharedStop:
    """The signal on which all processes of a run stop, after the same step.

    A signal reaches one process, or all at different steps. So before each step they take the
    largest number of a signal that any has noted, and read it before the next one, so that no step
    waits for it.
    """

    def __init__(self, stop: StopRequest, mesh: Mesh):
        self._stop, self._mesh = stop, mesh
        self._asked: jax.Array | None = None

    def __call__(self) -> signal.Signals | None:
        """The signal to stop on now, if there is one; each process calls this equally often."""
        own = self._stop.signum
        if not several():
            return None if own is None else signal.Signals(own)
        before, self._asked = self._asked, self._largest(own or 0)
        found = 0 if before is None else int(before)
        return signal.Signals(found) if found else None

    @cached_property
    def _maximum(self) -> Callable[[jax.Array], jax.Array]:
        whole = NamedSharding(self._mesh, PartitionSpec())
        return jax.jit(partial(jax.numpy.max, initial=0), out_shardings=whole)

    def _largest(self, number: int) -> jax.Array:
        by_device = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        own = np.full(self._mesh.size, number, np.int32)
        numbers = jax.make_array_from_callback(own.shape, by_device, own.__getitem__)
        return self._maximum(numbers)
