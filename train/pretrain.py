"""Pre-train a LLaMA: `python -m train.pretrain`; `--help` lists the flags.

A run's folder gets config.json, metrics.jsonl, tensorboard/, checkpoints/, summary.json, loss.png.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax

from train.config.resolve import load, resolve
from train.config.settings import Pretrain
from train.run import directory as run_directory
from train.run.assemble import assemble
from train.run.cli import run
from train.run.signals import StopRequest
from train.run.training import LESS_MEMORY, Training

_print = partial(print, flush=True)


def main(config: Pretrain) -> int:
    """Starts or resumes a pre-training.

    Returns the exit code: 0; 1 if too many steps in a row were not finite; 128 + the signal's
    number after SIGTERM or Ctrl-C. Raises ValueError for wrong use, before anything is written, and
    OSError if the run's folder cannot be written or the memory is too small.
    """
    config = resolve(config)
    run_directory.check(config)
    if run_directory.finished(config):
        _print(f"the run in {run_directory.directory(config)} is finished: nothing is left to do")
        return 0
    # Before the data and the model are built, so that a signal during that ends the run well, too.
    with StopRequest() as stop, _out_of_memory_as_os_error():
        parts = assemble(config, _print)
        with run_directory.hold(config) as note:
            if note:
                _print(note)
            return Training(config, parts, stop, _print).run()


@contextmanager
def _out_of_memory_as_os_error() -> Iterator[None]:
    """Raises NumPy's and XLA's errors as one that names the flags that help."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise OSError(f"out of memory ({reason}): {LESS_MEMORY}") from error


if __name__ == "__main__":
    run(main, Pretrain, "python -m train.pretrain", load=load)
