"""The gradients of repeated layers: forward as a whole, backward one piece at a time.

`galore_optax.layerwise.step` applies the update of each piece.

The forward pass keeps for each layer what its backward pass needs, or only the hidden states before
it (activation checkpointing, Chen et al., arXiv:1604.06174).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from galore_optax.layerwise.microbatches import over_microbatches
from galore_optax.ordering import codes_after
from galore_optax.quantization.weights import sources, with_sources
from galore_optax.trace.dependence import dependences

Params = dict[str, Any]
Batch = PyTree
Hidden = PyTree


class Layered(NamedTuple):
    """A model as three functions: before, within and after its repeated layers.

    For a `QuantizedArray` in the params, the functions get an object with its `shape`, `dtype` and
    `dequantize()`; the gradient is the one with respect to the dequantized array.

    Hidden states are a tree of float arrays, before and after each layer of the same shapes and
    dtypes. `embed` and `head`, which returns the loss, get all params except the layers.
    """

    embed: Callable[[Params, Batch], Hidden]
    layer: Callable[[PyTree, Hidden, Batch], Hidden]  # from one layer's params
    head: Callable[[Params, Hidden, Batch], Float[Array, ""]]
    layers: str = "layers"  # their key in the params, stacked along every leaf's first axis

    def split(self, params: Params) -> tuple[PyTree, Params, int]:
        """Returns the stacked layers, the other entries of the params, and the number of layers."""
        if not isinstance(params, dict) or self.layers not in params:
            raise ValueError(
                f"params: they have no entry {self.layers!r} (Layered's layers=); give a dict with "
                "the layers there, stacked along the first axis of every leaf"
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
    """The backward pass of a model over microbatches, in pieces to be run from last to first."""

    model: Layered
    weights: Params  # all entries except the layers
    batches: Batch  # with a first axis of microbatches
    checkpoint: bool
    # (layers, microbatches, ...): the hidden states before each layer or, without checkpointing,
    # its backward pass as `jax.vjp` returns it.
    kept: PyTree
    last: Hidden  # after the last layer
    in_head: frozenset[str]  # keys of the weights that the head uses
    in_embed: frozenset[str]

    @property
    def early(self) -> frozenset[str]:
        """Keys of the weights whose gradients are complete after the head's backward pass."""
        return self.in_head - self.in_embed

    def head(self, factor: ArrayLike = 1.0) -> tuple[Float[Array, ""], Params, Hidden]:
        """Returns the loss, and the gradients of what the head uses and of the hidden states.

        The gradients are those of the loss times the factor.
        """

        def pull(h: Hidden, b: Batch) -> tuple[tuple[Array, Params], Hidden]:
            own = {k: self.weights[k] for k in self.in_head}
            loss, back = _vjp(lambda w, h: self.model.head({**self.weights, **w}, h, b), own, h)
            gradient, cotangent = back(jnp.asarray(factor, loss.dtype))
            return (loss, gradient), cotangent

        (loss, gradient), cotangent = over_microbatches(pull, self.last, self.batches)
        return loss, gradient, cotangent

    def layer(
        self, own: PyTree, i: Array, cotangent: Hidden, over: Callable = over_microbatches
    ) -> Any:
        """Returns the gradients of layer `i`, with params `own`, and of the states before it."""
        key = self.model.layers

        def pull(kept: Any, b: Batch, c: Hidden) -> tuple[Params, Hidden]:
            if not self.checkpoint:
                return _put_back(kept, (own, b))(c)
            params = {key: _dequantized_for_each(self.batches, c, own)}
            return _vjp(lambda w, h: self.model.layer(w[key], h, b), params, kept)[1](c)

        return over(pull, at(self.kept, i), self.batches, cotangent)

    def embed(self, cotangent: Hidden, from_head: Params) -> Params:
        """Returns the gradients of all entries that are not early, the head's share included."""

        def pull(b: Batch, c: Hidden) -> tuple[Params, tuple[()]]:
            own = {k: self.weights[k] for k in self.in_embed}
            return _vjp(lambda w: self.model.embed({**self.weights, **w}, b), own)[1](c)[0], ()

        gradient, _ = over_microbatches(pull, self.batches, cotangent)
        whole = {}
        for k in self.weights.keys() - self.early:
            parts = [g[k] for g in (from_head, gradient) if k in g]
            parts = parts or [optax.tree.zeros_like(sources(self.weights[k]))]
            whole[k] = functools.reduce(optax.tree.add, parts)
        return whole

    def norm(self, stack: PyTree, *, summed: bool = True) -> Float[Array, ""]:
        """Returns the gradient's global norm, by a backward pass that keeps no gradient.

        Without `summed` it is the sum of the microbatches' norms, an upper bound.
        """
        _, from_head, cotangent = self.head()
        layers = jax.tree.leaves(stack)[0].shape[0]
        parts = 1 if summed else jax.tree.leaves(self.batches)[0].shape[0]

        def over(pull: Callable[..., Any], *batches: Any) -> tuple[Array, Hidden]:
            def squared(*batch: Any) -> tuple[tuple[()], Any]:
                gradient, cotangent = pull(*batch)
                return (), (squares(gradient), cotangent)

            if not summed:
                return over_microbatches(squared, *batches)[1]
            gradient, cotangent = over_microbatches(pull, *batches)
            return squares(gradient), cotangent

        def turn(turns: Array, carry: tuple[Hidden, Array]) -> tuple[Hidden, Array]:
            i = layers - 1 - turns
            own, cotangent = self.layer(at(stack, i), i, carry[0], over)
            return cotangent, carry[1] + own

        def share(gradient: Params) -> Array:
            return squares(gradient) / parts**2

        total = jnp.full(parts, share({k: from_head[k] for k in self.early}))
        cotangent, total = jax.lax.fori_loop(0, layers, turn, (cotangent, total))
        return jnp.sum(jnp.sqrt(total + share(self.embed(cotangent, from_head))))


def forward(model: Layered, params: Params, batches: Batch, *, checkpoint: bool) -> Backward:
    """Runs a model forward, and keeps what its backward pass needs."""
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
    return Backward(model, weights, batches, checkpoint, kept, last, in_head, in_embed)


def _dequantized_for_each(batches: Batch, hidden: Hidden, params: PyTree) -> PyTree:
    """Has XLA dequantize a layer for each microbatch, instead of keeping its floats for all."""
    several = jax.tree.leaves(batches)[0].shape[0] > 1
    return codes_after(jax.tree.leaves(hidden)[0], params) if several else params


def _vjp(function: Callable[..., Any], params: Params, *args: Any) -> tuple[Any, Any]:
    """`jax.vjp` with respect to params, which may have `QuantizedArray`s, and to other trees."""
    return jax.vjp(
        lambda s, *args: function(with_sources(params, s), *args), sources(params), *args
    )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _There:
    """Stands for an array that the backward pass has anyway: the leaf with that index."""

    leaf: int


def _leave_out(back: PyTree, there: PyTree) -> PyTree:
    """Replaces arrays in a backward pass, a tree of the arrays that it keeps, by `_There`."""
    numbers = {id(x): i for i, x in enumerate(jax.tree.leaves(there))}
    return jax.tree.map(lambda x: _There(numbers[id(x)]) if id(x) in numbers else x, back)


def _put_back(back: PyTree, there: PyTree) -> PyTree:
    def left_out(x: Any) -> bool:
        return isinstance(x, _There)

    leaves = jax.tree.leaves(there)
    return jax.tree.map(lambda x: leaves[x.leaf] if left_out(x) else x, back, is_leaf=left_out)


def at(stacks: PyTree, i: Int[Array, ""] | int) -> PyTree:
    """Returns layer `i` of stacked layers."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacks)


def squares(tree: PyTree) -> Float[Array, ""]:
    """Returns the sum of the squares of all elements, in float32."""
    leaves = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.add, leaves, jnp.zeros((), jnp.float32))


def _used(function: Callable[[Params], PyTree], params: Params) -> frozenset[str]:
    """Returns the entries of the params on which a function's result depends."""
    traced = jax.make_jaxpr(function)(params)
    keys = [path[0].key for path, _ in jax.tree.leaves_with_path(params)]  # pyrefly: ignore
    used = frozenset().union(*dependences(traced, keys))
    return frozenset(k for k in keys if k in used)
