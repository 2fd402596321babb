"""The tasks of GLUE (arXiv:1804.07461), read from TFDS' data sets or the official TSV files."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TRAIN, VALIDATION, TEST = "train", "validation", "test"

# The key of what a line has beyond the columns of the header; no column has this name.
_BEYOND = "\t"
# STS-B's scores begin with 0.
_HIGHEST = 5


class Task(NamedTuple):
    """A task: how it is stored, what it predicts, and by what it is measured."""

    folder: str  # of the official TSV files, and the name of its predictions
    texts: tuple[str, ...]  # features of TFDS with the one text or two
    labels: tuple[str, ...]  # as the submission has them, by class; none: a number is predicted
    metrics: tuple[str, ...]  # the first chooses the best checkpoint
    examples: int  # to train on
    columns: tuple[str, ...] = ()  # of the TSV files, where these are not `texts`
    label: str = "label"  # its column there
    # Of the classes in TFDS and in models, where these are not `labels`.
    names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Outputs of the classifier."""
        return max(1, len(self.labels))

    @property
    def spellings(self) -> tuple[tuple[str, ...], ...]:
        """The names of the classes, in their order, as TFDS and models have them."""
        return tuple(dict.fromkeys((self.names or self.labels, self.labels)))


_ONE, _TWO = ("sentence",), ("sentence1", "sentence2")
_YES_NO, _ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
_MRPC = ("#1 String", "#2 String")
TASKS: Mapping[str, Task] = {
    "cola": Task(
        "CoLA", _ONE, _YES_NO, ("matthews_correlation",), 8_551,
        names=("unacceptable", "acceptable"),
    ),
    "sst2": Task(
        "SST-2", _ONE, _YES_NO, ("accuracy",), 67_349, names=("negative", "positive")
    ),
    "mrpc": Task(
        "MRPC", _TWO, _YES_NO, ("f1", "accuracy"), 3_668, _MRPC, "Quality",
        names=("not_equivalent", "equivalent"),
    ),
    "qqp": Task(
        "QQP", ("question1", "question2"), _YES_NO, ("accuracy", "f1"), 363_846,
        label="is_duplicate", names=("not_duplicate", "duplicate"),
    ),
    "stsb": Task("STS-B", _TWO, (), ("pearson", "spearman"), 5_749, label="score"),
    "mnli": Task(
        "MNLI", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
        ("accuracy",), 392_702, _TWO, "gold_label",
    ),
    "qnli": Task("QNLI", ("question", "sentence"), _ENTAILMENT, ("accuracy",), 104_743),
    "rte": Task("RTE", _TWO, _ENTAILMENT, ("accuracy",), 2_490),
    "wnli": Task(
        "WNLI", _TWO, _YES_NO, ("accuracy",), 635, names=("not_entailment", "entailment")
    ),
}  # fmt: skip
"""Metrics as the papers report them: MRPC by F1, QQP by accuracy, STS-B by Pearson."""


class Examples(NamedTuple):
    """A split: one text or two for each example, and labels."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray  # int32 classes, or float32 numbers; -1 where the split has none

    def __len__(self) -> int:
        return len(self.texts)


def splits(name: str) -> dict[str, tuple[str, ...]]:
    """The names of the splits of a task; MNLI evaluates on two, the matched one first."""
    both = ("matched", "mismatched") if name == "mnli" else ()
    own = {kind: tuple(f"{kind}_{x}" for x in both) or (kind,) for kind in (VALIDATION, TEST)}
    return {TRAIN: (TRAIN,), **own}


def load_examples(name: str, split: str, data_dir: str | Path) -> Examples | None:
    """The examples of a split; None if the data have no such split, as TFDS' samples have no test.

    `data_dir` is that of TFDS, with glue/mrpc, or has the official TSV files, as MRPC/train.tsv.
    ValueError if it has neither or both, or if they cannot be read.
    """
    task, data_dir = TASKS[name], Path(data_dir)
    tsv, tfds = data_dir / task.folder, data_dir / "glue" / name
    if tsv.is_dir() and tfds.is_dir():
        raise ValueError(f"{tsv} and {tfds} both have the task {name}: move one of them away")
    if tsv.is_dir():
        return _read_tsv(task, tsv, split)
    if tfds.is_dir():
        return _read_tfds(task, name, data_dir, split)
    raise ValueError(
        f"--data-dir {data_dir} has no task {name}: expected TFDS' folder glue/{name}, or the "
        f"official files in {task.folder}, such as {task.folder}/train.tsv"
    )


def _read_tfds(task: Task, name: str, data_dir: Path, split: str) -> Examples | None:
    import tensorflow_datasets as tfds

    folder, is_test = data_dir / "glue" / name, split.startswith(TEST)
    try:
        builder: Any = tfds.builder(f"glue/{name}", data_dir=data_dir)
        # A split that was not written has no files.
        there = builder.info.splits.get(split)
        if there is None or not all(file.exists() for file in there.filepaths):
            if not is_test:
                raise FileNotFoundError(f"there is no split {split}")
            return None
        source = builder.as_data_source(split)
        records = [source[i] for i in range(len(source))]
        if is_test:  # stored in a random order, but predictions have the numbers of GLUE's file
            records.sort(key=lambda record: int(record["idx"]))
            numbers = [int(record["idx"]) for record in records]
            if numbers != [*range(len(numbers))]:
                raise ValueError(f"the `idx` of its examples are not 0 to {len(numbers) - 1}")
        names = getattr(builder.info.features["label"], "names", None)
        if names is not None and tuple(names) not in task.spellings:
            said = f"its labels are {', '.join(names)}"
            raise ValueError(f"{said}: expected {', '.join(task.spellings[0])}")
        texts = [tuple(r[feature].decode("utf-8") for feature in task.texts) for r in records]
    # TFDS and array_record raise many unrelated types for damaged, incomplete or empty folders.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"cannot read split {split!r} of {folder} ({reason})") from error
    labels = [record["label"] for record in records]
    for i, label in enumerate(() if is_test else labels):
        _check_label(task, label, f"example {i} of split {split!r} of {folder}")
    return Examples(texts, np.array(labels, np.int32 if task.labels else np.float32))


def _read_tsv(task: Task, folder: Path, split: str) -> Examples | None:
    path = folder / f"{split.replace(VALIDATION, 'dev')}.tsv"
    is_test = split.startswith(TEST)
    if not path.is_file():
        # The names of predictions say that those of the matched one come first.
        second = split == "test_matched" and (folder / "test_mismatched.tsv").is_file()
        if is_test and not second:
            return None
        raise ValueError(f"{path} is missing: copy GLUE's official files there")
    columns = task.columns or task.texts
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    for number, row in _rows(path, task, is_test):
        found = [row.get(column) for column in columns]
        label = "-1" if is_test else row.get(task.label)
        if None in found or label is None:
            # A few lines of the official QQP lack columns; all who use it leave them out.
            if task.folder == "QQP" and split == TRAIN and row.keys() >= {*columns, task.label}:
                continue
            needed = ", ".join((*columns, *(() if is_test else (task.label,))))
            raise ValueError(f"line {number} of {path} lacks a column: expected {needed}")
        index = str(len(texts))
        own = row.get("index", row.get("id", index))  # QQP's is called id
        if is_test and own != index:
            said = f"line {number} of {path} has the index {own}"
            raise ValueError(f"{said}: expected {index}, as predictions are numbered from 0")
        texts.append(tuple(map(str, found)))
        labels.append(-1 if is_test else _label(task, label, f"line {number} of {path}"))
    if not texts:
        raise ValueError(f"{path} has no example")
    return Examples(texts, np.array(labels, np.int32 if task.labels else np.float32))


def _rows(path: Path, task: Task, is_test: bool) -> Iterator[tuple[int, dict[str, str | None]]]:
    """The lines of a file with their numbers, as the columns by name."""
    # CoLA's files have no header, but for the test's.
    names = ["source", "label", "star", "sentence"]
    header = None if is_test or task.folder != "CoLA" else names
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            how: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "restkey": _BEYOND}
            lines = csv.DictReader(file, header, **how)
            names = lines.fieldnames or []
            if twice := [x for x in names if x and names.count(x) > 1]:
                raise ValueError(f"the header has the column {twice[0]} twice")
            for row in lines:
                if any(row.pop(_BEYOND, ())):  # empty columns at the end hold nothing
                    said = f"line {lines.line_num} has more columns than the {len(names)} expected"
                    raise ValueError(f"{said}: a text cannot have a tab in it")
                yield lines.line_num, row
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as tab-separated text: {error}") from None


def _label(task: Task, text: str, where: str) -> float:
    if task.labels:
        if text in task.labels:
            return task.labels.index(text)
        raise ValueError(f"{where} has the label {text!r}: expected {', '.join(task.labels)}")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where} has the score {text!r}: expected a number") from None
    _check_label(task, value, where)
    return value


def _check_label(task: Task, value: float, where: str) -> None:
    """Raises ValueError for a number that is no class, or no score, of a task."""
    if task.labels and value not in range(task.classes):
        raise ValueError(f"{where} has the label {value}: expected 0 to {task.classes - 1}")
    if not task.labels and not 0 <= value <= _HIGHEST:
        raise ValueError(f"{where} has the score {value}: expected a number, 0 to {_HIGHEST}")


def predictions_text(task: Task, outputs: Sequence[Any]) -> str:
    """Predictions in the format of GLUE's submissions, from classes or numbers."""
    if task.labels:
        said = [task.labels[int(x)] for x in outputs]
    else:
        said = [f"{min(_HIGHEST, max(0, x)):.3f}" for x in outputs]
    return "index\tprediction\n" + "".join(f"{i}\t{x}\n" for i, x in enumerate(said))
