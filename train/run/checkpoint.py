"""Checkpoints with Orbax: written in the background, the newest few and the best one kept.

A checkpoint has `params`, `rest` (the other fields of the train state) and `progress` (JSON: what
the host knows, and the format's number). Orbax writes it under a temporary name and renames it when
it is complete. Which one is the best is not stored: a run that is stopped during an evaluation
saves first and evaluates after it is resumed.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
FORMAT = 2


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: their folder; the first save makes it.
        keep: number of the newest to keep, besides the one with the lowest evaluation loss.
        log: prints a line for each checkpoint that is skipped as damaged.
        evaluations: loss by evaluated step; the caller adds later ones.
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

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.wait()
        self._manager.close()

    def save(
        self, step: int, params: Tree, rest: Tree, progress: Tree, *, prune: bool = True
    ) -> None:
        """Copies params, other arrays and JSON values to the host; writes them in the background.

        Raises OSError if this or the previous save could not be written. Unless `prune`, no older
        checkpoint is deleted.
        """
        self._preservation.all = not prune
        with _as_os_error(self.directory):
            # Resuming has skipped the damaged ones; Orbax saves only at steps beyond its newest.
            for damaged in [other for other in self._manager.all_steps() if other >= step]:
                self._manager.delete(damaged)
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),  # pyrefly: ignore
                    rest=ocp.args.StandardSave(rest),  # pyrefly: ignore
                    progress=ocp.args.JsonSave({"format": FORMAT, **progress}),  # pyrefly: ignore
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
        return _best_first(self.steps(), self._evaluations)

    def restore(self, params: Tree, rest: Tree) -> tuple[int, Tree, Tree, dict[str, Any]] | None:
        """Reads the newest checkpoint that is not damaged.

        Args:
            params: tree of `ShapeDtypeStruct`s with the shardings to restore to.
            rest: the other arrays likewise.

        Returns:
            Its step, params, rest and progress; None if there is none.

        Raises:
            ValueError: if it has another format, model or optimizer, or all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            found = self._read(step, {"params": params, "rest": rest})
            if found is not None:
                return step, found["params"], found["rest"], found["progress"]
        if steps:
            raise ValueError(
                f"no checkpoint in {self.directory} can be read: restore one from a copy, or "
                "start a new run in another folder"
            )
        return None

    def restore_params(self, params: Tree) -> tuple[int, Tree]:
        """Reads the weights of the best checkpoint, or of the newest if none was evaluated."""
        for step in self.best_first():
            found = self._read(step, {"params": params})
            if found is not None:
                return step, found["params"]
        raise ValueError(f"there is no checkpoint in {self.directory} that can be read")

    def _read(self, step: int, wanted: Mapping[str, Tree]) -> Mapping[str, Any] | None:
        """The items of a checkpoint, or None if it is damaged."""
        try:
            progress = dict(self._restore(step, progress=ocp.args.JsonRestore())["progress"])  # pyrefly: ignore
            written = progress.pop("format", 1)
            metadata = self._manager.item_metadata(step)
            unreadable = [name for name in wanted if metadata[name] is None]
            if unreadable:
                raise ValueError(f"{', '.join(unreadable)} cannot be read")
            stored = {name: _shapes(metadata[name].tree) for name in wanted}
        except Exception as error:  # Orbax and TensorStore raise a dozen unrelated types
            return self._pass_over(step, error)
        if written != FORMAT:
            raise ValueError(
                f"{self.directory / str(step)} has checkpoint format {written}, this version reads "
                f"format {FORMAT}: start a new run in another folder, or use the version of "
                "galore-optax that wrote it"
            )
        for name, tree in wanted.items():
            _check_same(self.directory / str(step), stored[name], _shapes(tree))
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}  # pyrefly: ignore
        try:
            return {**self._restore(step, **args), "progress": progress}
        except Exception as error:
            return self._pass_over(step, error)

    def _restore(self, step: int, **args: Any) -> Mapping[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(**args))

    def _pass_over(self, step: int, error: Exception) -> None:
        reason = one_line(error)
        reason = reason if len(reason) < 120 else reason[:117] + "..."
        self._log(f"checkpoint {step} is damaged and passed over ({reason})")


class _NewestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the newest few and the step with the lowest evaluation loss so far, or `all`."""

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
        # If none has been evaluated, the first is the newest.
        kept = {*steps[-self.keep :], *_best_first(steps, self.evaluations)[:1]}
        return [self.all or checkpoint.step in kept for checkpoint in checkpoints]


def _best_first(steps: Iterable[int], evaluations: Mapping[int, float]) -> list[int]:
    def rank(step: int) -> tuple[float, int]:
        loss = evaluations.get(step, math.inf)
        return (loss if math.isfinite(loss) else math.inf, -step)

    return sorted(steps, key=rank)


def _shapes(tree: Tree) -> dict[str, str]:
    """Each leaf's name and shape; the types of containers are not stored, so they are left out."""

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


@contextmanager
def _as_os_error(directory: Path) -> Iterator[None]:
    """Raises the errors of Orbax and TensorStore when they cannot write as OSError of one line."""
    try:
        yield
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore
        reason = os.strerror(int(code[1])) if code else one_line(error)
        raise OSError(f"cannot write a checkpoint to {directory}: {reason}") from error
