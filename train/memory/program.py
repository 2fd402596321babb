"""What an optimized GPU program does, read from its text: kernels, bytes, products, collectives.

Rules. Every instruction that does something is a kernel. It reads its operands once and writes its
result once. If an operand is only sliced, the slices count; if a result is written in place, the
written part. A loop's body counts as often as it runs. Of a conditional the branch that moves less
counts: a step without a refresh. A kernel takes at least the time of its bytes at the memory's
bandwidth, of its products at the peak, and of the gap between two launches.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from train.memory.hlo import Computation, Instruction, array_bytes, dimensions, group, numbers, read

# Seconds from the start of one kernel to the next, at least.
LAUNCH = 2e-6
# Instructions that are no kernel.
_FREE = (
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "iota", "copy-done",
        "async-done",
)  # fmt: skip
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
# Kernels of the library with a product. Its left factor is the first operand with two axes.
_PRODUCTS = ("quantized_product", "product_added")


class Count(NamedTuple):
    """What a program, or a part of it, does on one device."""

    bytes_moved: float = 0
    kernels: int = 0
    products_flops: float = 0
    floor_seconds: float = 0
    collectives: Mapping[str, tuple[int, float]] = {}  # by kind: how many, bytes

    def and_then(self, other: "Count", times: int = 1) -> "Count":
        """This part, followed by another part `times` times."""
        collectives = dict(self.collectives)
        for kind, (number, size) in other.collectives.items():
            before = collectives.get(kind, (0, 0))
            collectives[kind] = before[0] + times * number, before[1] + times * size
        return Count(
            self.bytes_moved + times * other.bytes_moved,
            self.kernels + times * other.kernels,
            self.products_flops + times * other.products_flops,
            self.floor_seconds + times * other.floor_seconds,
            collectives,
        )

    def as_json(self) -> dict[str, object]:
        """The names that docs/memory.md documents."""
        kinds = {
            kind: {"count": n, "bytes": round(size)} for kind, (n, size) in self.collectives.items()
        }
        rounded = {
            "bytes_moved": round(self.bytes_moved),
            "products_flops": round(self.products_flops),
        }
        return {**self._asdict(), **rounded, "collectives": kinds}


def count(
    text: str,
    bandwidth: float,
    peak: float,
    branch: Callable[..., Count] = min,
) -> Count:
    """What the program of this text does, on a card with a bandwidth (bytes/s) and a peak (FLOP/s).

    `branch=max` counts the dearer branch of conditionals: a step that refreshes all subspaces.
    """
    computations, entry = read(text)

    @functools.cache
    def run(name: str) -> Count:
        total = Count()
        shapes = {i.name: i.shape for i in computations[name]}
        for i in computations[name]:
            if i.operation == "while":
                times = int(group(r'known_trip_count":\{"n":"(\d+)"', i.attributes) or 1)
                total = total.and_then(run(i.called("body")), times)
            elif i.operation == "conditional":
                names = _branches(i)
                total = total.and_then(branch(map(run, names), key=lambda one: one.bytes_moved))
            elif i.operation == "call":
                total = total.and_then(run(i.called("to_apply")))
            elif i.operation == "async-start" and "calls=" in i.attributes:
                total = total.and_then(run(i.called("calls")))
            elif i.operation not in _FREE:
                total = total.and_then(kernel(i, shapes))
        return total

    def kernel(i: Instruction, shapes: Mapping[str, str]) -> Count:
        if i.operation == "fusion":
            inside = computations[i.called("calls")]
            moved, own = _bytes_of_fusion(inside), {x.name: x.shape for x in inside}
            flops = sum(_flops(x, own) for x in inside)
        else:
            moved, flops = _bytes_of_instruction(i, shapes), _flops(i, shapes)
        seconds = max(LAUNCH, moved / bandwidth, flops / peak)
        return Count(moved, 1, flops, seconds, _collective(i, shapes))

    return run(entry)


def _branches(i: Instruction) -> list[str]:
    listed = group(r"branch_computations=\{([^}]*)\}", i.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed)
    return [i.called("true_computation"), i.called("false_computation")]


def _bytes_of_instruction(i: Instruction, shapes: Mapping[str, str]) -> float:
    """Bytes that an instruction that is no fusion moves; `shapes` has its operands'."""
    if i.operation == "dynamic-update-slice":
        return 2 * array_bytes(shapes.get(i.operands[1], ""))
    if i.operation in ("dynamic-slice", "slice"):
        return 2 * array_bytes(i.shape)
    return array_bytes(i.shape) + sum(array_bytes(shapes.get(name, "")) for name in i.operands)


def _bytes_of_fusion(body: Computation) -> float:
    """Bytes that a fusion writes, and reads of its parameters: only what is asked of them.

    A fusion computes no number that is not needed. So from the roots to the parameters each
    instruction is asked for some of its numbers, and asks its operands for those that these need.
    """
    by_name = {i.name: i for i in body}
    asked: dict[str, float] = defaultdict(float)
    in_place: set[str] = set()
    written = 0.0
    for root in _roots(body, by_name):
        made = root
        while made.operation in ("bitcast", "convert", "copy") and made.operands[0] in by_name:
            made = by_name[made.operands[0]]
        if made.operation == "dynamic-update-slice" and made.operands[1] in by_name:
            in_place |= {made.name, root.name}
            made = root = by_name[made.operands[1]]
        written += array_bytes(root.shape)
        asked[root.name] = max(asked[root.name], numbers(root.shape))
    for i in reversed(body):  # users stand after their operands
        if not asked[i.name] or i.operation == "parameter" or i.name in in_place:
            continue
        for name in i.operands:
            if name in by_name:
                whole = numbers(by_name[name].shape)
                wanted = min(_asked_of(i, name, asked[i.name], whole), whole)
                slices = i.operation in ("slice", "dynamic-slice")  # of several places
                both = asked[name] + wanted if slices else max(asked[name], wanted)
                asked[name] = min(whole, both) if slices else both
    return written + sum(
        array_bytes(i.shape) * min(1.0, asked[i.name] / max(1, numbers(i.shape)))
        for i in body
        if i.operation == "parameter"
    )


def _roots(body: Computation, by_name: Mapping[str, Instruction]) -> list[Instruction]:
    """The instructions whose results a fusion writes."""
    root = next((i for i in body if i.root), body[-1])
    if root.operation != "tuple":
        return [root]
    return [by_name[name] for name in root.operands if name in by_name]


def _asked_of(i: Instruction, operand: str, needed: float, whole: int) -> float:
    """How many of an operand's `whole` numbers are needed for `needed` of an instruction's."""
    if i.operation in ("slice", "dynamic-slice", "gather"):
        return needed if operand == i.operands[0] else whole
    if i.operation in ("reduce", "dot", "reduce-window", "scatter", "sort"):
        return whole * min(1.0, needed / max(1, numbers(i.shape)))
    if i.operation == "dynamic-update-slice":
        return whole if operand == i.operands[1] else needed
    return needed


def _flops(i: Instruction, shapes: Mapping[str, str]) -> float:
    """Floating-point operations of a product or of attention; `shapes` has its operands'."""
    if i.operation == "dot":
        left = dimensions(shapes[i.operands[0]])
        summed = group(r"lhs_contracting_dims=\{([0-9,]*)\}", i.attributes)
        return 2 * numbers(i.shape) * math.prod(left[int(d)] for d in summed.split(",") if d)
    if i.operation != "custom-call":
        return 0
    if "fmha" in i.attributes.lower():
        # Two products of the forward pass with the length (B, N, L, K); five of the backward pass.
        sizes = dimensions(i.shape)
        return 4 * math.prod(sizes) * sizes[2] * (2.5 if "Backward" in i.attributes else 1)
    if any(name in i.attributes for name in _PRODUCTS):
        sizes = (dimensions(shapes.get(name, "")) for name in i.operands)
        return 2 * numbers(i.shape) * next((own[1] for own in sizes if len(own) == 2), 0)
    gemm = "cublas" in i.attributes or "gemm" in i.attributes
    if gemm and "triangular" not in i.attributes and len(i.operands) > 1:
        # (m, k) times (k, n) to (m, n): the root of the three sizes' product is m k n.
        a, b = (numbers(shapes.get(name, "")) for name in i.operands[:2])
        return 2 * math.sqrt(a * b * numbers(i.shape))
    return 0


def _collective(i: Instruction, shapes: Mapping[str, str]) -> Mapping[str, tuple[int, float]]:
    """A device's part in a collective: the kind, 1, and the bytes of the whole that is sent."""
    kind = i.operation.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return {}
    given = sum(array_bytes(shapes.get(name, "")) for name in i.operands)
    made = array_bytes(i.shape) - (given if i.operation == "all-gather-start" else 0)
    return {kind: (1, made if kind == "all-gather" else given)}


def in_words(does: Mapping[str, Any]) -> str:
    """What a program does, in a line."""
    least = does["floor_seconds"]
    sent = (
        f"{kind} {x['count']:,} ({x['bytes'] / 1e9:,.3f} GB)"
        for kind, x in does["collectives"].items()
    )
    return ", ".join(
        (
            f"{does['kernels']:,} kernels",
            f"{does['bytes_moved'] / 1e9:,.1f} GB moved",
            f"{does['products_flops'] / 1e12:,.2f} TFLOP of products",
            "least time unknown" if least is None else f"at least {least * 1e3:,.1f} ms",
            *sent,
        )
    )
