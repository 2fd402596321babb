"""The updates of stacked layers; one is written while the gradient of the next one is computed."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from galore_optax.layerwise.backward import at
from galore_optax.layerwise.parts import PartUpdate
from galore_optax.ordering import once_if
from galore_optax.quantization.array import dequantized
from galore_optax.transformation import refreshes, subspace_parts


class _Layer(NamedTuple):
    """A layer that is to be written."""

    params: Any
    updates: Any  # to be applied when it is written, if `ok`; None if they are applied already
    state: list[Any]  # the leaves that an update changes
    ok: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Layers:
    """The updates of stacked layers."""

    update: PartUpdate
    key: str  # of the layers among the params
    count: int
    projected: bool  # whether gradients are projected already
    changes: list[bool]  # for each leaf of a layer's state whether an update changes it

    def as_it_is(self, own: Any, state: Any) -> _Layer:
        """A layer without an update."""
        updates = jax.tree.map(jnp.zeros_like, own) if self._late(own) else None
        return _Layer(own, updates, self._changing(state), jnp.array(False))

    def updated(self, own: Any, state: Any, gradient: Any, i: Array, ok: Array) -> _Layer:
        """A layer after its update, if `ok`."""
        of, small = self._of(i), gradient if self.projected else None
        if small is None and refreshes(self.update.tx):
            # Not in the loop below, which keeps the gradients of all matrices until its end: here
            # one is freed after its refresh (7B's recipe for 10 GB takes 0.2 GB less).
            small, state = self.update.projected({self.key: own}, state, gradient, ok, **of)

        def update(params: Any, whole: Any, changing: list[Any]) -> tuple[Any, list[Any]]:
            before = {self.key: params}, self._whole(state, changing), whole
            how = {"projected": small, "factored": not self._late(own)}
            updates, after = self.update.updates(*before, **how, **of)
            return updates, self._changing(after)

        def late(memory: Any, changing: list[Any]) -> tuple[Any, list[Any]]:
            # `memory` is the gradient, which updates overwrite. If the loop read it from outside,
            # XLA would copy it (26 GB for 7B).
            updates, changing = update(own, memory, changing)
            return jax.tree.map(lambda u, g: u.astype(g.dtype), updates, memory), changing

        def at_once(params: Any, changing: list[Any]) -> tuple[Any, list[Any]]:
            updates, changing = update(params, None if self.projected else gradient, changing)
            return self.update.applied({self.key: params}, updates, i)[self.key], changing

        if self._late(own):
            updates, changing = once_if(ok, late, gradient, self._changing(state))
            return _Layer(own, updates[self.key], changing, ok)
        params, changing = once_if(ok, at_once, own, self._changing(state))
        return _Layer(params, None, changing, ok)

    def written(self, stacks: Any, i: Array | int, one: _Layer) -> Any:
        """The stacks with layer `i` replaced."""

        def put(x: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)

        params, states = stacks
        new = one.params
        if one.updates is not None:
            new = self.update.applied({self.key: new}, {self.key: one.updates}, i)[self.key]
            new = jax.tree.map(partial(jnp.where, one.ok), new, one.params)
        changing = map(put, self._changing(states), one.state)
        return jax.tree.map(put, params, new), self._whole(states, list(changing))

    def _late(self, own: Any) -> bool:
        """Whether updates are applied where a layer is written.

        Rounding bfloat16 at random is then one pass of a GPU with the writing. What else is added
        to weights is part of the product that projects an update back, or of a kernel.
        """
        return not self.projected and all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(own))

    def _changing(self, state: Any) -> list[Any]:
        leaves = zip(jax.tree.leaves(state), self.changes, strict=True)
        return [x for x, changes in leaves if changes]

    def _whole(self, state: Any, changing: list[Any]) -> Any:
        """A state with other leaves where an update changes it."""
        leaves, tree = jax.tree.flatten(state)
        new = iter(changing)
        pairs = zip(leaves, self.changes, strict=True)
        return tree.unflatten([next(new) if changes else x for x, changes in pairs])

    def summed(self, own: Any, state: Any, i: Array, pull: Callable, *batches: Any) -> Any:
        """The sum of microbatches' projected gradients, see `PartUpdate.summed`."""
        return self.update.summed({self.key: own}, state, self._of(i), pull, *batches)

    def _of(self, i: Array) -> dict[str, Any]:
        return {"layer": i, "layers": self.count}


def changing_leaves(update: PartUpdate, stacks: Any, key: str, layers: int) -> list[bool]:
    """For each leaf of a layer's state whether an update changes it."""
    found = [True] * len(jax.tree.leaves(stacks[1]))
    if subspace_parts(update.tx) is None or refreshes(update.tx):
        return found

    def traced(stacks: Any, i: Array) -> None:
        own, state = at(stacks, i)
        gradient = {key: dequantized(own)}
        _, new = update.updates({key: own}, state, gradient, layer=i, layers=layers)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
        found[:] = [old is not new for old, new in pairs]

    jax.eval_shape(traced, stacks, jnp.int32(0))
    return found
