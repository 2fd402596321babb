"""When subspaces are refreshed: at a fixed gap, staggered over the matrices, or adaptively.

GaLore (arXiv:2403.03507, algorithm 2) refreshes every matrix every `update_proj_gap` steps.
Q-GaLore (arXiv:2407.08296, section 3.2) doubles the gap of a matrix once the similarities of its
last few subspaces are high on average. Here the similarity does not depend on the signs and the
order of a basis' vectors, the gap has a cap, and after a doubling new similarities are waited for.
Here the next due step is computed; `galore_optax.stages` compares it with the count.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from galore_optax import checks

_NEVER = 2**30  # steps of a gap that is infinite or no number
_LAST = 2**31 - 1


def check_gap(gap: Any, *kinds: type) -> None:
    """Refuses what is no integer of at least 1, no function, and of none of the kinds."""
    if not (callable(gap) or isinstance(gap, kinds)):
        checks.whole(gap, "update_proj_gap")


@dataclasses.dataclass(frozen=True)
class Staggered:
    """Spreads the second and all later refreshes over the steps of a gap.

    No step then carries the refreshes of all matrices; the first refresh is every matrix's at once.

    Attributes:
        gap: Steps between two refreshes of a matrix, or a function from the step to that number.

    Examples:
        >>> import optax
        >>> from galore_optax import Staggered, galore
        >>> tx = galore(8, optax.adam(1e-3), update_proj_gap=Staggered(200))
    """

    gap: int | optax.Schedule

    def __post_init__(self):
        check_gap(self.gap)


Similarity = Callable[[Float[Array, "n r"], Float[Array, "n r"]], Float[Array, ""]]


def overlap(old: Float[Array, "n r"], new: Float[Array, "n r"]) -> Float[Array, ""]:
    """‖P_oldᵀ P_new‖² / r: the share of one subspace that lies in the other, 0 to 1."""
    product = old.T @ new
    return jnp.sum(product * product) / old.shape[-1]


def first_cosine(old: Float[Array, "n r"], new: Float[Array, "n r"]) -> Float[Array, ""]:
    """The cosine between the two first vectors, -1 to 1: the published measure.

    It needs singular vectors in order, `subspace="svd"`, and depends on their arbitrary signs.
    """
    a, b = old[:, 0], new[:, 0]
    return a @ b / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-30)


SIMILARITIES: dict[str, Similarity] = {"overlap": overlap, "first_cosine": first_cosine}


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Doubles the gap of a matrix whose subspace has stopped turning, as Q-GaLore does.

    Attributes:
        gap: The gap before any doubling: an integer, a function of the step, or `Staggered`.
        threshold: Mean similarity from which the gap doubles; 0.4 in the paper.
        window: Refreshes over which the mean is taken, all after the last doubling; 5 in the paper.
        max_factor: The gap grows to at most this multiple of `gap`.
        similarity: "overlap" (`overlap`), or "first_cosine", the published one (`first_cosine`).

    References:
        Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.2.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import Adaptive, galore
        >>> tx = galore(8, optax.adam(1e-3), update_proj_gap=Adaptive(200, window=3))
        >>> tx.init({"w": jnp.ones((64, 256))}).adaptation.factor
        Array([1], dtype=int32)
    """

    gap: int | optax.Schedule | Staggered
    threshold: float = 0.4
    window: int = 5
    max_factor: int = 16
    similarity: str = "overlap"

    def __post_init__(self):
        check_gap(self.gap, Staggered)
        checks.number(self.threshold, "threshold", below=2**31, such_as=0.4)
        for name in ("window", "max_factor"):
            checks.whole(getattr(self, name), name, below=2**20)
        checks.choice(self.similarity, "similarity", tuple(SIMILARITIES))


RefreshGap = int | optax.Schedule | Staggered | Adaptive


class Adaptation(NamedTuple):
    """State of `Adaptive`, for each matrix.

    Attributes:
        factor: By how much the gap has grown.
        seen: How many of the similarities in the window are set.
        recent: The window, the latest last.
    """

    factor: Int[Array, " matrices"]
    seen: Int[Array, " matrices"]
    recent: Float[Array, "matrices window"]


def first_timing(gap: RefreshGap, matrices: int) -> dict[str, Any]:
    """Those fields of a first `GaLoreState` that say when refreshes are due: all at once."""
    # At least one entry, since Orbax saves no array without elements.
    matrices = max(1, matrices)

    def zeros() -> Int[Array, " matrices"]:
        # An array for each use: one buffer cannot be donated twice.
        return jnp.zeros(matrices, jnp.int32)

    adaptation = ()
    if isinstance(gap, Adaptive):
        recent = jnp.zeros((matrices, gap.window), jnp.float32)
        adaptation = Adaptation(jnp.ones(matrices, jnp.int32), zeros(), recent)
    return dict(next_refresh=zeros(), refreshes=zeros(), adaptation=adaptation)


def check_adaptation(gap: RefreshGap, adaptation: Any) -> None:
    """Refuses a state that was made with another kind of gap, or with another window."""
    if isinstance(gap, Adaptive):
        found = adaptation.recent.shape[-1] if adaptation else "no"
        if found != gap.window:
            raise ValueError(
                f"state: it has {found} similarities of each matrix instead of {gap.window}, which "
                f"update_proj_gap={checks.said(gap)} needs; give the state that init made with it"
            )


def next_timing(
    gap: RefreshGap,
    state: Any,
    happened: Sequence[Bool[Array, " matrices"]],
    similarities: Sequence[Float[Array, " matrices"]],
    phases: Callable[[], Float[Array, " matrices"]],
) -> dict[str, Any]:
    """Those fields of the `GaLoreState` after a step that say when refreshes are due.

    Args:
        gap: `update_proj_gap`.
        state: The state before the step.
        happened: For each projected leaf, which matrices were refreshed in the step.
        similarities: Those of the new subspaces to the ones before.
        phases: Returns the `staggered_phases` of all matrices.
    """
    refreshed, count = jnp.concatenate(happened), jnp.asarray(state.count)
    adaptation, steps = state.adaptation, _gap_at(gap, count)
    if isinstance(gap.gap if isinstance(gap, Adaptive) else gap, Staggered):
        # The second refresh comes half a gap to one and a half gaps after the first.
        own = phases()
        own = jnp.ceil(steps.astype(own.dtype) * own).astype(jnp.int32)
        steps = jnp.where(state.refreshes == 0, own, steps)
    if isinstance(gap, Adaptive):
        # The first basis replaced a random one: their similarity means nothing.
        comparable = refreshed & (state.refreshes > 0)
        adaptation = _adapted(gap, adaptation, comparable, jnp.concatenate(similarities))
        steps = jnp.minimum(steps, _LAST // adaptation.factor) * adaptation.factor
    later = count + jnp.minimum(steps, _LAST - count)
    return dict(
        next_refresh=jnp.where(refreshed, later, state.next_refresh),
        refreshes=state.refreshes + refreshed.astype(jnp.int32),
        adaptation=adaptation,
    )


def _adapted(rule: Adaptive, state: Any, counts: Any, similarities: Any) -> Adaptation:
    """Takes in the similarities of the matrices that count."""
    later = jnp.concatenate([state.recent[:, 1:], similarities[:, None]], axis=1)
    recent = jnp.where(counts[:, None], later, state.recent)
    seen = jnp.minimum(state.seen + counts.astype(jnp.int32), rule.window)
    doubles = counts & (seen == rule.window) & (jnp.mean(recent, axis=1) >= rule.threshold)
    fits = 2 * state.factor <= rule.max_factor
    return Adaptation(
        factor=jnp.where(doubles & fits, 2, 1) * state.factor,
        seen=jnp.where(doubles, 0, seen),
        recent=recent,
    )


def staggered_phases(
    own: dict[str, int], whole: Sequence[dict[str, int]], layer: ArrayLike, layers: int
) -> Float[Array, " matrices"]:
    """Numbers from 0.5 to 1.5, evenly spread over all matrices of all leaves and layers.

    Args:
        own: How many matrices each leaf of one layer holds, by its path.
        whole: For each `galore` of a model, the same of all leaves in all layers. If none has the
            paths of `own`, these are all there are.
        layer: The index of the layer.
        layers: The number of layers.
    """
    model = {path: count * layers for path, count in own.items()}
    model = next((other for other in whole if own.keys() <= other.keys()), model)
    total = sum(model.values())
    places = (np.arange(total) + 0.5) / total + 0.5
    leaves = dict(zip(model, np.split(places, np.cumsum([*model.values()])[:-1]), strict=True))
    by_layer = np.concatenate([leaves[path].reshape(layers, -1) for path in own], axis=1)
    return jnp.asarray(by_layer, jnp.float32)[layer]


def check_schedule(gap: RefreshGap) -> None:
    """Calls a gap that is a function of the step once, and refuses one that fails."""
    if callable(steps := _steps(gap)):
        checks.schedule(steps, "update_proj_gap", above=0)


def _steps(gap: RefreshGap) -> int | optax.Schedule:
    while isinstance(gap, Adaptive | Staggered):
        gap = gap.gap
    return gap


def _gap_at(gap: RefreshGap, count: Int[Array, ""]) -> Int[Array, ""]:
    steps = _steps(gap)
    steps = jnp.asarray(steps(count) if callable(steps) else steps)
    return jnp.where(steps < _NEVER, jnp.maximum(steps, 1), _NEVER).astype(jnp.int32)
