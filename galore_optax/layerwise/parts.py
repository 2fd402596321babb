"""Updates of single parts of the params: the transformation sees all other parts masked out."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jaxtyping import Array, Bool, Float, Int

from galore_optax.layerwise.backward import Params, at
from galore_optax.layerwise.microbatches import over_microbatches_in_subspace
from galore_optax.ordering import once_if
from galore_optax.quantization.array import dequantized
from galore_optax.sharding import sum_of_all
from galore_optax.transformation import observed, subspace_parts


def masked(params: Params) -> Params:
    """The params as `optax.masked` shows them if every leaf is masked out."""
    return jax.tree.map(lambda _: optax.MaskedNode(), jax.eval_shape(dequantized, params))


def of_one_layer(params: Params, key: str) -> Params:
    """The shapes of the params with one layer instead of the stack of them."""
    return jax.eval_shape(lambda p: dequantized({**p, key: at(p[key], 0)}), params)


def matrices_of(
    tx: optax.GradientTransformation, params: Params, key: str, layers: int
) -> list[dict[str, int]]:
    """How many matrices each `galore` in `tx` projects of each leaf, by path, in all layers."""
    found: list[dict[str, int]] = []

    def observe(inner: Any, params: Any) -> None:
        own = [(plan.path, plan.matrices) for plan in inner.plans if plan is not None]
        stack = jax.tree_util.keystr((jax.tree_util.DictKey(key),))
        found.append({p: n * layers if p.startswith(stack) else n for p, n in own})

    with observed(observe), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.eval_shape(lambda p: tx.init(p), of_one_layer(params, key))
    return found


@dataclasses.dataclass(frozen=True)
class PartUpdate:
    """What the updates of all parts in one step have in common."""

    tx: optax.GradientTransformation
    apply: Callable[..., Any]  # `Layerwise.apply_updates`
    factored: bool  # `Layerwise.factored`
    others: Params  # all params, masked out
    count: Int[Array, ""]  # steps done so far
    loss: Float[Array, ""]  # given to the transformation as `value`
    matrices: Sequence[dict[str, int]]  # as `matrices_of`
    sum_over: tuple[str, ...] = ()  # mesh axes along which devices have summands of the gradients

    def updates(
        self,
        part: Params,
        state: Any,
        gradient: Params | None,
        *,
        projected: Any = None,
        factored: bool = False,
        **layer: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        """Returns the updates of a part of the params, and its new state.

        They are made from the gradient, or from a `projected` one where that is given; the gradient
        is then None if it is not known. They may be `factored` where `applied` takes them. With
        `layer`, an index, and `layers`, their number, `galore` draws as for the whole stack.
        """
        parts: Any = subspace_parts(self.tx)
        if factored and self.factored and parts is not None:
            layer["factored"] = True
        tx: Any = optax.with_extra_args_support(self.tx)
        layer = {"value": self.loss, "matrices": self.matrices, **layer}
        params = {**self.others, **dequantized(part)}
        whole = None if gradient is None else {**self.others, **gradient}
        if projected is None:
            updates, state = tx.update(whole, state, params, **layer)
        else:
            small = {**self.others, **projected}
            updates, state = parts.update_projected(small, state, params, gradient=whole, **layer)
        return {k: updates[k] for k in part}, state

    def projected(
        self, part: Params, state: Any, gradient: Params, ok: Bool[Array, ""], **layer: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        """Returns a part's projected gradient, in a subspace that is refreshed if due and `ok`."""
        parts: Any = subspace_parts(self.tx)
        gradients, params = {**self.others, **gradient}, {**self.others, **dequantized(part)}
        layer = {"value": self.loss, "matrices": self.matrices, **layer}
        state = parts.refresh(gradients, state, params, allowed=ok, **layer)
        return parts.project(gradients, state), state

    def applied(self, part: Params, updates: optax.Updates, layer: Any = None) -> Params:
        """Returns a part of the params, of the layer with that index, after its update."""
        return self.apply(part, updates, self.count, layer)

    def shared(
        self, parts: Params, states: dict[str, Any], gradients: Params, ok: Bool[Array, ""]
    ) -> tuple[Params, dict[str, optax.OptState]]:
        """Projects each entry's gradient, and sums that over the devices; see `projected`."""
        small, new = {}, {}
        for k, gradient in gradients.items():
            own, new[k] = self.projected({k: parts[k]}, states[k], {k: gradient}, ok)
            small[k] = own[k]  # pyrefly: ignore[bad-index]
        return sum_of_all(small, self.sum_over), new

    def each(
        self, parts: Params, states: dict[str, Any], gradients: Params, ok: Bool[Array, ""]
    ) -> tuple[Params, dict[str, optax.OptState]]:
        """Updates each entry of `parts` that has a gradient, by itself, if `ok`.

        With `sum_over` the gradients are projected and summed: what `shared` returns.
        """
        new, new_states = {}, {}

        for k, gradient in gradients.items():

            def update(part: Params, state: Any, gradient: Any = {k: gradient}) -> tuple[Any, Any]:  # noqa: B006
                whole, small = (None, gradient) if self.sum_over else (gradient, None)
                updates, state = self.updates(part, state, whole, projected=small, factored=True)
                return self.applied(part, updates), state

            part, new_states[k] = once_if(ok, update, {k: parts[k]}, states[k])
            new |= part
        return new, new_states

    def summed(
        self, part: Params, state: Any, layer: dict[str, Any], pull: Callable, *batches: Any
    ) -> tuple[Params, optax.OptState, Any]:
        """As `over_microbatches_in_subspace`, with a function `pull` to a layer's own gradient."""

        def whole(*batch: Any) -> tuple[Params, Any]:
            gradient, kept = pull(*batch)
            return {**self.others, **gradient}, kept

        params = {**self.others, **dequantized(part)}
        parts: Any = subspace_parts(self.tx)
        layer = {"matrices": self.matrices, **layer}
        total, state, kept = over_microbatches_in_subspace(
            parts, state, params, whole, *batches, **layer
        )
        return {k: total[k] for k in part}, state, kept  # pyrefly: ignore[bad-index]
