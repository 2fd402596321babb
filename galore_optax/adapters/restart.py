"""Merging adapters and beginning anew, again and again: a sum of low-rank updates is of high rank.

ReLoRA (arXiv:2307.05695, section 3): every some thousand steps the adapter is merged into its
weight, its factors are made anew, and most of their moments are dropped, which belong to the old
factors. The learning rate then rises from near zero again, which is the schedule's affair.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from galore_optax.adapters import base as adapter
from galore_optax.quantization.array import dequantized, is_quantized, stored_like
from galore_optax.stages import GaLoreState


def restart(
    tx: optax.GradientTransformation,
    params: PyTree,
    state: optax.OptState,
    key: PRNGKeyArray,
    *,
    keep: float = 0.0,
) -> tuple[PyTree, optax.OptState]:
    """Params with every adapter merged and begun anew, and the optimizer's state for them.

    The model's outputs stay as they are. Of the factors' moments only the largest stay; those of
    everything else, magnitudes too, and the count of steps are left alone. GaLore keeps its bases
    until the new factors have gradients, and then refreshes them all.

    Args:
        tx: The optimizer, of the trained params (`galore_optax.adapters.base.split`).
        params: Trained and frozen params in one tree.
        state: The optimizer's state.
        key: Of the new factors.
        keep: The share of each moment's entries, those of largest magnitude, that is kept. ReLoRA
            keeps 0.01.

    Raises:
        ValueError: If `keep` is no share.

    References:
        Lialin et al., `ReLoRA <https://arxiv.org/abs/2307.05695>`_, 2023, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax.adapters.base import split
        >>> from galore_optax.adapters.restart import restart
        >>> from galore_optax.adapters.gradnorm_lorp import GradNormLoRP
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> params = {"w": GradNormLoRP.create(w, jax.random.key(1), rank=8)}
        >>> tx = optax.adamw(0.01)
        >>> state = tx.init(split(params)[0])
        >>> params, state = restart(tx, params, state, jax.random.key(2))
    """
    if not 0 <= keep < 1:
        raise ValueError(f"keep={keep}: a share of the moments, from 0 to below 1, is needed")
    trained, _ = adapter.split(params)
    return adapter.restart(params, key), _pruned(tx, state, trained, keep)


def _pruned(
    tx: optax.GradientTransformation, state: optax.OptState, trained: PyTree, keep: float
) -> optax.OptState:
    factors = {path for path, yes in jax.tree.leaves_with_path(adapter.factors(trained)) if yes}

    def belongs(like_params: Any) -> Any:
        # By the path's beginning: in GaLore's inner state each matrix of a stack is its own leaf.
        return jax.tree.map_with_path(
            lambda path, _: any(path[:n] in factors for n in range(len(path) + 1)), like_params
        )

    marks = optax.tree_utils.tree_map_params(
        tx.init, belongs, state, transform_non_params=lambda _: False, is_leaf=lambda _: True
    )

    def part(old: Any, marks: Any) -> Any:
        if isinstance(old, GaLoreState):
            # The bases are no moments.
            return old._replace(
                next_refresh=jnp.full_like(old.next_refresh, old.count),
                inner=jax.tree.map(part, old.inner, marks.inner, is_leaf=_is_part),
            )
        if not all(jax.tree.leaves(marks)):
            return old
        return stored_like(_largest(dequantized(old), keep), old)

    return jax.tree.map(part, state, marks, is_leaf=_is_part)


def _is_part(x: Any) -> bool:
    return isinstance(x, GaLoreState) or is_quantized(x)


def _largest(moment: Array, keep: float) -> Array:
    """A moment, or each matrix of a stack of them, with all but its largest entries at zero."""
    if keep == 0:
        return jnp.zeros_like(moment)
    size = jnp.abs(moment).astype(jnp.float32)
    axes = tuple(range(-min(2, moment.ndim), 0))
    least = jnp.quantile(size, 1 - keep, axis=axes, keepdims=True)
    return jnp.where(size > least, moment, 0)
