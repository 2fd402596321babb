"""Bytes in the units that suit their size."""

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}


def unit_of(size: float) -> tuple[str, int]:
    """The largest unit that is not above a size: its name and its bytes."""
    return next(((k, n) for k, n in _UNITS.items() if size >= n), ("bytes", 1))


def in_words(size: float) -> str:
    """A number of bytes in its unit: `3.42 MiB`."""
    name, of = unit_of(size)
    value = size / of
    digits = 0 if name == "bytes" else max(0, 2 - (value >= 10) - (value >= 100))
    return f"{value:,.{digits}f} {name}"
