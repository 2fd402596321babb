"""Restarts of adapters: a sum of low-rank updates of a weight has a high rank.

ReLoRA (arXiv:2307.05695, section 3) merges each adapter into its weight every few thousand steps,
draws new factors, and drops most of the old ones' moments. The schedule's learning rate then rises
from near zero again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from galore_optax import checks
from galore_optax.adapters.base import factors, is_adapter, split
from galore_optax.keys import for_path
from galore_optax.quantization.array import dequantized, is_quantized, stored_like
from galore_optax.stages import GaLoreState
from galore_optax.trace.params_use import remembers_params
from galore_optax.trace.traced import trace


def restart(
    tx: optax.GradientTransformation, params: PyTree, state: Any, key: Array, *, keep: float = 0.0
) -> tuple[PyTree, optax.OptState]:
    """Merges every adapter, draws new factors, and resets the factors' moments.

    The model's outputs and the other moments (the magnitudes' too) stay as they are. GaLore keeps
    its bases until the new factors have gradients, and then refreshes them all.

    The params are the trained and the frozen ones in one tree; tx and its state are for the trained
    part (`galore_optax.split`). `keep` is the share of each moment's entries, the largest, that is
    kept; ReLoRA keeps 0.01. A ValueError is raised if the state remembers values of the params
    (Prodigy, schedule-free), which are not those after a restart.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import GradNormLoRP, restart, split
        >>> params = {"w": GradNormLoRP.create(jnp.ones((64, 32)), jax.random.key(0), rank=8)}
        >>> tx = optax.adamw(0.01)
        >>> state = tx.init(split(params)[0])
        >>> params, state = restart(tx, params, state, jax.random.key(1))
    """
    keep = checks.number(keep, "keep", least=0, below=1, such_as=0.01)
    _check_that_no_params_are_remembered(tx, params, state)
    pruned = _prune(tx, state, split(params)[0], keep)
    return restart_params(params, key), pruned


def _check_that_no_params_are_remembered(
    tx: optax.GradientTransformation, params: PyTree, state: optax.OptState
) -> None:
    for only in (False, True):
        trained, _ = split(params, adapters_only=only)
        try:
            made = jax.tree.structure(jax.eval_shape(tx.init, trained))
        except Exception:  # the state is of other params, as below
            continue
        if made != jax.tree.structure(state):
            continue
        traced = trace(optax.with_extra_args_support(tx), trained)
        if remembers_params(traced, jax.tree.leaves(factors(trained))):
            raise ValueError(
                "tx: its state remembers the params, as that of Prodigy, schedule-free and L-BFGS "
                "does, and after a restart the factors are others; begin with tx.init(...) of the "
                "new params and galore_optax.restart(optax.identity(), params, (), key)"
            )
        return


def restart_params(params: PyTree, key: PRNGKeyArray) -> PyTree:
    """Merges every adapter and draws new factors; the key also rounds quantized weights."""

    def one(path: Any, x: Any) -> Any:
        return x.restarted(for_path(key, path)) if is_adapter(x) else x

    return jax.tree.map_with_path(one, params, is_leaf=is_adapter)


def _prune(
    tx: optax.GradientTransformation, state: optax.OptState, trained: PyTree, keep: float
) -> optax.OptState:
    """Returns the state without the factors' moments, and with every basis due for a refresh."""
    chosen = {path for path, yes in jax.tree.leaves_with_path(factors(trained)) if yes}

    def of_factors(like_params: Any) -> Any:
        # By the path's beginning: in GaLore's inner state each matrix of a stack is its own leaf.
        return jax.tree.map_with_path(
            lambda path, _: any(path[:n] in chosen for n in range(len(path) + 1)), like_params
        )

    marks = optax.tree_utils.tree_map_params(
        tx.init, of_factors, state, transform_non_params=lambda _: False, is_leaf=lambda _: True
    )

    def is_part(x: Any) -> bool:
        return isinstance(x, GaLoreState) or is_quantized(x)

    def part(old: Any, marks: Any) -> Any:
        if isinstance(old, GaLoreState):  # its bases are not moments
            return old._replace(
                next_refresh=jnp.full_like(old.next_refresh, old.count),
                inner=jax.tree.map(part, old.inner, marks.inner, is_leaf=is_part),
            )
        if not all(jax.tree.leaves(marks)):
            return old
        return stored_like(_largest(dequantized(old), keep), old)

    return jax.tree.map(part, state, marks, is_leaf=is_part)


def _largest(moment: Float[Array, "*layers n m"], keep: float) -> Float[Array, "*layers n m"]:
    """Returns each matrix with all but its largest entries set to zero."""
    if keep == 0:
        return jnp.zeros_like(moment)
    size = jnp.abs(moment).astype(jnp.float32)
    axes = tuple(range(-min(2, moment.ndim), 0))
    least = jnp.quantile(size, 1 - keep, axis=axes, keepdims=True)
    return jnp.where(size > least, moment, 0)
