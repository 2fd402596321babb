"""Reads who imports whom, checks that imports go one way, and draws the rooms.

    python -m docs.rooms

A room is a folder of modules. The files directly in `train`, its commands, are one room. Of those
directly in `galore_optax` three kinds are rooms: the foundation is those that import no room;
`galore` is `galore.py` and what it imports of the others; each other file is a room by itself.
The picture, `rooms.png` here, leaves out an arrow where other arrows lead to the same room.
Exit code 1, and a line for each wrong import, if there are any; nothing is drawn then.
"""

import ast
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("train", "models", "galore_optax")
FOUNDATION, CORE = "galore_optax.foundation", "galore_optax.galore"
PICTURE = Path(__file__).parent / "rooms.png"
# From top to bottom. A room may import rooms that stand in a lower row, none in its own.
ROWS = (
    ("train.commands",),
    ("train.run",),
    ("train.memory",),
    ("train.step",),
    ("train.config", "train.data"),
    ("models.hugging_face",),
    ("models.encoder",),
    ("models.llama",),
    ("galore_optax.recipes",),
    ("galore_optax.explanation", "galore_optax.memory"),
    ("galore_optax.layerwise", "galore_optax.adapters"),
    (CORE,),
    ("galore_optax.projection",),
    ("galore_optax.quantization",),
    ("galore_optax.trace", FOUNDATION),
)
# Modules that must not be imported anywhere in a package, with their submodules.
FORBIDDEN = {"galore_optax": ("flax", "models", "train"), "models": ("train",)}

Imports = Mapping[str, set[str]]  # from a module's dotted name to those of what it imports


def modules(root: Path) -> dict[str, Path]:
    """Every module of the three packages by its dotted name; a package has its folder's name."""
    found = {}
    for path in sorted(file for name in PACKAGES for file in (root / name).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_imports(root: Path) -> tuple[dict[str, set[str]], list[str]]:
    """Which module imports which, in functions and for type checkers too; and forbidden imports."""
    files = modules(root)
    imports: dict[str, set[str]] = {}
    wrong = []
    for module, path in files.items():
        imports[module] = set()
        for target in _targets(ast.parse(path.read_text())):
            if target.split(".")[0] in FORBIDDEN.get(module.split(".")[0], ()):
                wrong.append(f"{module} imports {target}")
            own = next(
                (name for name in (target, target.rpartition(".")[0]) if name in files), None
            )
            if own is not None and own != module:
                imports[module].add(own)
    return imports, sorted(set(wrong))


def _targets(tree: ast.Module) -> Iterator[str]:
    """`a.b` for `import a.b`, and `a.b.c` for `from a.b import c`, be c a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def rooms(imports: Imports) -> dict[str, str]:
    """The room of each module. `__init__` files re-export, and belong to none."""
    found = {}
    for module in imports:
        package, *rest = module.split(".")
        is_folder = any(other.startswith(f"{module}.") for other in imports)
        if not rest or (len(rest) == 1 and is_folder):
            continue
        found[module] = f"{package}.{rest[0]}"
        if len(rest) == 1 and package == "train":
            found[module] = "train.commands"
    # What imports no room, and only files that do not either, is foundation.
    own = {module for module, room in found.items() if module == room}
    low = {module for module in own if module.startswith("galore_optax.")}
    while above := {module for module in low if imports[module] & (found.keys() - low)}:
        low -= above
    core = {CORE} & own
    while new := {target for module in core for target in imports[module] & own} - low - core:
        core |= new
    return found | dict.fromkeys(low, FOUNDATION) | dict.fromkeys(core, CORE)


def edges(imports: Imports) -> dict[str, dict[str, str]]:
    """For each room the rooms that it imports, each with an import that shows it."""
    of = rooms(imports)
    found: dict[str, dict[str, str]] = {room: {} for room in of.values()}
    for module, targets in imports.items():
        for target in sorted(targets):
            a, b = of.get(module), of.get(target)
            if a is not None and b is not None and a != b:
                found[a].setdefault(b, f"{module} imports {target}")
    return found


def violations(root: Path = ROOT) -> list[str]:
    """A line for each forbidden import, cycle of modules, and import against the rows."""
    imports, wrong = read_imports(root)
    if cycle := _cycle(imports):
        wrong.append(f"modules import each other in a circle: {' -> '.join(cycle)}")
    row = {room: i for i, rooms in enumerate(ROWS) for room in rooms}
    between = edges(imports)
    for room in sorted(between.keys() - row.keys()):
        wrong.append(f"{room} has no row: say in ROWS of docs/rooms.py what it may import")
    for room, targets in between.items():
        for target, example in targets.items():
            if room in row and target in row and row[target] <= row[room]:
                wrong.append(f"{room} must not import {target}: {example}")
    return wrong


def _cycle(imports: Imports) -> list[str] | None:
    """One circle of imports, its first module again at the end, or None."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str] | None:
        for target in sorted(imports[path[-1]]):
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in done and (cycle := search([*path, target])):
                return cycle
        done.add(path[-1])
        return None

    return next((cycle for module in imports if (cycle := search([module]))), None)


Box = tuple[float, float, float, float]  # left, bottom, width, height
INK, FAINT, LINE, BETWEEN, PANEL = "#1f2430", "#5c6470", "#2f6fb0", "#d9622b", "#eef1f5"
NOTE = "A room may import the rooms\nbelow it and the packages\nto its right."


def draw(picture: Path) -> None:
    """A panel for each package, a box for each room with its files, arrows from room to room."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    imports, _ = read_imports(ROOT)
    of, between = rooms(imports), edges(imports)
    figure = plt.figure()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    x = lowest = 0.0
    for package, width in zip(PACKAGES, (35, 25, 39), strict=True):
        rows = [[room for room in row if room.split(".")[0] == package] for row in ROWS]
        rows = [there for row in rows if (there := [room for room in row if room in between])]
        boxes = _draw_panel(axes, x, width, package, rows, of)
        for room in boxes:
            inside = {target for target in between[room] if target in boxes}
            for target in inside - _reached(between, inside):
                _draw_arrow(axes, boxes, room, target)
        bottom = min(bottom for _, bottom, _, _ in boxes.values())
        lowest = min(lowest, bottom - 3)
        if package == "models":
            note = {"size": 8, "style": "italic", "color": FAINT, "linespacing": 1.5}
            axes.text(x + width / 2, bottom - 6, NOTE, ha="center", va="top", **note)
        x += width
        if package != PACKAGES[-1]:
            _arrow(axes, (x + 0.8, -4), (x + 7.2, -4), lw=2.6, color=BETWEEN, mutation_scale=16)
        x += 8
    axes.set(xlim=(-1, x - 7), ylim=(lowest, 1))
    figure.set_size_inches((x - 6) / 13, (1 - lowest) / 13)
    figure.savefig(picture, dpi=180, facecolor="white")
    plt.close(figure)


def _reached(between: Mapping[str, Mapping[str, str]], starts: set[str]) -> set[str]:
    """The rooms that some of these rooms import, through others too."""
    reached: set[str] = set()
    waiting = [target for room in starts for target in between[room]]
    while waiting:
        if (room := waiting.pop()) not in reached:
            reached.add(room)
            waiting.extend(between[room])
    return reached


def _draw_panel(
    axes: Any, x: float, width: float, package: str, rows: list[list[str]], of: Mapping[str, str]
) -> dict[str, Box]:
    """Draws a package's boxes, row below row; returns where they are."""
    boxes: dict[str, Box] = {}
    margin, y = 4.0, -8.0
    for row in rows:
        each = (width - 2 * margin - 2 * (len(row) - 1)) / len(row)
        files = {}
        for room in row:
            names = [module.rpartition(".")[2] for module in of if of[module] == room]
            names = [] if names == [room.rpartition(".")[2]] else names
            files[room] = textwrap.wrap(", ".join(names), int(1.38 * each))
        height = 3.4 + 1.7 * max(map(len, files.values()))
        for j, room in enumerate(row):
            left = x + margin + j * (each + 2)
            boxes[room] = (left, y - height, each, height)
            _rounded(axes, boxes[room], "white", LINE)
            centre = {"x": left + each / 2, "ha": "center", "va": "top"}
            name, lines = room.rpartition(".")[2], "\n".join(files[room])
            axes.text(y=y - 0.8, s=name, size=9.5, weight="bold", color=INK, **centre)
            axes.text(y=y - 3.1, s=lines, size=6.8, color=FAINT, linespacing=1.25, **centre)
        y -= height + 2.8
    _rounded(axes, (x, y + 0.8, width, -y - 0.8), PANEL, PANEL).set_zorder(0)
    axes.text(
        x + width / 2, -4, package, size=13, weight="bold", color=INK, ha="center", va="center"
    )
    return boxes


def _rounded(axes: Any, box: Box, face: str, edge: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    left, bottom, width, height = box
    style = "round,pad=0,rounding_size=0.8"
    patch = FancyBboxPatch((left, bottom), width, height, style, fc=face, ec=edge, lw=1)
    return axes.add_patch(patch)


def _draw_arrow(axes: Any, boxes: Mapping[str, Box], room: str, target: str) -> None:
    """Straight down to a box in the next row, else around the boxes in between, at their sides."""
    left, bottom, width, height = boxes[room]
    to_left, to_bottom, to_width, to_height = boxes[target]
    to_top = to_bottom + to_height
    if not any(to_top < other[1] < bottom for other in boxes.values()):
        x = (max(left, to_left) + min(left + width, to_left + to_width)) / 2
        start = min(max(x, left + 2), left + width - 2)
        end = min(max(x, to_left + 2), to_left + to_width - 2)
        _arrow(axes, (start, bottom), (end, to_top), lw=1.1, color=LINE)
        return
    at_left = max(left, to_left) <= min(box[0] for box in boxes.values())
    x, to_x = (left, to_left) if at_left else (left + width, to_left + to_width)
    start, end = (x, bottom + height / 2), (to_x, to_top - 1.7)
    bulge = 5.2 / (start[1] - end[1])
    style = f"arc3,rad={bulge if at_left else -bulge}"
    _arrow(axes, start, end, lw=1.1, color=LINE, connectionstyle=style)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    properties = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **style}
    axes.annotate("", end, start, arrowprops=properties)


def main() -> int:
    """Checks, then draws."""
    if wrong := violations():
        print("\n".join(wrong), file=sys.stderr)
        return 1
    draw(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
