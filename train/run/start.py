"""Starts or resumes a run of any command that trains, with its other processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import jax

from train.config.settings import ResolvedTraining, flag, to_json
from train.run import directory as run_directory
from train.run import hosts
from train.run.parts import Log, Parts
from train.run.signals import StopRequest
from train.run.tracking import check_tracker
from train.run.training import Training

Config = TypeVar("Config", bound=ResolvedTraining)


def train(config: Config, assemble: Callable[[Config, Log], Parts], log: Log) -> int:
    """Starts or resumes a run, of which `assemble` makes the parts.

    Returns the exit code: 0; 1 if too many steps in a row were not finite; 128 + the signal's
    number after SIGTERM, Ctrl-C or SIGHUP. Raises ValueError for wrong use, before anything is
    written, and OSError if the run's folder cannot be written or the memory is too small.
    """
    hosts.join(config)
    log = log if hosts.is_first() else _silent
    with hosts.together():
        if hosts.is_first():
            check_tracker(config.track)
            run_directory.check(config)
    with hosts.together():
        where = {"--out": config.out, "--resume": config.resume}
        hosts.check_same({**where, "files in --out": run_directory.seen(config)})
    if run_directory.finished(config):
        log(f"the run in {run_directory.directory(config)} is finished: nothing is left to do")
        return 0
    # Before the data and the model are built, so that a signal during that ends the run well, too.
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(_out_of_memory_as_os_error(config.less_memory))
        stack.enter_context(hosts.peers_loss_as_os_error())
        with hosts.together():
            parts = assemble(config, log)
            for name in ("sample_every", "energy_every") if hosts.several() else ():
                if (every := getattr(config, name, None)) is not None:
                    reason = "each of several processes has a part of the weights"
                    raise ValueError(f"{flag(name)} {every}: {reason}; leave it out")
        with hosts.together():
            hosts.check_same({**to_json(config), **parts.made_with})
        with hosts.together():
            if hosts.is_first() and (note := stack.enter_context(run_directory.hold(config))):
                log(note)
        return Training(config, parts, stop, log).run()


def _silent(_: str) -> None:
    """Prints nothing: what the run's first process prints."""


@contextmanager
def _out_of_memory_as_os_error(advice: str) -> Iterator[None]:
    """Raises NumPy's and XLA's errors as one that names the flags that help."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise OSError(f"out of memory ({reason}): {advice}") from error
