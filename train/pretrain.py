"""Pre-train a LLaMA: `python -m train.pretrain`; `--help` lists the flags.

The run's folder holds config.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end,
summary.json and loss.png.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import jax
import numpy as np

from models.llama.config import flops_per_token
from train.config.resolve import Pretrain, Resolved, load, resolve
from train.data.loader import prefetch
from train.data.sequences import START, Position
from train.memory.plan import device_memory, plan
from train.run import directory as run_directory
from train.run.assemble import Parts, assemble
from train.run.checkpoint import Checkpoints
from train.run.cli import run
from train.run.metrics import MetricsLog, evaluation_losses
from train.run.progress import Progress, peak_flops
from train.run.report import peak_memory, report
from train.run.signals import StopRequest
from train.step.mesh import put_batch
from train.step.ordinary import TrainState


def main(config: Pretrain) -> int:
    """Runs, or goes on with, a pre-training.

    Returns:
        The exit code: 0; 1 where too many steps in a row were not finite; 128 + the signal's number
        after SIGTERM or Ctrl-C.

    Raises:
        ValueError: for wrong use; nothing has been written then.
        OSError: if the run's folder cannot be written, or the memory is too small.
    """
    config = resolve(config)
    run_directory.check(config)
    if run_directory.finished(config):
        _print(f"the run in {run_directory.directory(config)} is finished: nothing is left to do")
        return 0
    # Before the data and the model are built: a signal that comes then still ends the run well.
    with StopRequest() as stop, _out_of_memory_as_os_error():
        parts = assemble(config, _print)
        with run_directory.hold(config) as note:
            if note:
                _print(note)
            return _Run(config, parts, stop).main()


LESS_MEMORY = (
    "try a smaller --batch-size or a larger --accumulate, a shorter --seq-len, --layerwise, "
    "--rematerialize, --dtype bfloat16, an --optimizer of 8 bits or a smaller --model"
)


@contextmanager
def _out_of_memory_as_os_error() -> Iterator[None]:
    """NumPy's and XLA's complaints, as one that names the flags that help."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise OSError(f"out of memory ({reason}): {LESS_MEMORY}") from error


def _print(text: str) -> None:
    print(text, flush=True)


@dataclasses.dataclass
class _Host:
    """What the host knows of a run's progress; all of it but `evaluations` is in a checkpoint.

    Attributes:
        step: updates done.
        tokens: targets trained on.
        position: where the data go on.
        peak_memory: most bytes that any process of the run had in use, and how that is known.
        skipped: how many of the updates were not finite, as far as it has been read.
        evaluations: loss by step, also in metrics.jsonl.
        saved: step of the newest checkpoint.
    """

    step: int = 0
    tokens: int = 0
    position: Position = START
    peak_memory: tuple[int, str] = (0, "")
    skipped: int = 0
    evaluations: dict[int, float] = dataclasses.field(default_factory=dict)
    saved: int | None = None


class _TooManySkipped(Exception):
    """More steps in a row were not finite than --max-skipped allows."""


def _skipping(state: TrainState) -> bool:
    """Whether the last step was skipped, because it was not finite."""
    return int(state.optimizer.notfinite_count) > 0


class _Run:
    """One process's part of a run: from its first step or its newest checkpoint on."""

    def __init__(self, config: Resolved, parts: Parts, stop: StopRequest):
        self.config, self.parts, self.stop = config, parts, stop
        self.host = _Host()
        self.directory = run_directory.directory(config)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.clock = 0.0

    def main(self) -> int:
        """Trains, and writes everything that a run leaves behind."""
        config, parts = self.config, self.parts
        train_step = self._compile()
        state = self._restore()
        with ExitStack() as stack:
            run_directory.write_config(config)
            self.metrics = stack.enter_context(closing(MetricsLog(self.directory, self.host.step)))
            self.host.evaluations = evaluation_losses(self.directory)
            self.checkpoints = stack.enter_context(
                Checkpoints(
                    self.directory / "checkpoints", config.keep, _print, self.host.evaluations
                )
            )
            if state is None:
                state = parts.init(jax.random.key(config.seed))
            peak = peak_flops(parts.mesh.devices.flat[0], config.dtype)
            self.progress = stack.enter_context(
                Progress(
                    self.host.step,
                    config.steps,
                    flops_per_token(parts.model, config.seq_len),
                    peak and peak * parts.mesh.size,
                )
            )
            try:
                state = self._train(train_step, state)
            except _TooManySkipped as error:
                self.progress.log(f"stopped: {error}")
                return 1
            self.checkpoints.wait()
        if config.steps not in self.host.evaluations:
            assert self.stop.signum is not None
            _print(
                f"stopped by signal {self.stop.signum} after step {self.host.step}; to go on:\n"
                f"  {run_directory.resume_command(config)}"
            )
            return 128 + self.stop.signum
        self._note_peak_memory()
        report(
            config,
            parts,
            state,
            self.directory,
            _print,
            tokens=self.host.tokens,
            peak_memory=self.host.peak_memory,
        )
        return 0

    def _restore(self) -> TrainState | None:
        """The newest checkpoint's state, and what the host knew; None at a run's beginning."""
        folder = self.directory / "checkpoints"
        if not (self.config.resume and (self.directory / "config.json").exists()):
            return None
        if folder.is_dir():
            abstract = self.parts.abstract
            with Checkpoints(folder, self.config.keep, _print, {}, read_only=True) as checkpoints:
                found = checkpoints.restore(abstract.params, abstract.rest())
            if found is not None:
                step, params, rest, progress = found
                self.host = _Host(
                    step,
                    progress["tokens"],
                    Position(*progress["position"]),
                    tuple(progress["peak_memory"]),
                    int(rest["optimizer"].total_notfinite),
                    saved=step,
                )
                _print(f"resumed from step {step}")
                return TrainState(params=params, **rest)
        _print("the run has no checkpoint yet: starting at step 0")
        return None

    def _train(self, train_step: Callable[..., Any], state: TrainState) -> TrainState:
        config, host = self.config, self.host
        batches = prefetch(
            self.parts.data.batches(host.position), lambda b: put_batch(self.parts.mesh, b)
        )
        self.clock = time.perf_counter()
        with closing(batches):
            while True:
                last = host.step == config.steps
                if (host.step % config.eval_every == 0 or last) and (
                    host.step not in host.evaluations
                ):
                    self._evaluate(state)
                save_due = host.step % config.save_every == 0 and host.step > 0
                # While steps are skipped it is not known whether the weights are any good.
                if (save_due and not _skipping(state)) or last:
                    self._save(state)
                if last or self.stop.signum is not None:
                    break
                try:
                    batch, host.position = next(batches)
                except Exception:
                    # Ctrl-C goes to the worker processes too, which end then.
                    if self.stop.signum is None:
                        raise
                    break
                if self.parts.restart is not None and self._restart_due():
                    state = self.parts.restart(state)
                    self.progress.log(f"adapters merged and begun anew after step {host.step}")
                state, metrics = train_step(state, batch)
                host.step += 1
                self.checkpoints.check()
                self._report_pending()  # of the step before: this one runs meanwhile
                self.pending = (host.step, metrics)
                due = host.step % config.eval_every == 0 or host.step % config.save_every == 0
                if due or host.step == config.steps or self.stop.signum is not None:
                    self._report_pending()
            self._report_pending()
            if self.stop.signum is not None:
                self._save(state)
        return state

    def _restart_due(self) -> bool:
        """Whether the updates that were applied are a multiple of --restart-every."""
        host, every = self.host, self.config.restart_every
        assert every is not None
        # Of the step that runs it is not known yet whether it was skipped: it is waited for where
        # that matters.
        if host.step == 0 or (host.step - host.skipped) % every > 1:
            return False
        self._report_pending()
        applied = host.step - host.skipped
        return applied > 0 and applied % every == 0

    def _compile(self) -> Callable[..., Any]:
        """The step, compiled, and what it will take of the memory said, before any is taken.

        Raises:
            OSError: if a device has less.
        """
        start, parts = time.perf_counter(), self.parts
        compiled = parts.train_step.lower(parts.abstract, parts.batch).compile()
        _print(f"compiled the step in {time.perf_counter() - start:.1f} s")
        planned = plan(self.config, parts, compiled.memory_analysis())
        sizes = (f"{name} {size / 1e9:,.3f}" for name, size in planned.parts().items())
        there = device_memory(parts.mesh.devices.flat[0])
        _print(
            f"memory of one device, GB: {', '.join(sizes)}; at its peak {planned.peak / 1e9:,.3f}"
        )
        if planned.peak > there:
            raise OSError(
                f"a step would take {planned.peak / 1e9:,.1f} GB of {there / 1e9:,.1f}: "
                f"{LESS_MEMORY}; `python -m train.plan --model {self.config.model} --card GIB` "
                "finds what fits"
            )
        return compiled

    def _report_pending(self) -> None:
        """Waits for the step that runs, and writes what is to be said of it."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        now = time.perf_counter()
        tokens = round(values["tokens"])
        self.host.tokens += tokens
        in_a_row = values.pop("skipped_in_a_row")
        self.host.skipped = values["skipped"]
        line = {
            "step": step,
            **values,
            "tokens": self.host.tokens,
            "tokens_per_second": tokens / (now - self.clock),
        }
        self.clock = now
        self.metrics.write(line)
        self.progress.step(line, show=step % self.config.log_every == 0 or in_a_row > 0)
        if in_a_row >= self.config.max_skipped:
            raise _TooManySkipped(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; "
                f"{self._last_good(step - in_a_row)}; "
                "try a lower --learning-rate, a longer --warmup-steps or --dtype float32"
            )

    def _last_good(self, applied: int) -> str:
        """Names the newest checkpoint before the last step that was applied.

        One of that step's outcome may hold the very weights that no further step can be made from.
        """
        self.checkpoints.wait()
        good = [step for step in self.checkpoints.steps() if step < applied]
        if not good:
            return "there is no good checkpoint"
        return f"the last good checkpoint is {self.directory / 'checkpoints' / str(good[-1])}"

    def _evaluate(self, state: TrainState) -> None:
        losses, tokens = [], []
        for batch in self.parts.evaluation:
            loss, count = self.parts.eval_step(state.params, put_batch(self.parts.mesh, batch))
            losses.append(loss)
            tokens.append(count)
            if self.stop.signum is not None:
                return  # after --resume it is done from its beginning
        mean = float(np.sum(jax.device_get(losses), dtype=np.float64) / np.sum(tokens))
        host = self.host
        host.evaluations[host.step] = mean
        perplexity = math.exp(mean) if mean < 700 else math.inf
        self.metrics.write({"step": host.step, "eval_loss": mean, "eval_perplexity": perplexity})
        self.metrics.flush()
        self.progress.log(
            f"evaluation after step {host.step}: loss {mean:.4f}, perplexity {perplexity:,.2f}"
        )
        self.clock = time.perf_counter()

    def _save(self, state: TrainState) -> None:
        host = self.host
        if host.saved == host.step:
            return
        self._note_peak_memory()
        self.checkpoints.save(
            host.step,
            state.params,
            state.rest(),
            {"tokens": host.tokens, "position": host.position, "peak_memory": host.peak_memory},
            prune=not _skipping(state),
        )
        host.saved = host.step
        self.clock = time.perf_counter()

    def _note_peak_memory(self) -> None:
        self.host.peak_memory = max(
            self.host.peak_memory, peak_memory(self.parts.mesh.devices.flat[0])
        )


if __name__ == "__main__":
    run(main, Pretrain, "python -m train.pretrain", load=load)
