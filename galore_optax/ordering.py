"""Ways to make XLA wait: values that it cannot compute, fold or share earlier than wanted.

`jax.lax.optimization_barrier` does not do it: XLA's CPU compiler removes it before scheduling
(jaxlib 0.10), and the arrays behind one must all exist at once. So a zero is added that depends on
another array, and that the compiler cannot prove to be zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from galore_optax.sharding import explicit_axes, varying_alike


def after(known: PyTree, tree: PyTree) -> PyTree:
    """Returns a tree of equal arrays that XLA cannot compute before those of `known`.

    Arrays of `known` with explicit mesh axes cannot be indexed here; they delay nothing.
    """
    firsts = [x[(0,) * x.ndim] for x in jax.tree.leaves(known) if x.size and not explicit_axes(x)]
    if not firsts:
        return tree
    sizes = jnp.array([jnp.abs(x.astype(jnp.float32)) for x in firsts])
    # Always zero, but XLA does not fold x * 0, which NaN and infinity would not make zero.
    zero = jnp.sum(jnp.where(jnp.isfinite(sizes), sizes, 0.0) * 0.0)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def after_on_cpu(known: PyTree, tree: PyTree) -> PyTree:
    """As `after` on a CPU; elsewhere the tree itself, which may be fused with what uses `known`.

    A CPU makes large products side by side otherwise, each on a part of its cores: 1.4 times as
    long for llama-60m's matrices (benchmarks/RESULTS.md). A GPU moved a quarter more bytes with it
    (compiled for an H100: 22.4 GB instead of 18.0 for a 1B model's).
    """
    if any(map(explicit_axes, jax.tree.leaves((known, tree)))):
        return tree
    known, tree = varying_alike((known, tree))
    return jax.lax.platform_dependent(known, tree, cpu=after, default=lambda known, tree: tree)


def codes_after(known: PyTree, tree: PyTree) -> PyTree:
    """As `after`, for the codes of the `QuantizedArray`s in a tree; other arrays stay as they are.

    A backward pass that needs dequantized weights dequantizes them again then. Otherwise XLA finds
    that the forward pass has done the same, and keeps the floats in between.
    """
    return jax.tree.map(lambda x: after(known, x) if x.dtype == jnp.uint8 else x, tree)


def once_if(ok: Bool[Array, ""], function: Callable[..., Any], *old: Any) -> Any:
    """Returns `function(*old)`, trees like `old`, if `ok`, and otherwise `old`.

    A loop of one turn or none, which overwrites in place. A selection would read and write all of
    the old and the new, and a conditional would copy the old, or make copies before the step.
    """
    return jax.lax.fori_loop(0, ok.astype(jnp.int32), lambda _, own: function(*own), old)


def kept_in_place(tree: PyTree) -> PyTree:
    """Returns equal arrays, of which XLA believes on a GPU that they were overwritten in place.

    For a conditional's branch that returns what it was given. XLA's GPU compiler would copy that to
    other memory (the bases and moments of a 1B model, 2 GB, at every step without a refresh); an
    update in place of one element makes it use the arguments' memory for the results. Its CPU
    compiler copies nothing of itself, and everything with such an update (a tenth of the step).
    """

    def overwritten(x: Array) -> Array:
        if not x.size:
            return x
        start = (0,) * x.ndim
        first = jax.lax.slice(x, start, (1,) * x.ndim)
        zero = jax.lax.optimization_barrier(jnp.zeros((), x.dtype))
        return jax.lax.dynamic_update_slice(x, first + zero, start)

    if any(map(explicit_axes, jax.tree.leaves(tree))):
        return tree
    return jax.lax.platform_dependent(
        tree, cpu=lambda tree: tree, default=lambda tree: jax.tree.map(overwritten, tree)
    )


def opaque(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the same numbers, whose values XLA does not know while it compiles.

    It would quantize the zeros that most states start as at compile time, which took minutes for a
    large embedding. A barrier around the zeros themselves would put them all in memory as floats.
    """
    return x + jax.lax.optimization_barrier(jnp.zeros((), x.dtype))
