"""Refreshes that become rarer, matrix by matrix, where the subspace has stopped turning.

Q-GaLore (arXiv:2407.08296, section 3.2): once the similarities of the last few refreshes to those
before them are high in the mean, the gap to the next doubles. Here the similarity does not depend
on the signs and the order of a basis' vectors, the gap has a cap, and after a doubling new
similarities are waited for.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from galore_optax import checks

Similarity = Callable[[Float[Array, "n r"], Float[Array, "n r"]], Float[Array, ""]]


def overlap(old: Float[Array, "n r"], new: Float[Array, "n r"]) -> Float[Array, ""]:
    """‖P_oldᵀ P_new‖² / r: the share of one subspace that lies in the other, 0 to 1.

    Of bases with columns of zeros (`rank_schedule`), r is the number of the others, in that which
    has fewer of them.
    """
    product = old.T @ new
    used = [jnp.sum(jnp.any(basis != 0, axis=0)) for basis in (old, new)]
    return jnp.sum(product * product) / jnp.maximum(jnp.minimum(*used), 1)


def first_cosine(old: Float[Array, "n r"], new: Float[Array, "n r"]) -> Float[Array, ""]:
    """The cosine between the two first vectors, -1 to 1: the published measure.

    It means something where bases are singular vectors in order, `subspace="svd"`, whose signs are
    arbitrary all the same.
    """
    a, b = old[:, 0], new[:, 0]
    return a @ b / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-30)


SIMILARITIES: dict[str, Similarity] = {"overlap": overlap, "first_cosine": first_cosine}


@dataclasses.dataclass(frozen=True)
class AdaptiveRefresh:
    """When a matrix's gap between refreshes doubles.

    Attributes:
        threshold: Mean similarity from which it does; the paper's is 0.4.
        window: Refreshes over which the mean is taken, all after the last doubling; 5 in the paper.
        max_factor: The gap grows to no more than so many times `update_proj_gap`.
        similarity: "overlap" (`overlap`), or "first_cosine", the published one (`first_cosine`).

    Raises:
        ValueError: If one of them is out of range.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import AdaptiveRefresh, galore
        >>> tx = galore(8, optax.adam(1e-3), adaptive_refresh=AdaptiveRefresh(window=3))
        >>> tx.init({"w": jnp.ones((64, 256))}).adaptation.factor
        Array([1], dtype=int32)
    """

    threshold: float = 0.4
    window: int = 5
    max_factor: int = 16
    similarity: str = "overlap"

    def __post_init__(self):
        checks.number(self.threshold, "threshold", such_as=0.4)
        for name in ("window", "max_factor"):
            checks.whole(getattr(self, name), name, below=2**20)
        checks.choice(self.similarity, "similarity", tuple(SIMILARITIES))

    def init(self, matrices: int) -> "Adaptation":
        """Nothing seen yet, every gap as it was given."""
        return Adaptation(
            factor=jnp.ones(matrices, jnp.int32),
            seen=jnp.zeros(matrices, jnp.int32),
            recent=jnp.zeros((matrices, self.window), jnp.float32),
        )

    def update(
        self,
        state: "Adaptation",
        counts: Bool[Array, " matrices"],
        similarities: Float[Array, " matrices"],
    ) -> "Adaptation":
        """Takes in the similarities of the matrices that count."""
        later = jnp.concatenate([state.recent[:, 1:], similarities[:, None]], axis=1)
        recent = jnp.where(counts[:, None], later, state.recent)
        seen = jnp.minimum(state.seen + counts, self.window)
        doubles = counts & (seen == self.window) & (jnp.mean(recent, axis=1) >= self.threshold)
        return Adaptation(
            factor=jnp.where(doubles & (2 * state.factor <= self.max_factor), 2, 1) * state.factor,
            seen=jnp.where(doubles, 0, seen),
            recent=recent,
        )


class Adaptation(NamedTuple):
    """State of `AdaptiveRefresh`, for each matrix.

    Attributes:
        factor: By how much the gap has grown.
        seen: How many of the similarities in the window are there.
        recent: The window, the latest last.
    """

    factor: Int[Array, " matrices"]
    seen: Int[Array, " matrices"]
    recent: Float[Array, "matrices window"]
