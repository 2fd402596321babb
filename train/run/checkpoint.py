"""Checkpoints with Orbax: written in the background, the newest few and the best one kept.

A checkpoint holds `params`, `rest` (the other fields of the train state) and `progress` (JSON: what
the host knows). Orbax writes it under a temporary name and renames it when it is whole. Which one
is the best is not in it: a run that is stopped while it evaluates saves first and evaluates later.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.run.cli import one_line

Tree = Any


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: where they are; made by the first save.
        keep: how many of the newest are kept, beside the one with the lowest evaluation loss.
        log: is told in one line of what is passed over.
        evaluations: loss of each evaluated step, in which the caller enters later ones.
        read_only: nothing is written or cleaned up.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        log: Callable[[str], object],
        evaluations: Mapping[int, float],
        *,
        read_only: bool = False,
    ):
        self.directory = directory.absolute()
        self._log = log
        self._evaluations = evaluations
        self._preservation = _NewestAndBest(keep, evaluations)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._preservation,
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        self._manager.close()

    def save(
        self,
        step: int,
        params: Tree,
        rest: Tree,
        progress: Mapping[str, Any],
        *,
        prune: bool = True,
    ) -> None:
        """Copies the state to the host and writes it in the background.

        Args:
            step: how many updates are in it.
            params: the weights.
            rest: the other arrays.
            progress: what JSON can hold.
            prune: whether older ones make way for it.

        Raises:
            OSError: if this or the save before it could not be written.
        """
        self._preservation.all = not prune
        with _as_os_error(self.directory):
            # Damaged ones were passed over when the run was resumed; Orbax saves nothing at a step
            # that is not beyond its newest.
            for damaged in [other for other in self._manager.all_steps() if other >= step]:
                self._manager.delete(damaged)
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),  # pyrefly: ignore
                    rest=ocp.args.StandardSave(rest),  # pyrefly: ignore
                    progress=ocp.args.JsonSave(dict(progress)),  # pyrefly: ignore
                ),
            )
        if not saved:
            raise OSError(
                f"checkpoint of step {step} in {self.directory}: Orbax refused to save it"
            )

    def check(self) -> None:
        """Says whether the writing in the background has failed.

        Raises:
            OSError: if so.
        """
        with _as_os_error(self.directory):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
            OSError: if it could not be.
        """
        with _as_os_error(self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, as far as their names tell, oldest first."""
        return sorted(self._manager.all_steps())

    def best_first(self) -> list[int]:
        """Steps with the lowest evaluation loss first, then those without, newest first."""
        return _best_first(self.steps(), self._evaluations)

    def restore(self, params: Tree, rest: Tree) -> tuple[int, Tree, Tree, dict[str, Any]] | None:
        """Reads the newest checkpoint that can be read; others are passed over with a line.

        Args:
            params: tree of `ShapeDtypeStruct` with the shardings to restore to.
            rest: the same of the other arrays.

        Returns:
            Its step, params, rest and progress; None if there is no checkpoint.

        Raises:
            ValueError: if it is another model's or optimizer's, or none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            found = self._read(step, {"params": params, "rest": rest})
            if found is not None:
                return step, found["params"], found["rest"], found["progress"]
        if steps:
            raise ValueError(
                f"no checkpoint in {self.directory} can be read: restore one from a copy, or "
                "start anew in another folder"
            )
        return None

    def restore_params(self, params: Tree) -> tuple[int, Tree]:
        """Reads the weights of the best checkpoint, or of the newest if none was evaluated.

        Raises:
            ValueError: if there is none, or none can be read.
        """
        for step in self.best_first():
            found = self._read(step, {"params": params})
            if found is not None:
                return step, found["params"]
        raise ValueError(f"there is no checkpoint in {self.directory} that can be read")

    def _read(self, step: int, wanted: Mapping[str, Tree]) -> Mapping[str, Any] | None:
        try:
            metadata = self._manager.item_metadata(step)
            unreadable = [name for name in wanted if metadata[name] is None]
            if unreadable:
                raise ValueError(f"{', '.join(unreadable)} cannot be read")
            stored = {name: _shapes(metadata[name].tree) for name in wanted}
        except Exception as error:  # Orbax and TensorStore raise a dozen unrelated types
            return self._pass_over(step, error)
        for name, tree in wanted.items():
            _check_same(self.directory / str(step), stored[name], _shapes(tree))
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}  # pyrefly: ignore
        try:
            return self._manager.restore(
                step,
                args=ocp.args.Composite(**args, progress=ocp.args.JsonRestore()),  # pyrefly: ignore
            )
        except Exception as error:
            return self._pass_over(step, error)

    def _pass_over(self, step: int, error: Exception) -> None:
        reason = one_line(error)
        reason = reason if len(reason) < 120 else reason[:117] + "..."
        self._log(f"checkpoint {step} is damaged and passed over ({reason})")


class _NewestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the newest few, and the step with the lowest evaluation loss so far; or `all`."""

    def __init__(self, keep: int, evaluations: Mapping[int, float]):
        self.keep, self.evaluations = keep, evaluations
        self.all = False

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        # Where none has been evaluated, the first is the newest.
        kept = {*steps[-self.keep :], *_best_first(steps, self.evaluations)[:1]}
        return [self.all or checkpoint.step in kept for checkpoint in checkpoints]


def _best_first(steps: Iterable[int], evaluations: Mapping[int, float]) -> list[int]:
    def rank(step: int) -> tuple[float, int]:
        loss = evaluations.get(step, math.inf)
        return (loss if math.isfinite(loss) else math.inf, -step)

    return sorted(steps, key=rank)


def _shapes(tree: Tree) -> dict[str, str]:
    """Each leaf's name and shape; the containers' types are not stored, so they do not count."""

    def name(key: Any) -> str:
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    def leaf_shape(leaf: Any) -> str:
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return "key" if key else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(map(name, path)): leaf_shape(leaf) for path, leaf in leaves}


def _check_same(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    different = [n for n in sorted({*stored, *wanted}) if stored.get(n) != wanted.get(n)]
    # A random key is stored as the integers in it.
    different = [n for n in different if wanted.get(n) != "key" or n not in stored]
    if different:
        n = different[0]
        raise ValueError(
            f"{path} is a checkpoint of another model or optimizer: {n} is "
            f"{stored.get(n, 'absent')} there and {wanted.get(n, 'absent')} here "
            f"({len(different)} differ)"
        )


class _as_os_error:
    """What Orbax and TensorStore raise when they cannot write, as OSError with one line."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            code = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore
            reason = os.strerror(int(code[1])) if code else one_line(error)
            raise OSError(f"cannot write a checkpoint to {self.directory}: {reason}") from error
