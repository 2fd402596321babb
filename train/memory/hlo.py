"""A parser of an optimized XLA program's text: its computations, their instructions, shapes.

`train.memory.program` counts kernels and bytes with it.
"""

import math
import re
from typing import NamedTuple

# Bytes of a number of each type.
_SIZES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2,
    "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
    "c64": 8, "token": 0, "opaque": 0,
}  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
# Root or not, name, shape, operation, the rest.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\w+\[[^ ]*) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    shape: str  # of its result
    operation: str
    operands: list[str]
    attributes: str
    root: bool

    def called(self, attribute: str) -> str:
        """The name of the computation that an attribute names."""
        return group(rf"{attribute}=%?([\w.\-]+)", self.attributes)


Computation = list[Instruction]


def read(text: str) -> tuple[dict[str, Computation], str]:
    """A program's computations by name, and the name of the one that is run."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            operands, attributes = _split_at_closing(found[5])
            names = re.findall(r"%([\w.\-]+)", operands)
            current.append(
                Instruction(found[2], found[3], found[4], names, attributes, bool(found[1]))
            )
    if not entry:
        raise ValueError("the text of a program has no ENTRY computation")
    return computations, entry


def _split_at_closing(text: str) -> tuple[str, str]:
    """The text before the parenthesis that closes one opened before the text, and after it."""
    depth = 1
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return text[:at], text[at + 1 :]
    return text, ""


def group(pattern: str, text: str) -> str:
    """The first group of the first match, or an empty string."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def dimensions(shape: str) -> list[int]:
    """The sizes of the axes of an array, or of the first of a tuple."""
    found = _ARRAY.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def numbers(shape: str) -> int:
    """How many numbers an array has, or the first of a tuple."""
    return math.prod(dimensions(shape)) if _ARRAY.search(shape) else 0


def array_bytes(shape: str) -> float:
    """Bytes of an array, or of all of a tuple's."""
    return sum(
        _SIZES.get(kind, 4) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _ARRAY.findall(shape)
    )
