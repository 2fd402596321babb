"""Writes the TFDS data set c4/en (array_record) from AllenAI's JSON shards, without TensorFlow.

A shard, possibly gzipped, has a JSON object per line, whose `text` is kept in the shards' order.
"""

import glob
import gzip
import itertools
import json
import os
import shutil
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from train.run.directory import check_can_be_made

VERSION = "3.0.1"
# Without validation shards, one document in this many is kept for validation.
VALIDATION_EVERY = 100
# A reader keeps all files open: all of C4 must fit into the usual limit of 1,024 files.
DOCUMENTS_PER_FILE = 1_000_000
DOCUMENTS_IN_MEMORY = 1_000
_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how their files begin
# Seconds in which a server must answer.
_PATIENCE = 10


@dataclass(frozen=True)
class PrepareC4:
    """Write the TFDS data set c4/en from AllenAI's JSON shards, without TensorFlow."""

    input: tuple[str, ...]
    """Shards such as c4-train.00000-of-01024.json.gz: paths, patterns like 'c4-train.*.json.gz', or
    URLs, which are downloaded into DATA_DIR/downloads. A file with "validation" in its name goes to
    validation; if there is none, one document in a hundred does."""

    data_dir: Path
    """Folder for the data set, written to DATA_DIR/c4/en/3.0.1, which must not exist yet."""


def main(config: PrepareC4) -> None:
    """Writes the data set; it appears under its name only when it is complete."""
    data_dir = config.data_dir.expanduser()
    home = data_dir / "c4" / "en"
    final, unfinished = home / VERSION, home / f"{VERSION}.incomplete"
    if unfinished.exists():
        reason = "was left by a run that was killed, or is being written now"
        raise ValueError(f"{unfinished} {reason}: delete it and start again")
    # Another version too: TFDS would read the newer of the two.
    if home.is_dir() and (there := sorted(path.name for path in home.iterdir())):
        raise ValueError(
            f"data_dir={str(config.data_dir)!r} has a data set c4/en already ({', '.join(there)} "
            f"in {home}): give another folder or delete that one"
        )
    check_can_be_made(home.absolute(), "--data-dir")  # before anything is downloaded
    shards = find_shards(config.input, data_dir / "downloads")
    unfinished.mkdir(parents=True)
    try:
        counts = write_data_set(shards, unfinished)
        unfinished.rename(final)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    train, validation = counts["train"], counts["validation"]
    print(f"{final}: {train:,} training and {validation:,} validation documents")


def find_shards(inputs: Sequence[str], download_dir: Path) -> dict[str, list[Path]]:
    """The files of each split that the paths, patterns and URLs name, each once."""
    files: dict[str, tuple[str, Path]] = {}  # by real path, so that patterns may overlap
    for given in inputs:
        if "://" in given:
            path = _download(given, download_dir)
            files[str(path)] = given.rsplit("/", 1)[-1], path
            continue
        pattern = os.path.expanduser(given)
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ValueError(
                f"input={given!r} matches no file: give the paths of JSON shards, a "
                "quoted pattern such as 'c4-train.*.json.gz', or URLs"
            )
        for path in found:
            if not os.path.isfile(path):
                raise ValueError(f"input={given!r}: {path} is not a file")
            files[os.path.realpath(path)] = os.path.basename(path), Path(path)
    shards: dict[str, list[Path]] = {"train": [], "validation": []}
    for name, path in files.values():
        shards["validation" if "validation" in name else "train"].append(path)
    if not shards["train"]:
        said = "names no training shard: those without 'validation' in their name are"
        raise ValueError(f"input={' '.join(inputs)!r} {said}")
    return shards


def _download(url: str, download_dir: Path) -> Path:
    import tensorflow_datasets as tfds

    try:
        if url.startswith(("http://", "https://")):
            # TFDS tries an address that does not answer for minutes, with a warning each time.
            urllib.request.urlopen(url, timeout=_PATIENCE).close()
        return Path(tfds.download.DownloadManager(download_dir=download_dir).download(url))
    except Exception as error:  # of any of the libraries that TFDS downloads with
        raise ValueError(f"input={url!r} cannot be downloaded: {error}") from error


def write_data_set(shards: dict[str, list[Path]], folder: Path) -> dict[str, int]:
    """Writes the shards' documents to `folder` in TFDS' layout; returns each split's number."""
    import tensorflow_datasets as tfds

    version, names = tfds.core.Version(VERSION), {"name": "c4", "config_name": "en"}
    identity = tfds.core.DatasetIdentity(
        **names, version=version, data_dir=str(folder), module_name="train.prepare_c4"
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Text of the JSON shards given to train.prepare_c4.",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
    )
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=DOCUMENTS_PER_FILE, file_format="array_record"
    )
    counts, documents = dict.fromkeys(shards, 0), _documents(shards)
    writer.initialize_splits(list(shards))
    try:
        while group := list(itertools.islice(documents, DOCUMENTS_IN_MEMORY)):
            examples: dict[str, list[dict[str, bytes]]] = {split: [] for split in shards}
            for split, text in group:
                examples[split].append({"text": text})
                counts[split] += 1
            writer.add_examples(examples)
        writer.close_all()
    except RuntimeError as error:  # array_record's for a full disk
        raise OSError(f"cannot write to {folder}: {error}") from error
    for split, count in counts.items():
        if not count:
            raise ValueError(f"no document is left for the split {split!r}: give more than one")
    _name_files_as_tfds_does(info, folder)
    return counts


def _name_files_as_tfds_does(info: Any, folder: Path) -> None:
    """Adds `-of-N` to the files' names, which SequentialWriter does not know while it writes."""
    import tensorflow_datasets as tfds

    splits = []
    for split in info.splits.values():
        suffix = info.file_format.file_suffix
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=info.name, split=split.name, filetype_suffix=suffix
        )
        names = template.sharded_filepaths(split.num_shards)
        for old, new in zip(split.filepaths, names, strict=True):
            old.rename(new)
        splits.append(split.replace(filename_template=template))
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)


def _documents(shards: dict[str, list[Path]]) -> Iterator[tuple[str, bytes]]:
    """The split and the text of each document, with a progress bar."""
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = *Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn()
    paths = [(split, path) for split, files in shards.items() for path in files]
    number, done = itertools.count(), 0
    with Progress(*columns) as progress:
        task = progress.add_task("", total=sum(path.stat().st_size for _, path in paths))
        for split, path in paths:
            progress.update(task, description=path.name)
            with path.open("rb") as file:
                for text in texts_of(file, path):
                    held_out = not shards["validation"] and next(number) % VALIDATION_EVERY == 0
                    yield ("validation" if held_out else split), text
                    progress.update(task, completed=done + file.tell())
            done += path.stat().st_size


def texts_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The `text` of each line of a shard that is not blank, as UTF-8."""
    start = file.read(len(_ZSTANDARD))
    if start == _ZSTANDARD:
        raise ValueError(f"{path}: compressed by Zstandard: unpack it with `zstd -d`, or use gzip")
    is_gzip = start.startswith(_GZIP)
    file.seek(0)
    number, found = 0, False
    try:
        for line in gzip.GzipFile(fileobj=file) if is_gzip else file:
            number += 1
            if not line.isspace():
                found = True
                # JSON may have half of a surrogate pair, which UTF-8 lacks: it becomes '?'.
                yield json.loads(line)["text"].encode("utf-8", errors="replace")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: the gzip file is damaged: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not a JSON object with a string in 'text'") from error
    if not found:
        raise ValueError(f"{path}: the file is empty")


if __name__ == "__main__":
    from train.run.cli import run

    run(main, PrepareC4, "python -m train.prepare_c4")
