"""Checkpoints with Orbax: written in the background, the newest few and the best one kept.

A checkpoint has `params`, `rest` (the other fields of the train state) and `progress` (JSON: what
the host knows, the format's number, the step and the run; shape and checksum of each array; and a
checksum of all that). Orbax renames a checkpoint from a temporary name when it is complete.
A run's checkpoint also has the losses of the evaluations before it. A step may be evaluated after
it is saved: that loss is in metrics.jsonl alone.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.config.resume import default_of
from train.memory.plan import device_memory
from train.memory.units import in_words
from train.run import hosts
from train.run.checksums import check, checksums, leaf_names, sealed
from train.run.cli import one_line
from train.step.eight_bits import shared_out
from train.step.mesh import replicated

Tree = Any

# Raise it whenever the layout of the train state or of `progress` changes. Checkpoints before 2
# have no number.
FORMAT = 5
# Seconds. Orbax measures them by the wall clock: a write would fail when that is set forward.
_NO_TIMEOUT = 10**8


class Checkpoints(checkpoint_managers.PreservationPolicy):
    """The checkpoints of a run in a folder, which the first save makes unless it is `read_only`.

    The newest `keep` and the one with the lowest evaluation loss are kept. `evaluations` has the
    loss of each evaluated step; the caller adds later ones. `log` prints which are damaged.
    `run` has what a checkpoint was made with and must be read with, as JSON values: a checkpoint
    that was made with another value for one of its keys is refused.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        log: Callable[[str], object],
        evaluations: Mapping[int, float],
        *,
        run: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ):
        self.directory, self._run = directory.absolute(), dict(run or {})
        self._log, self._made = log, {}  # what the newest checkpoint was made with, once read
        self._keep, self._evaluations, self._prune = keep, evaluations, True
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                async_options=ocp.AsyncOptions(timeout_secs=_NO_TIMEOUT),
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "rest": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.wait()
        elif jax.process_count() > 1:
            return  # closing it would wait for the other processes
        self._manager.close()

    def save(
        self, step: int, params: Tree, rest: Tree, progress: Tree, *, prune: bool = True
    ) -> None:
        """Copies all to the host and writes it in the background; OSError if a write has failed.

        `progress` has JSON values. Unless `prune`, no older checkpoint is deleted.
        """
        self._prune = prune
        with _as_os_error(self.directory):
            # Orbax refuses steps up to its newest, which may be damaged checkpoints that the run
            # skipped when it was resumed.
            self._drop(step)
            content = {
                "format": FORMAT,
                "step": step,
                "run": self._run,
                "progress": progress,
                "params": _described(params),
                "rest": _described(rest),
            }
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),  # pyrefly: ignore
                    rest=ocp.args.StandardSave(rest),  # pyrefly: ignore
                    progress=ocp.args.JsonSave(sealed(content)),  # pyrefly: ignore
                ),
            )
        if not saved:
            raise OSError(f"checkpoint of step {step} in {self.directory}: Orbax refused it")

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps; OSError if it cannot."""
        with _as_os_error(self.directory):
            self._drop(step + 1)

    def _drop(self, first: int) -> None:
        for step in [step for step in self._manager.all_steps() if step >= first]:
            self._manager.delete(step)

    def check(self) -> None:
        """Raises OSError if writing in the background has failed."""
        with _as_os_error(self.directory):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is written; raises OSError if it could not be."""
        with _as_os_error(self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete by their names, oldest first."""
        return sorted(self._manager.all_steps())

    def best_first(self) -> list[int]:
        """Steps with the lowest evaluation loss first, then those without, newest first."""
        return sorted(self.steps(), key=partial(_rank, self._trusted()))

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        """Says which checkpoints Orbax keeps."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        # `_rank` puts the newest first where no step has been evaluated.
        kept = {*steps[-self._keep :], *sorted(steps, key=partial(_rank, self._evaluations))[:1]}
        return [not self._prune or checkpoint.step in kept for checkpoint in checkpoints]

    def restore(
        self, params: Tree, rest: Tree, *, before: int | None = None
    ) -> tuple[int, Tree, Tree, dict[str, Any]] | None:
        """Reads the newest checkpoint that is not damaged; None if there is no checkpoint.

        Only those of steps `before` a step count. `params` and `rest` are trees of
        `ShapeDtypeStruct`s with the shardings to restore to. Returns the step, both, and the
        progress. Raises ValueError if the checkpoint has another format, model or optimizer, or if
        all are damaged.
        """
        steps = [step for step in self.steps() if before is None or step < before]
        for step in reversed(steps):
            if found := self._read(step, {"params": params, "rest": rest}):
                return step, found["params"], found["rest"], found["progress"]
        if steps:
            advice = "restore one from a copy, or start a new run in another folder"
            raise ValueError(f"no checkpoint in {self.directory} can be read: {advice}")
        return None

    def restore_params(self, params: Tree) -> tuple[int, Tree]:
        """Reads the weights of the best checkpoint, or of the newest if none was evaluated."""
        for step in self.best_first():
            if found := self._read(step, {"params": params}):
                return step, found["params"]
        raise ValueError(f"there is no checkpoint in {self.directory} that can be read")

    def _trusted(self) -> Mapping[int, float]:
        """The evaluations that the newest checkpoint knows, and those of its step and later ones.

        metrics.jsonl may have lines of another run.
        """
        for step in reversed(self.steps()):
            with suppress(Exception):  # it is damaged
                newest = self._progress(step)
                self._made = newest.get("run", {})
                known = newest["progress"].get("evaluations")
                if known is None:  # of an older version
                    break
                found = {n: x for n, x in self._evaluations.items() if n >= step}
                return found | {n: math.nan if x is None else x for n, x in known}
        return self._evaluations

    def _progress(self, step: int) -> dict[str, Any]:
        """What a checkpoint has besides arrays; any exception if it is damaged."""
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())  # pyrefly: ignore
        found = dict(self._manager.restore(step, args=args)["progress"])
        if (found.get("format", 1) == FORMAT or "checksum" in found) and found != sealed(found):
            raise ValueError("progress is not what was saved")
        return found

    def _read(self, step: int, wanted: Mapping[str, Tree]) -> Mapping[str, Any] | None:
        """The items of a checkpoint, or None if it is damaged."""
        path = self.directory / str(step)
        found = self._attempt(step, lambda: self._progress(step))
        if found is None:
            return None
        if (written := found.get("format", 1)) != FORMAT:
            raise ValueError(
                f"{path} has checkpoint format {written}, this version reads "
                f"format {FORMAT}: start a new run in another folder, or use the version of "
                "galore-optax that wrote it"
            )
        self._check_made(path, found)  # first: another tokenizer gives other shapes, too
        kept = wanted.get("rest", {}).get("unsent")
        if kept is not None:
            unsent = unsent_as_saved(path, kept, found["rest"])
            wanted = {**wanted, "rest": {**wanted["rest"], "unsent": unsent}}
        for name, tree in wanted.items():
            _check_same(path, {k: shape for k, (shape, _) in found[name].items()}, _shapes(tree))
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}  # pyrefly: ignore
        args = ocp.args.Composite(**args)
        items = self._attempt(step, lambda: dict(self._manager.restore(step, args=args)))
        if items is None:
            return None
        try:
            for name in wanted:
                check(name, items[name], {k: sum_ for k, (_, sum_) in found[name].items()})
        except ValueError as error:
            return self._log_damage(step, _short(error))
        items = {name: items[name] for name in wanted}
        if kept is not None and kept != wanted["rest"]["unsent"]:
            items["rest"]["unsent"] = shared_out(items["rest"]["unsent"], kept)
        return {**items, "progress": found["progress"]}

    def _attempt(self, step: int, read: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `read` returns; None if it fails.

        OSError instead in one of several processes, as the others wait in Orbax for its end.
        """
        try:
            with hosts.peers_loss_as_os_error():
                return read()
        except hosts.PeerLost:
            raise
        except Exception as error:  # Orbax and TensorStore raise a dozen unrelated types
            if hosts.several():
                advice = "move it away, and start all processes again with --resume"
                path = self.directory / str(step)
                raise OSError(f"{path} cannot be read ({_short(error)}): {advice}") from error
            return self._log_damage(step, _short(error))

    def _check_made(self, path: Path, made: Mapping[str, Any]) -> None:
        """Raises ValueError if a checkpoint was made at another step or by another run."""
        if path.name != str(made["step"]):
            raise ValueError(f"{path} is the checkpoint of step {made['step']}: rename it back")
        newest = {name: x for name, x in self._made.items() if name in made["run"]}
        for name, value in {**newest, **self._run}.items():
            if (there := made["run"].get(name, default_of(name))) != value:
                raise ValueError(
                    f"{path} is a checkpoint of another run: {name} is {there!r} there and "
                    f"{value!r} here; restore what was there, or start a new run in another folder"
                )

    def _log_damage(self, step: int, reason: str) -> None:
        self._log(f"checkpoint {step} is damaged and passed over ({reason})")


def _short(error: Exception) -> str:
    reason = one_line(error)
    return reason if len(reason) < 120 else reason[:117] + "..."


def _rank(evaluations: Mapping[int, float], step: int) -> tuple[float, int]:
    loss = evaluations.get(step, math.inf)
    return (loss if math.isfinite(loss) else math.inf, -step)


def _described(tree: Tree) -> dict[str, tuple[str, int]]:
    """Each array's dtype and shape, and its checksum, by name."""
    sums = checksums(tree)
    return {name: (shape, sums[name]) for name, shape in _shapes(tree).items()}


def _shapes(tree: Tree) -> dict[str, str]:
    """Each leaf's dtype and shape, by name."""

    def leaf_shape(leaf: Any) -> str:
        kind = str(leaf.dtype)
        if kind.startswith("key<"):  # a random key, by default of Threefry
            return "key" if kind == "key<fry>" else f"{kind} (of JAX_DEFAULT_PRNG_IMPL)"
        return f"{kind}{list(leaf.shape)}"

    return {name: leaf_shape(leaf) for name, leaf in leaf_names(tree).items()}


def unsent_as_saved(path: Path, unsent: Tree, shapes: Mapping[str, Sequence[Any]]) -> Tree:
    """`TrainState.unsent` as the devices kept it that saved it, which may be others than here.

    ValueError if that is more than a device's memory.
    """
    first = re.match(r"float32\[(\d+)", shapes.get("unsent/0", ("", 0))[0])
    if first is None or not unsent:
        return unsent
    devices, mesh = int(first[1]), unsent[0].sharding.mesh

    def as_saved(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        at = x.sharding if devices % x.shape[0] == 0 else replicated(mesh)
        return x.update(shape=(devices, *x.shape[1:]), sharding=at)

    saved = jax.tree.map(as_saved, unsent)
    size = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in saved)
    if size > device_memory(mesh.local_devices[0]):
        raise ValueError(
            f"{path} has what {devices} devices had not sent yet ({in_words(size)}), more than the "
            f"memory here: resume with --mesh data={devices}"
        )
    return saved


def _check_same(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    names = sorted({*stored, *wanted})
    pairs = [(stored.get(name, "absent"), wanted.get(name, "absent"), name) for name in names]
    if different := [pair for pair in pairs if pair[0] != pair[1]]:
        there, here, name = different[0]
        raise ValueError(
            f"{path} is a checkpoint of another model or optimizer: {name} is {there} there and "
            f"{here} here ({len(different)} differ); restore what was there, or start a new run in "
            "another folder"
        )


@contextmanager
def _as_os_error(directory: Path) -> Iterator[None]:
    """Turns write errors of Orbax and TensorStore into an OSError with a message of one line."""
    try:
        yield
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore
        reason = os.strerror(int(code[1])) if code else _short(error)
        raise OSError(f"cannot write a checkpoint to {directory}: {reason}") from error
