"""Checkpoints with Orbax: written in the background, the newest few and the best one kept.

A checkpoint has `params`, `rest` (the other fields of the train state) and `progress` (JSON: what
the host knows, the format's number, the step and the run). All three have the mark of the step and
the run, so that parts of several are not mixed. Orbax renames a checkpoint from a temporary name
when it is complete. Evaluation losses are in metrics.jsonl: a step may be evaluated after it is
saved.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.run.cli import one_line

Tree = Any

# Raise it whenever the layout of the train state or of `progress` changes. Checkpoints before 2
# have no number.
FORMAT = 3


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
        self._log = log
        self._keep, self._evaluations, self._prune = keep, evaluations, True
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
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
            for damaged in [other for other in self._manager.all_steps() if other >= step]:
                self._manager.delete(damaged)
            made = {"step": step, "run": self._run}
            params, rest = ({"mark": _mark(made), "tree": tree} for tree in (params, rest))
            progress = {"format": FORMAT, **made, "progress": progress}
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),  # pyrefly: ignore
                    rest=ocp.args.StandardSave(rest),  # pyrefly: ignore
                    progress=ocp.args.JsonSave(progress),  # pyrefly: ignore
                ),
            )
        if not saved:
            raise OSError(f"checkpoint of step {step} in {self.directory}: Orbax refused it")

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
        return sorted(self.steps(), key=self._rank)

    def _rank(self, step: int) -> tuple[float, int]:
        loss = self._evaluations.get(step, math.inf)
        return (loss if math.isfinite(loss) else math.inf, -step)

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        """Says which checkpoints Orbax keeps."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        # `_rank` puts the newest first where no step has been evaluated.
        kept = {*steps[-self._keep :], *sorted(steps, key=self._rank)[:1]}
        return [not self._prune or checkpoint.step in kept for checkpoint in checkpoints]

    def restore(self, params: Tree, rest: Tree) -> tuple[int, Tree, Tree, dict[str, Any]] | None:
        """Reads the newest checkpoint that is not damaged; None if there is no checkpoint.

        `params` and `rest` are trees of `ShapeDtypeStruct`s with the shardings to restore to.
        Returns the step, both, and the progress. Raises ValueError if the checkpoint has another
        format, model or optimizer, or if all are damaged.
        """
        steps = self.steps()
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

    def _read(self, step: int, wanted: Mapping[str, Tree]) -> Mapping[str, Any] | None:
        """The items of a checkpoint, or None if it is damaged."""
        path = self.directory / str(step)
        try:
            args = ocp.args.Composite(progress=ocp.args.JsonRestore())  # pyrefly: ignore
            found = dict(self._manager.restore(step, args=args)["progress"])
            metadata = self._manager.item_metadata(step)
            unreadable = [name for name in wanted if metadata[name] is None]
            if unreadable:
                raise ValueError(f"{', '.join(unreadable)} cannot be read")
            stored = {name: metadata[name].tree for name in wanted}
        except Exception as error:  # Orbax and TensorStore raise a dozen unrelated types
            return self._log_damage(step, error)
        if (written := found.get("format", 1)) != FORMAT:
            raise ValueError(
                f"{path} has checkpoint format {written}, this version reads "
                f"format {FORMAT}: start a new run in another folder, or use the version of "
                "galore-optax that wrote it"
            )
        made = {name: found[name] for name in ("step", "run")}
        for name, tree in wanted.items():
            _check_same(path, _shapes(stored[name]["tree"]), _shapes(tree))
        self._check_made(path, made)
        mark = _mark(made)
        items = {name: {"mark": np.zeros_like(mark), "tree": x} for name, x in wanted.items()}
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}  # pyrefly: ignore
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
            trees = {name: items[name]["tree"] for name in wanted}
            marks = {name: int(items[name]["mark"]) for name in wanted}
        except Exception as error:
            return self._log_damage(step, error)
        if mixed := [name for name in wanted if marks[name] != mark]:
            raise ValueError(f"{path / mixed[0]} is of another checkpoint: copy it again, whole")
        return {**trees, "progress": found["progress"]}

    def _check_made(self, path: Path, made: Mapping[str, Any]) -> None:
        """Raises ValueError if a checkpoint was made at another step or by another run."""
        if path.name != str(made["step"]):
            raise ValueError(f"{path} is the checkpoint of step {made['step']}: rename it back")
        for name, value in self._run.items():
            if (there := made["run"].get(name)) != value:
                raise ValueError(
                    f"{path} is a checkpoint of another run: {name} is {there!r} there and "
                    f"{value!r} here; restore what was there, or start a new run in another folder"
                )

    def _log_damage(self, step: int, error: Exception) -> None:
        reason = one_line(error)
        reason = reason if len(reason) < 120 else reason[:117] + "..."
        self._log(f"checkpoint {step} is damaged and passed over ({reason})")


def _mark(made: Mapping[str, Any]) -> np.ndarray:
    """A number that only checkpoints of equal settings and step share."""
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    return np.frombuffer(digest.digest()[:4], np.uint32).reshape(())


def _shapes(tree: Tree) -> dict[str, str]:
    """Each leaf's name and shape; the types of containers are not stored, so they are left out."""

    def leaf_shape(leaf: Any) -> str:
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return "key" if key else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf_shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _check_same(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    names = sorted({*stored, *wanted})
    pairs = [(stored.get(name, "absent"), wanted.get(name, "absent"), name) for name in names]
    # A random key is stored as the integers in it.
    different = [x for x in pairs if x[0] != x[1] and (x[1] != "key" or x[0] == "absent")]
    if different:
        there, here, name = different[0]
        raise ValueError(
            f"{path} is a checkpoint of another model or optimizer: {name} is {there} there and "
            f"{here} here ({len(different)} differ)"
        )


@contextmanager
def _as_os_error(directory: Path) -> Iterator[None]:
    """Turns write errors of Orbax and TensorStore into an OSError with a message of one line."""
    try:
        yield
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore
        reason = os.strerror(int(code[1])) if code else one_line(error)
        raise OSError(f"cannot write a checkpoint to {directory}: {reason}") from error
