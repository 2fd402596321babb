"""What fits a card: methods from the one that gives up least, and for each the batch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from train.config.settings import Resolved
from train.memory.plan import MemoryPlan, rows_in_memory

# Ways to train a model, the one that gives up least first. Each takes less than the one before.
_LAYERWISE = {"layerwise": True, "rematerialize": True}
_Q_GALORE = {"optimizer": "q-galore-adamw8bit", **_LAYERWISE}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "AdamW, checkpointing": {"optimizer": "adamw", "rematerialize": True},
    "GaLore": {"optimizer": "galore-adamw", "rematerialize": True},
    "layer-wise GaLore": {"optimizer": "galore-adamw", **_LAYERWISE},
    "8-bit GaLore": {"optimizer": "galore-adamw8bit", **_LAYERWISE},
    "Q-GaLore": _Q_GALORE,
    "12 GB card": {**_Q_GALORE, "moment_bits": 4},
    "10 GB card": {**_Q_GALORE, "moment_bits": 4, "side": "larger", "embedding_bits": 8},
}


# A share of the room: if the known part of the smallest step is above it, that is tried first.
FULL = 0.95


class Fit(NamedTuple):
    """Settings that fit, and their plan."""

    config: Resolved
    plan: MemoryPlan


def splits(
    batch: int, accumulate: int | None, shards: int, keep_batch: bool
) -> Iterator[tuple[int, int]]:
    """Pairs of --batch-size and --accumulate to try, the preferred ones first.

    The batch stays and microbatches get smaller, unless `accumulate` is given; then, unless
    `keep_batch`, the batch gets smaller. A microbatch is a multiple of `shards`.
    """
    small = [n for n in range(1, math.isqrt(batch) + 1) if batch % n == 0]
    divisors = sorted({*small, *(batch // n for n in small)}, reverse=True)
    sizes = [n for n in divisors if n % shards == 0]
    for rows in sizes:
        if accumulate in (None, batch // rows):
            yield batch, batch // rows
    for rows in () if keep_batch else sizes[1:]:
        if rows % ((accumulate or 1) * shards) == 0:
            yield rows, accumulate or 1


def first_fit(
    tried: Sequence[Resolved],
    room: float,
    known: Callable[[Resolved], int],
    planned: Callable[[Resolved], MemoryPlan],
) -> Fit | None:
    """The first settings whose planned peak is within `room` bytes, or None.

    `tried` are settings of one method that differ in batch and microbatches. `known` is the part of
    the peak that is known without compiling a step; `planned` compiles it, which takes most of a
    minute for a large model. The rest of the peak grows with the rows in memory, at most in
    proportion, so that settings which cannot fit are not compiled.
    """
    sizes = [(one, known(one)) for one in tried]
    left = [(one, size) for one, size in sizes if size <= room]
    smallest_first = bool(left) and left[-1][1] > FULL * room
    failed: list[tuple[int, int]] = []  # rows in memory, and the rest of the peak
    best = None
    for one, size in left[-1:] + left[:-1] if smallest_first else left:
        rows = rows_in_memory(one)
        if any(size + rest * min(1, rows / n) > room for n, rest in failed):
            continue
        plan = planned(one)
        if plan.peak > room:
            failed.append((rows, plan.peak - size))
        elif smallest_first and one is left[-1][0]:
            best = Fit(one, plan)
        else:
            return Fit(one, plan)
    return best
