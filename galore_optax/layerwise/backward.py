"""A model of repeated layers, run forward as a whole and backward one piece at a time.

Of a layer is kept what its backward pass needs, or, with activation checkpointing at the layers'
boundaries (Chen et al., arXiv:1604.06174), the hidden states before it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from galore_optax.layerwise.microbatches import over_microbatches
from galore_optax.ordering import codes_after
from galore_optax.quantization.weights import sources, with_sources
from galore_optax.trace.dependence import dependences

Params = dict[str, Any]
Batch = PyTree
Hidden = PyTree


class Layered(NamedTuple):
    """A model as what comes before, within and after its repeated layers.

    Attributes:
        embed: From all params but the layers' and a batch to the first hidden states, a tree of
            float arrays.
        layer: From one layer's params, hidden states and the batch to hidden states of the same
            shapes and dtypes.
        head: From all params but the layers', the last hidden states and the batch to the loss.
        layers: Under which key of the params the layers are, stacked along every leaf's first axis.

    Where a leaf of the params is a `QuantizedArray`, the functions get what has its `shape`,
    `dtype` and `dequantize()`, and the gradient is that with respect to the dequantized array.
    """

    embed: Callable[[Params, Batch], Hidden]
    layer: Callable[[PyTree, Hidden, Batch], Hidden]
    head: Callable[[Params, Hidden, Batch], Float[Array, ""]]
    layers: str = "layers"

    def split(self, params: Params) -> tuple[PyTree, Params, int]:
        """The stacked layers, the other entries of the params, and how many layers there are.

        Raises:
            ValueError: If there is no such stack.
        """
        if not isinstance(params, dict) or self.layers not in params:
            raise ValueError(
                f"params: they have no entry {self.layers!r} (Layered's layers=); give a dict that "
                "has the layers there, stacked along the first axis of every leaf"
            )
        rest = {k: part for k, part in params.items() if k != self.layers}
        stack = params[self.layers]
        shapes = [leaf.shape for leaf in jax.tree.leaves(stack)]
        if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
            raise ValueError(
                f"params[{self.layers!r}]: its leaves, of shapes {shapes}, have no common first "
                "axis; stack the layers along it"
            )
        return stack, rest, shapes[0][0]


@dataclasses.dataclass(frozen=True)
class Backward:
    """The backward pass of a model over microbatches, whose pieces are run from last to first.

    Attributes:
        model: The model.
        weights: All entries of the params but the layers.
        batches: Tree of arrays with a first axis of microbatches.
        checkpoint: Whether a layer is computed again in the backward pass.
        kept: Of each layer, `(layers, microbatches, ...)`, the hidden states before it or, without
            checkpointing, its backward pass as `jax.vjp` gives it.
        last: Hidden states after the last layer.
        early: Entries of the weights whose gradients are whole when the head's is known; the others
            are embedded with, or tied, or not used.
    """

    model: Layered
    weights: Params
    batches: Batch
    checkpoint: bool
    kept: PyTree
    last: Hidden
    early: frozenset[str]
    _in_head: frozenset[str]
    _in_embed: frozenset[str]

    def head(self) -> tuple[Float[Array, ""], Params, Hidden]:
        """The loss, the gradients of what the head uses, and the last hidden states'."""

        def pull(h: Hidden, b: Batch) -> tuple[tuple[Array, Params], Hidden]:
            own = {k: self.weights[k] for k in self._in_head}
            loss, back = _vjp(lambda w, h: self.model.head({**self.weights, **w}, h, b), own, h)
            gradient, cotangent = back(jnp.ones_like(loss))
            return (loss, gradient), cotangent

        (loss, gradient), cotangent = over_microbatches(pull, self.last, self.batches)
        return loss, gradient, cotangent

    def layer(
        self,
        own: PyTree,
        i: Int[Array, ""],
        cotangent: Hidden,
        over: Callable[..., Any] = over_microbatches,
    ) -> Any:
        """The gradient of layer `i`, of params `own`, as a part, and that of its hidden states.

        Or what `over` makes of the microbatches' in the place of `over_microbatches`.
        """
        key = self.model.layers

        def pull(kept: Any, b: Batch, c: Hidden) -> tuple[Params, Hidden]:
            if self.checkpoint:
                held = {key: _dequantized_for_each(self.batches, c, own)}
                back = _vjp(lambda w, h: self.model.layer(w[key], h, b), held, kept)[1]
            else:
                back = _put_back(kept, (own, b))
            return back(c)

        return over(pull, at(self.kept, i), self.batches, cotangent)

    def embed(self, cotangent: Hidden, from_head: Params) -> Params:
        """The gradients of all entries that are not early, the head's share of them included."""

        def pull(b: Batch, c: Hidden) -> tuple[Params, tuple[()]]:
            own = {k: self.weights[k] for k in self._in_embed}
            return _vjp(lambda w: self.model.embed({**self.weights, **w}, b), own)[1](c)[0], ()

        gradient, _ = over_microbatches(pull, self.batches, cotangent)

        def whole(k: str) -> PyTree:
            parts = [g[k] for g in (from_head, gradient) if k in g]
            return functools.reduce(
                optax.tree.add, parts or [optax.tree.zeros_like(sources(self.weights[k]))]
            )

        return {k: whole(k) for k in self.weights.keys() - self.early}

    def norm(self, stack: PyTree, *, summed: bool = True) -> Float[Array, ""]:
        """The gradient's global norm: a backward pass that forgets every gradient again.

        Args:
            stack: The stacked layers.
            summed: Whether microbatches' gradients of a layer are summed for it. Else it is taken
                for the sum of the microbatches' norms, which it is at most.
        """
        _, from_head, cotangent = self.head()
        layers = jax.tree.leaves(stack)[0].shape[0]
        parts = 1 if summed else jax.tree.leaves(self.batches)[0].shape[0]

        def of_each(pull: Callable[..., Any], *batches: Any) -> tuple[Array, Hidden]:
            def squared(*batch: Any) -> tuple[tuple[()], Any]:
                gradient, cotangent = pull(*batch)
                return (), (squares(gradient), cotangent)

            return over_microbatches(squared, *batches)[1]

        def of_sum(*args: Any) -> tuple[Array, Hidden]:
            gradient, cotangent = over_microbatches(*args)
            return squares(gradient), cotangent

        def turn(turns: Array, carry: tuple[Hidden, Array]) -> tuple[Hidden, Array]:
            i = layers - 1 - turns
            over = of_sum if summed else of_each
            own, cotangent = self.layer(at(stack, i), i, carry[0], over)
            return cotangent, carry[1] + own

        def share(gradient: Params) -> Array:
            return squares(gradient) / parts**2

        total = jnp.full(parts, share({k: from_head[k] for k in self.early}))
        cotangent, total = jax.lax.fori_loop(0, layers, turn, (cotangent, total))
        return jnp.sum(jnp.sqrt(total + share(self.embed(cotangent, from_head))))


def forward(
    model: Layered,
    params: Params,
    batches: Batch,
    *,
    checkpoint: bool,
) -> Backward:
    """Runs a model, and keeps what its backward pass needs.

    Args:
        model: The model.
        params: Its params.
        batches: Tree of arrays with a first axis of microbatches.
        checkpoint: Whether a layer is computed again in the backward pass.
    """
    stack, weights, _ = model.split(params)
    key = model.layers

    def one_layer(hidden: Hidden, own: PyTree) -> tuple[Hidden, PyTree]:
        def run(h: Hidden, b: Batch) -> tuple[tuple[()], tuple[Hidden, PyTree]]:
            if checkpoint:
                return (), (model.layer(_dequantized_for_each(batches, h, own), h, b), h)
            after, back = _vjp(lambda w, h: model.layer(w[key], h, b), {key: own}, h)
            return (), (after, _leave_out(back, (own, b)))

        return over_microbatches(run, hidden, batches)[1]

    _, first = over_microbatches(lambda b: ((), model.embed(weights, b)), batches)
    last, kept = jax.lax.scan(one_layer, first, stack)
    h, b = jax.tree.map(lambda x: x[0], (first, batches))
    in_embed = _used(lambda weights: model.embed(weights, b), weights)
    in_head = _used(lambda weights: model.head(weights, h, b), weights)
    return Backward(
        model, weights, batches, checkpoint, kept, last,
        in_head - in_embed, in_head, in_embed,
    )  # fmt: skip


def _dequantized_for_each(batches: Batch, hidden: Hidden, params: PyTree) -> PyTree:
    """Params whose `QuantizedArray`s are dequantized again for each of several microbatches.

    XLA would do it once, before the loop over them, and keep the floats of a whole layer.
    """
    several = jax.tree.leaves(batches)[0].shape[0] > 1
    return codes_after(jax.tree.leaves(hidden)[0], params) if several else params


def _vjp(function: Callable[..., Any], params: Params, *args: Any) -> tuple[Any, Any]:
    """`jax.vjp` with respect to params in which there are `QuantizedArray`s, and to other trees."""
    return jax.vjp(
        lambda s, *args: function(with_sources(params, s), *args), sources(params), *args
    )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _There:
    """In the place of an array that is at hand in the backward pass: the leaf of that number."""

    leaf: int


def _leave_out(back: PyTree, there: PyTree) -> PyTree:
    """A backward pass, which is a tree of the arrays it has kept, without those that are there."""
    numbers = {id(x): i for i, x in enumerate(jax.tree.leaves(there))}
    return jax.tree.map(lambda x: _There(numbers[id(x)]) if id(x) in numbers else x, back)


def _put_back(back: PyTree, there: PyTree) -> PyTree:
    leaves = jax.tree.leaves(there)
    return jax.tree.map(
        lambda x: leaves[x.leaf] if isinstance(x, _There) else x,
        back,
        is_leaf=lambda x: isinstance(x, _There),
    )


def at(stacks: PyTree, i: Int[Array, ""] | int) -> PyTree:
    """Layer `i` of stacked layers."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacks)


def written(stacks: PyTree, i: Int[Array, ""] | int, one: PyTree) -> PyTree:
    """Stacked layers with another layer `i`."""
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), stacks, one
    )


def squares(tree: PyTree) -> Float[Array, ""]:
    """Sum of the squares of all elements, in float32."""
    leaves = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.add, leaves, jnp.zeros((), jnp.float32))


def _used(function: Callable[[Params], PyTree], params: Params) -> frozenset[str]:
    """Which entries of the params a function's result depends on."""
    traced = jax.make_jaxpr(function)(params)
    keys = [path[0].key for path, _ in jax.tree.leaves_with_path(params)]  # pyrefly: ignore
    return frozenset().union(*dependences(traced, keys))
