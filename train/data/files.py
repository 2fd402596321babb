"""Own text: the files that hold it, and the examples in them.

A file is plain text (.txt, .md), JSON (.jsonl, .ndjson, .json) or Parquet (.parquet); with .gz
after it, except Parquet, it is unpacked. Plain text is one example. JSON has an object in each line
that is not blank, or one array of objects; it and the rows of Parquet have one of

  text: a string;
  prompt and completion: two strings;
  messages: a list of objects with the strings `role` and `content`.

Further fields, such as C4's url and timestamp, are ignored, unless they change what `messages`
mean. A field that is null counts as absent.
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from models.hugging_face.files import without_duplicates

_PLAIN, _JSON, _PARQUET = (".txt", ".md"), (".jsonl", ".ndjson", ".json"), (".parquet",)
_SUFFIXES = (*_PLAIN, *_JSON, *_PARQUET, *(f"{name}.gz" for name in (*_PLAIN, *_JSON)))
# Other ways to pack them, by which a part of a folder's text would be left out.
_PACKED = (".bz2", ".lz4", ".xz", ".zip", ".zst")
KINDS = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}
# Fields beside `messages` from which a chat template makes other text.
_NOT_BESIDE_MESSAGES = (
    "system", "tools", "functions", "documents", "images", "videos", "audios",
    "chat_template_kwargs",
)  # fmt: skip


class Example(NamedTuple):
    """What a model is trained on."""

    kind: Literal["plain", "text", "prompt", "messages"]  # a file of plain text, or of `KINDS`
    # A text; a prompt and its completion; or each message's role and content.
    content: tuple[str, ...] | tuple[tuple[str, str], ...]
    place: str  # file, and line or row: for errors


def read_files(paths: Sequence[str]) -> list[str]:
    """The texts of files; arguments and errors are those of `read_examples`.

    ValueError also for an example of another kind.
    """
    return [text for _, text in read_texts(paths)]


def read_texts(paths: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """The same, each with whether it is a whole file of plain text."""
    for example in read_examples(paths):
        if example.kind in ("prompt", "messages"):
            raise ValueError(
                f"{example.place} has {_listed(KINDS[example.kind])}, and only `text` is read "
                "here: `python -m train.finetune_lm` trains on the others"
            )
        yield example.kind == "plain", str(example.content[0])


def read_examples(paths: Sequence[str]) -> Iterator[Example]:
    """The examples of files, in the order of `find_files`, whose arguments are the same.

    ValueError names the file, and the line or row, that cannot be read.
    """
    for path in find_files(paths):
        name = path.name.lower()
        try:
            if name.endswith(_PARQUET):
                yield from _of_parquet(path)
                continue
            with _open(path) as file:
                plain = name.removesuffix(".gz").endswith(_PLAIN)
                yield from _of_plain(file, path) if plain else _of_json(file, path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not text in UTF-8 (at byte {error.start}): convert it"
            ) from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip file is damaged ({error})") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` name, each once: files, folders and patterns such as 'data/*.jsonl'.

    Of a folder, and of those in it or linked there, these are all files of a kind that is read,
    without hidden ones; they and those of a pattern are sorted by name. ValueError if one of
    `paths` names none, or a folder cannot be read, or a link in it leads nowhere.
    """
    found: dict[str, Path] = {}  # by real path: links and patterns may name a file again
    for name in paths:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in _files_in(path, set()) if _readable(file))
        elif path.exists() or not glob.has_magic(name):
            files = [path]
        else:
            files = sorted(Path(file) for file in glob.glob(name, recursive=True))
        if not files:
            what = "has no file of" if path.is_dir() else "is a pattern that matches no file of"
            raise ValueError(f"{name} {what} {', '.join(_SUFFIXES)}")
        for file in files:
            if not file.name.lower().endswith(_SUFFIXES):
                if not file.exists():
                    raise ValueError(f"{file}: there is no such file or folder")
                raise ValueError(
                    f"{file} has none of the names that are read, {', '.join(_SUFFIXES)}: rename "
                    "it if it is of that kind, or convert it"
                )
            found.setdefault(os.path.realpath(file), Path(os.path.abspath(file)))
    return [*found.values()]


def _files_in(folder: Path, seen: set[str]) -> Iterator[Path]:
    """What is in a folder and in those within or linked there, without hidden ones.

    `seen` has the real paths of folders that are read already: a link may lead back.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}")

    linked = []
    for top, folders, names in os.walk(folder, onerror=refuse):
        seen.add(os.path.realpath(top))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        linked += [path for name in folders if (path := Path(top, name)).is_symlink()]
        yield from (Path(top, name) for name in names if not _is_hidden(name))
    for path in sorted(linked):
        if os.path.realpath(path) not in seen:
            yield from _files_in(path, seen)


def _is_hidden(name: str) -> bool:
    # A file system's own folder, which only root may read, is not the user's.
    return name.startswith(".") or name == "lost+found"


def _readable(path: Path) -> bool:
    """Whether a path in a folder is a file of a kind that is read."""
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{path} is a link that leads nowhere: restore what it names, or delete it"
        )
    packed = path.name.lower().endswith(_PACKED) and path.stem.lower().endswith(_SUFFIXES)
    if packed and not path.with_suffix("").exists():
        raise ValueError(f"{path} is packed in a way that is not read: unpack it, or use gzip")
    return path.name.lower().endswith(_SUFFIXES) and path.is_file()


def _open(path: Path) -> IO[bytes]:
    packed = path.name.lower().endswith(".gz")
    return gzip.open(path) if packed else path.open("rb")  # pyrefly: ignore[bad-return]


def _of_plain(file: IO[bytes], path: Path) -> Iterator[Example]:
    yield Example("plain", (file.read().decode("utf-8-sig"),), str(path))


def _of_json(file: IO[bytes], path: Path) -> Iterator[Example]:
    lines = (line.decode("utf-8-sig" if n == 1 else "utf-8") for n, line in enumerate(file, 1))
    for number, line in enumerate(lines, 1):
        if line.isspace() or not line:
            continue
        if number == 1 and line.lstrip().startswith("["):
            rows = _parsed("".join([line, *lines]), f"{path}: the array")
            assert isinstance(rows, list)
            yield from (_example(row, f"{path}: element {i}") for i, row in enumerate(rows))
            return
        yield _example(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place} is not JSON ({error}): write one object in each line, or an array of them"
        ) from None


def _of_parquet(path: Path) -> Iterator[Example]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs `pip install pyarrow`") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = {name for names in KINDS.values() for name in names} | {*_NOT_BESIDE_MESSAGES}
            columns = [name for name in file.schema_arrow.names if name in known]
            if twice := [name for name in columns if columns.count(name) > 1]:
                raise ValueError(f"{path} has the column `{twice[0]}` twice")
            batches = file.iter_batches(columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield _example(row, f"{path}: row {number}")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from None


def _example(row: Any, place: str) -> Example:
    """The example in an object; ValueError unless it has just one of the kinds."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is {_named(row)}, not an object with {_choices()}")
    fields = {name: value for name, value in row.items() if value is not None}
    found = [kind for kind, names in KINDS.items() if any(name in fields for name in names)]
    if len(found) != 1:
        named = [name for kind in found for name in KINDS[kind] if name in fields]
        has = _listed(named or fields, "no field")
        raise ValueError(f"{place} has {has}: expected one of {_choices()}")
    kind: Any = found[0]
    for name in KINDS[kind]:
        if name not in fields:
            raise ValueError(f"{place} has no `{name}`: expected {_listed(KINDS[kind])}")
    if kind == "messages":
        for name in _NOT_BESIDE_MESSAGES:
            if fields.get(name):
                raise ValueError(f"{place}: `{name}` beside `messages` is not supported: remove it")
        return Example(kind, _messages(fields["messages"], place), place)
    texts = tuple(_string(fields[name], f"{place}: `{name}`") for name in KINDS[kind])
    return Example(kind, texts, place)


def _messages(messages: Any, place: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: `messages` is {_named(messages)}, not a list with a message")
    result = []
    for number, message in enumerate(messages):
        at = f"{place}: `messages[{number}]`"
        if not isinstance(message, Mapping):
            raise ValueError(f"{at} is {_named(message)}, not an object")
        fields = {name: value for name, value in message.items() if value not in (None, [], {})}
        if others := sorted({*fields} - {"role", "content"}):
            raise ValueError(f"{at} has `{others[0]}`: only `role` and `content` are supported")
        role, content = (_string(fields.get(x), f"{at}: `{x}`") for x in ("role", "content"))
        result.append((role, content))
    return tuple(result)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_named(value)}, not a string")
    return value


def _named(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean"}
    if value is None or value == []:
        return "missing" if value is None else "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else "no JSON value")


def _listed(names: Iterable[str], none: str = "") -> str:
    names = [f"`{name}`" for name in [*names][:8]]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names) or none


def _choices() -> str:
    return ", ".join(_listed(names) for names in KINDS.values())
