"""A run's training: the loop over its batches, with evaluations, checkpoints and the report."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np

from train.config.resume import default_of
from train.config.settings import ResolvedTraining, read_fields, to_json
from train.data.loader import prefetch
from train.data.sequences import Position, Positions
from train.memory.cards import peak_flops
from train.memory.plan import compiled_steps, device_memory, plan
from train.memory.units import in_words
from train.run import directory as run_directory
from train.run import hosts
from train.run.checkpoint import Checkpoints
from train.run.metrics import (
    MetricsLog,
    evaluation_losses,
    given_up,
    has_evaluation,
    keep_own,
    read_metrics,
    score,
    stalled,
)
from train.run.parts import Log, Parts
from train.run.profiling import Profiler
from train.run.progress import Progress
from train.run.report import peak_memory, report
from train.run.signals import NAMES, StopRequest
from train.run.subspaces import Subspaces
from train.run.tracking import start_tracker
from train.step.choice import BySize, Steps
from train.step.mesh import put_batch
from train.step.skipping import skipping
from train.step.state import TrainState


@dataclasses.dataclass
class Host:
    """What the host knows of a run's progress; a checkpoint has all of it."""

    step: int = 0
    tokens: int = 0  # targets trained on
    position: Positions | None = None  # of the next batch; None: the first
    peak_memory: tuple[int, str] = (0, "")  # most bytes of any process, and how they were found
    skipped: int = 0  # as far as metrics have been read
    evaluations: dict[int, float] = dataclasses.field(default_factory=dict)  # `score` by step
    saved: int | None = None  # step of the newest checkpoint


class _TooManySkipped(Exception):
    """--max-skipped steps in a row were not finite."""


class Training:
    """One process's part of a run: from its first step or its newest checkpoint on."""

    def __init__(self, config: ResolvedTraining, parts: Parts, stop: StopRequest, log: Log):
        self.config, self.parts, self.stop, self.log = config, parts, stop, log
        self.host = Host()
        self.directory = run_directory.directory(config)
        self.folder = self.directory / "checkpoints"
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.shared_stop = hosts.SharedStop(stop, parts.mesh)
        self.stopped_by: signal.Signals | None = None
        self.metrics: MetricsLog | None = None
        self.clock = 0.0
        self.ended = False  # all steps are done, or --patience is over
        self.subspaces: Subspaces | None = None
        self.gave_up = False  # when the run was here before

    def run(self) -> int:
        """Trains, writes all that a run leaves, and returns the exit code."""
        config, parts = self.config, self.parts
        train_step = self.compile()
        # Before anything is written: weights of --init may not fit.
        state = self.restore() or parts.initial()
        with ExitStack() as stack:
            with hosts.together():
                if hosts.is_first():
                    changed = run_directory.write_config(config, parts.kept, self.host.step)
                    if changed:
                        self.log(f"changed after step {self.host.step}: {', '.join(changed)}")
            checkpoints = Checkpoints(
                self.folder, config.keep, self.log, self.host.evaluations, run=parts.made_with
            )
            self.checkpoints = stack.enter_context(checkpoints)
            if self.gave_up:  # before metrics.jsonl, which says so, is cut
                self.checkpoints.drop_after(self.host.step)
            with hosts.together():
                if hosts.is_first():
                    self.metrics = stack.enter_context(closing(self._metrics_log()))
            traced = config.profile if hosts.is_first() else None
            self.profiler = Profiler(self.directory / "profile", traced, self.log)
            stack.enter_context(closing(self.profiler))
            if config.energy_every is not None:
                self.subspaces = Subspaces(config, parts, self.directory, self.host.step, self.log)
            peak = peak_flops(parts.mesh.devices.flat[0].device_kind, config.dtype)
            at_peak = peak and peak * parts.mesh.size / parts.flops_per_token()
            quiet = not hosts.is_first()
            self.progress = Progress(self.host.step, config.steps, at_peak, quiet=quiet)
            stack.enter_context(self.progress)
            try:
                state = self._train(train_step, state)
            except _TooManySkipped as error:
                self.progress.log(f"stopped: {error}")
                return 1
            self.checkpoints.wait()
        if not self.ended:
            assert self.stopped_by is not None
            self.log(
                f"stopped by {NAMES[self.stopped_by]} after step {self.host.step}; to resume:\n"
                f"  {run_directory.resume_command(config)}"
            )
            return 128 + self.stopped_by
        self._note_peak_memory()
        if hosts.is_first():
            host = self.host
            report(config, parts, state, self.log, host.tokens, host.peak_memory, self.planned)
        return 0

    def _metrics_log(self) -> MetricsLog:
        settings = {k: v for k, v in to_json(self.config).items() if v is not None}
        tracker = start_tracker(self.config.track, self.directory, settings)
        host, metric = self.host, self.parts.metric
        keep_own(self.directory, host.step, host.evaluations, metric)
        return MetricsLog(self.directory, settings, tracker)

    def compile(self) -> Callable[..., Any]:
        """Compiles the step, prints the memory that it will take; OSError if a device has less."""
        start, parts = time.perf_counter(), self.parts
        self.log("compiling the step ...")
        compiled = compiled_steps(parts)
        self.log(f"compiled the step in {time.perf_counter() - start:.1f} s")
        planned = plan(self.config, parts, compiled)
        self.planned = planned.peak
        sizes = ", ".join(f"{k} {in_words(size)}" for k, size in planned.parts().items() if size)
        self.log(f"memory of one device: {sizes}; at its peak {in_words(planned.peak)}")
        available = device_memory(parts.mesh.local_devices[0])
        if planned.peak > available:
            raise OSError(
                f"a step would take {planned.peak / 2**30:,.1f} GiB of {available / 2**30:,.1f}: "
                + parts.less_memory(available)
            )
        programs = [parts.train_step, parts.step_without_refresh]
        steps = [BySize(p, parts.batch, c) for p, c in zip(programs, compiled, strict=False)]
        return Steps(*steps) if len(steps) > 1 else steps[0]

    def restore(self) -> TrainState | None:
        """The newest checkpoint's state, and what the host knew; None for a new run."""
        if not (self.config.resume and (self.directory / "config.json").exists()):
            return None
        found, abstract = None, self.parts.abstract
        before = read_fields(self.directory / "config.json")
        skipped = before.get("max_skipped", default_of("max_skipped"))
        ruined = given_up(read_metrics(self.directory), skipped)
        self.gave_up = ruined is not None
        if self.folder.is_dir():
            run = self.parts.made_with
            with Checkpoints(self.folder, 1, self.log, {}, run=run, read_only=True) as checkpoints:
                found = checkpoints.restore(abstract.params, abstract.rest(), before=ruined)
        if found is None:
            what = "good checkpoint" if self.gave_up else "checkpoint yet"
            self.log(f"the run has no {what}: starting at step 0")
            return None
        step, params, rest, progress = found
        if step > self.config.steps:
            raise ValueError(f"--steps {self.config.steps}: the run has done {step} already")
        position = progress["position"]
        position = None if position is None else tuple(Position(*part) for part in position)
        peak = tuple(progress["peak_memory"])
        skipped = int(rest["optimizer"].total_notfinite)
        found = progress.get("evaluations")  # None: of an older version
        if found is None:
            found = evaluation_losses(self.directory, self.parts.metric, step).items()
        known = {n: math.nan if x is None else x for n, x in found}
        # The summary has that line: the step is evaluated again where it was lost.
        if not has_evaluation(self.directory, step, known, self.parts.metric):
            known.pop(step, None)
        self.host = Host(step, progress["tokens"], position, peak, skipped, known, saved=step)
        why = ", the last good checkpoint" if self.gave_up else ""
        self.log(f"resumed from step {step}{why}")
        return TrainState(params=params, **rest)

    def _train(self, train_step: Callable[..., Any], state: TrainState) -> TrainState:
        config, host = self.config, self.host
        batches = prefetch(
            self.parts.data.batches(host.position), lambda b: put_batch(self.parts.mesh, b)
        )
        self.clock = time.perf_counter()
        with closing(batches):
            while True:
                last = host.step == config.steps
                evaluates = host.step % config.eval_every == 0 or last
                saves = (host.step % config.save_every == 0 and host.step > 0) or last
                if evaluates or saves:
                    self.report_pending()
                if evaluates and host.step not in host.evaluations:
                    self.evaluate(state)
                self._sample(state)
                if not last and self.out_of_patience():
                    last = saves = True
                # While steps are skipped, the weights may be unusable.
                if saves and (last or not skipping(state.optimizer)):
                    self._save(state)
                self.ended = last and host.step in host.evaluations
                self.stopped_by = self.shared_stop()
                if last or self.stopped_by is not None:
                    break
                try:
                    batch, host.position = next(batches)
                except Exception:
                    if hosts.several():  # the others may have no error, and save nothing
                        raise
                    # Ctrl-C reaches the worker processes too, and ends them.
                    if self.stop.signum is None:
                        self.report_pending()
                        self._save(state)
                        raise
                    self.stopped_by = signal.Signals(self.stop.signum)
                    break
                if self.parts.restart is not None and self.restart_due():
                    state = self.parts.restart(state)
                    self.progress.log(f"adapters merged and reset after step {host.step}")
                if self.subspaces and host.step % (config.energy_every or 1) == 0:
                    self.report_pending()
                    self.subspaces.measure(host.step, state, batch)
                    self.clock = time.perf_counter()
                self.profiler.next_step(state)
                state, metrics = train_step(state, batch)
                host.step += 1
                self.checkpoints.check()
                self.report_pending()  # the step before, while this one runs
                self.pending = (host.step, metrics)
            self.report_pending()
            if self.stopped_by is not None:
                self._save(state)
        return state

    def out_of_patience(self) -> bool:
        """Whether the last --patience evaluations, one of them now, were no better than before."""
        patience, found = self.config.patience, self.host.evaluations
        # Resumed between two evaluations with less patience, a run goes on to the next one.
        if patience is None or self.host.step not in found or not stalled(found, patience):
            return False
        self.progress.log(f"ended after step {self.host.step}: no better in {patience} evaluations")
        return True

    def restart_due(self) -> bool:
        """Whether the number of applied updates is a multiple of --restart-every."""
        host, every = self.host, self.config.restart_every
        assert every is not None
        # The running step may still be skipped: it is waited for only if that matters.
        if host.step == 0 or (host.step - host.skipped) % every > 1:
            return False
        self.report_pending()
        applied = host.step - host.skipped
        return applied > 0 and applied % every == 0

    def report_pending(self) -> None:
        """Waits for the running step, and writes its metrics."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        before, self.clock = self.clock, time.perf_counter()
        tokens, in_a_row = round(values["tokens"]), values.pop("skipped_in_a_row")
        self.host.tokens += tokens
        self.host.skipped = values["skipped"]
        seconds = self.clock - before
        speed = tokens / seconds
        line = {"step": step, **values, "tokens": self.host.tokens, "tokens_per_second": speed}
        self.write(line)
        show = step % self.config.log_every == 0 or in_a_row > 0
        self.progress.step(line, tokens, seconds, show)
        if in_a_row >= self.config.max_skipped:
            half = self.config.learning_rate / 2
            raise _TooManySkipped(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; "
                f"{self._last_good(step - in_a_row)} with a lower learning rate (a longer "
                "--warmup-steps may help, too, or --dtype float32 in a new run):\n"
                f"  {run_directory.resume_command(self.config)} --learning-rate {half:g}"
            )

    def write(self, line: dict[str, float]) -> None:
        """Writes a line of metrics, in the run's first process."""
        if self.metrics is not None:
            self.metrics.write(line)

    def _last_good(self, applied: int) -> str:
        """Names the newest checkpoint before the last applied step, whose weights may be ruined."""
        self.checkpoints.wait()
        good = [step for step in self.checkpoints.steps() if step < applied]
        if good:
            return f"the last good checkpoint is {self.folder / str(good[-1])}; to go on from there"
        return "there is no good checkpoint; to begin again"

    def evaluate(self, state: TrainState) -> None:
        """Evaluates the weights, unless a stop is requested meanwhile: then nothing is noted."""
        found = self.parts.evaluate(state.params, self._stops_evaluation)
        if found is None:
            return  # --resume repeats it
        step = self.host.step
        self.host.evaluations[step] = score(found.values, self.parts.metric)
        self.write({"step": step, **found.values})
        self.progress.log(f"evaluation after step {step}: {found.said}")
        self.clock = time.perf_counter()

    def _stops_evaluation(self) -> bool:
        # Several processes would notice a signal at different batches.
        return self.stop.signum is not None and not hosts.several()

    def _sample(self, state: TrainState) -> None:
        """Samples from the weights after each --sample-every steps; at the end the report does."""
        step, every = self.host.step, self.parts.sample_every
        if every is None or not 0 < step < self.config.steps or step % every:
            return
        self.report_pending()
        self.progress.log(f"after step {step}:")
        self.parts.keep_sample(state.params, step, self.progress.log)
        self.clock = time.perf_counter()

    def _save(self, state: TrainState) -> None:
        host = self.host
        if host.saved == host.step:
            return
        self._note_peak_memory()
        progress: dict[str, Any] = {"tokens": host.tokens, "peak_memory": host.peak_memory}
        progress["position"] = hosts.furthest(host.position)
        known = host.evaluations.items()
        progress["evaluations"] = [(n, x if math.isfinite(x) else None) for n, x in known]
        prune = not skipping(state.optimizer)
        self.checkpoints.save(host.step, state.params, state.rest(), progress, prune=prune)
        host.saved = host.step
        self.clock = time.perf_counter()

    def _note_peak_memory(self) -> None:
        here = peak_memory(self.parts.mesh.local_devices[0])
        self.host.peak_memory = max(self.host.peak_memory, here)
