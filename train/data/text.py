"""The sources of text: documentation that ships with Python, C4 in TFDS' layout, or own files."""

import ast
import bisect
import hashlib
import itertools
import os
import re
import shlex
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from train.data.own import VALIDATION_EVERY, own_documents

SOURCES = ("builtin", "c4", "text")
SPLITS = ("train", "validation")

# Characters in a document of the built-in text, the unit of shuffling: whole pages, up to 70,000
# characters long, would each fill many batches alone, and the loss would follow their subjects.
_DOCUMENT_LENGTH = 512
# Top-level folders beside the library itself: installed packages, tests, an application, and two
# packages that newer Pythons no longer ship.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "distutils"}


def load_text(
    name: str, split: str, data_dir: str | Path | None = None, eval_data: str | None = None
) -> Sequence[str]:
    """The documents of a source, by number; none is in both splits.

    Sources: "builtin", the documentation of Python's standard library (about 2 MB, different for
    each Python version); "c4", the TFDS data set c4/en in `data_dir`; and "text", `own_documents`
    of the files that `data_dir` names, with those that `eval_data` names for validation.
    """
    for argument, value, known in (("data", name, SOURCES), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{argument}={value!r} is unknown: choose one of {', '.join(known)}")
    if name == "text":
        if data_dir is None:
            raise ValueError("data='text' needs data_dir, which names files of text")
        return own_documents(str(data_dir), eval_data)[split]
    if eval_data is not None:
        raise ValueError(f"eval_data={eval_data!r} is not used by data={name!r}: leave it out")
    if name == "c4":
        if data_dir is None:
            raise ValueError("data='c4' needs data_dir, the folder that holds c4/en")
        return C4Text(Path(data_dir), split)
    if data_dir is not None:
        raise ValueError(f"data_dir={str(data_dir)!r} is not used by data='builtin': leave it out")
    return builtin_documents()[split]


def content_of(documents: Sequence[str] | Sequence[bytes]) -> str:
    """A digest of documents in memory; of a data set's, of up to 65 of them and of its files."""
    files, count = getattr(documents, "files", None), len(documents)
    digest = hashlib.sha256(repr((count, files)).encode())
    for number in range(0, count, 1 if files is None else max(1, count // 64)):
        digest.update(repr(documents[number]).encode())
    return digest.hexdigest()[:16]


class SkippingUnreadable(Sequence[str]):
    """Documents, of which those that cannot be read are empty; says which."""

    def __init__(self, source: Sequence[str]):
        self._source = source
        self.files = getattr(source, "files", ())

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number):
        try:
            return self._source[number]
        except OSError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            return ""


class C4Text(Sequence[str]):
    """One split of the TFDS data set c4/en, read by number and without TensorFlow."""

    def __init__(self, data_dir: Path, split: str):
        import tensorflow_datasets as tfds

        folder = data_dir / "c4" / "en"
        to = shlex.quote(str(data_dir))
        command = f"`python -m train.prepare_c4 --input 'c4-train.*.json.gz' --data-dir {to}`"
        if not folder.is_dir():
            raise ValueError(f"there is no data set c4/en at {folder}: make it with {command}")
        _check_file_format(folder)
        try:
            records: Any = tfds.data_source("c4/en", data_dir=data_dir, split=split, download=False)
            self.files: list[tuple[str, int]] = []  # names and bytes
            info = records.dataset_info.splits[split]
            self._ends = [*itertools.accumulate(info.shard_lengths)]  # of files, in documents
            for file in info.filepaths:
                if not file.exists():
                    raise FileNotFoundError(f"{file} is missing")
                self.files.append((file.name, os.path.getsize(file)))
            records[0]
        # TFDS and array_record raise many unrelated types for damaged, incomplete or empty folders.
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"cannot read split {split!r} of c4/en at {folder} ({reason}): restore its "
                f"files, or make it again in another folder with {command}"
            ) from error
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)  # array_record's ValueError would not end an iteration
        try:
            return self._records[number]["text"].decode("utf-8")
        # array_record's for a damaged file; TFDS' for the None that it gives of one cut short.
        except (RuntimeError, AttributeError) as error:
            file, _ = self.files[bisect.bisect_right(self._ends, number)]
            raise OSError(f"cannot read document {number} of {file}: {error}") from error


def _check_file_format(folder: Path) -> None:
    """Raises ValueError if a data set's newest version has files that only TensorFlow reads."""
    newest = max((path.parent for path in folder.glob("*/dataset_info.json")), default=None)
    if newest is None:
        return
    text = (newest / "dataset_info.json").read_text("utf-8", errors="replace")
    found = re.search(r'"fileFormat": *"(\w+)"', text)
    if found is None or found[1] == "array_record":
        return  # a damaged file is named by its reader
    data_dir = folder.parents[1]
    command = ["tfds", "convert_format", "--dataset_version_dir", str(newest)]
    command += [
        "--out_file_format",
        "array_record",
        "--out_dir",
        f"{data_dir}-array_record/c4/en/{newest.name}",
    ]
    raise ValueError(
        f"{newest} has the file format {found[1]}, and only array_record can be read by number: "
        f"convert it with `{shlex.join(command)}` (needs TensorFlow), and give --data-dir "
        f"{shlex.quote(f'{data_dir}-array_record')}"
    )


@cache
def builtin_documents() -> dict[str, list[str]]:
    """The documents of each split; each page is in one split only."""
    pages = _builtin_pages()
    # The same paragraph may be on two pages: it belongs to the first one's split.
    splits: dict[str, str] = {}
    for number, page in enumerate(pages):
        for document in documents_of(page):
            splits.setdefault(document, SPLITS[number % VALIDATION_EVERY == 0])
    return {s: [document for document, split in splits.items() if split == s] for s in SPLITS}


def documents_of(page: str) -> Iterator[str]:
    """Cuts a page between paragraphs; a document exceeds the limit only if one paragraph does."""
    document = ""
    for paragraph in re.split(r"\n{2,}", page):
        if document and len(document) + len(paragraph) > _DOCUMENT_LENGTH:
            yield document
            document = ""
        document = f"{document}\n\n{paragraph}" if document else paragraph
    if document:
        yield document


def _builtin_pages() -> list[str]:
    """One page for each topic of Python's `help` and for each module's docstrings."""
    from pydoc_data.topics import topics

    pages = [topics[name].strip() for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if parts[0] in _LEFT_OUT or "test" in parts or "tests" in parts:
            continue
        # A docstring of two modules must not be in both splits.
        if new := [text for text in _docstrings(path) if text not in seen]:
            seen.update(new)
            pages.append("\n\n".join(new))
    if len(pages) < 2 * VALIDATION_EVERY:
        said = f"found no source files of Python's standard library at {library}"
        raise ValueError(f"data='builtin' {said}: use data='c4' with a data_dir")
    return pages


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module in the order of its source, found without importing it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a library's invalid escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    yield from _docstrings_in(tree)


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and (text := ast.get_docstring(node)):
        yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # no expression
            yield from _docstrings_in(child)
