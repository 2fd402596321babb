"""The short help of a command: groups of flags, with the values that they take and defaults."""

import ast
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
from typing import Any, Literal, get_args, get_origin, get_type_hints

from train.config.settings import flag

_COLUMN = 34  # where texts begin
_WORDS = {int: "N", float: "X", bool: "", str: "TEXT"}


def short_help(config_type: type, prog: str) -> str:
    """The help of a dataclass's command: for each field its flag, first sentence and default."""
    explained, hints = documentation(config_type), get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    lines = [f"usage: {prog} [FLAGS]", "", *_wrapped(_first(config_type.__doc__ or ""), 0)]
    for title, names in groups(config_type).items():
        lines += ["", *([f"{title}:"] if title else [])]
        for name in names:
            lines += _line(f"{flag(name)} {_values(hints[name])}", _shown(fields[name], explained))
    lines.append("")
    if switches := [name for name, hint in hints.items() if bool in (hint, *get_args(hint))]:
        name = flag(switches[0])
        lines.append(f"A switch stands alone: {name}; --no-{name[2:]} turns it off.")
    lines += ["--help-all explains each flag at length; --version prints the version."]
    return "\n".join(lines) + "\n"


def groups(config_type: type) -> dict[str, list[str]]:
    """The fields of a dataclass by the first sentence of the base's docstring that has them first.

    Its own fields have no title where there is no other group.
    """
    found: dict[str, list[str]] = {}
    for base in reversed(config_type.__mro__):
        known = {name for names in found.values() for name in names}
        if own := [name for name in inspect.get_annotations(base) if name not in known]:
            title = _first(base.__doc__ or "").rstrip(".")
            if base is config_type:
                title = "Of this command" if found else ""
            found.setdefault(title, []).extend(own)
    return found


def _shown(field: dataclasses.Field[Any], explained: dict[str, str]) -> str:
    """A field's first sentence and its default."""
    text = explained[field.name]
    silent = field.default is None or field.default is False or field.default in ("", ())
    if default := re.search(r"Default: (.*?)\.(?: |$)", text):
        return f"{_first(text)} [{default[1]}]"
    if field.default is dataclasses.MISSING or text.endswith("Required."):
        return f"{_first(text)} [required]"
    return _first(text) if silent else f"{_first(text)} [{field.default}]"


def documentation(config_type: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, in one line."""
    found = {}
    for base in reversed(config_type.__mro__):
        if dataclasses.is_dataclass(base):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(tree, ast.ClassDef)
            for field, text in itertools.pairwise(tree.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    name, value = field.target, text.value
                    if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                        found[name.id] = " ".join(str(value.value).split())
    return found


def _first(text: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=\.) (?=[A-Z`0-9])", " ".join(text.split()), maxsplit=1)[0]


def _values(hint: Any) -> str:
    """What is written after a flag."""
    for one in (hint, *get_args(hint)):
        if get_origin(one) is Literal:
            return "{" + ",".join(get_args(one)) + "}"
    kinds = [one for one in (get_args(hint) or (hint,)) if one is not type(None)]
    more = " ..." if get_origin(hint) is tuple else ""
    return _WORDS.get(kinds[0], "PATH") + more


def _wrapped(text: str, indent: int) -> list[str]:
    width = min(160, shutil.get_terminal_size((100, 24)).columns) - indent
    return textwrap.wrap(text, max(40, width), break_on_hyphens=False)


def _line(name: str, text: str) -> list[str]:
    """A flag and its text beside it, or below it if the flag is long."""
    lines = _wrapped(text, _COLUMN)
    if len(name) + 4 > _COLUMN:
        names = [part.replace(", ", ",") for part in _wrapped(name.replace(",", ", "), 2)]
        return [*(f"  {part}" for part in names), *(" " * _COLUMN + line for line in lines)]
    head, *rest = lines
    return [f"  {name}".ljust(_COLUMN) + head, *(" " * _COLUMN + line for line in rest)]
