"""A function of one matrix and its state, for every matrix of a leaf."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from galore_optax.projection.dimension_numbers import LeafView
from galore_optax.sharding import axis_specs, specs, with_automatic_axes

State = Any  # of one matrix: a tree of arrays


def turned(view: LeafView, mode: int) -> LeafView:
    """The view of a leaf's matrices with one of their axes first."""
    return view if mode == 0 else dataclasses.replace(view, modes=view.modes[::-1])


def first_state(
    init: Callable[[jax.ShapeDtypeStruct], State], view: LeafView, leaf: Float[Array, "*shape"]
) -> State:
    """The state of each matrix of a leaf, with the axes of the stack first.

    `init` makes the state of one matrix from its shape and a dtype, float32 or wider. An axis that
    is as long as a side of the matrix is sharded as that side is.
    """
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    like = jax.ShapeDtypeStruct(view.sizes, wide)
    state = jax.eval_shape(lambda: init(like))

    def make(leaf: Array) -> State:
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (*view.batch_shape, *x.shape)), init(like)
        )

    def out(mesh: Mesh | AbstractMesh) -> State:
        split_by = axis_specs(leaf)
        batch = [split_by[axis] for axis in view.batch_axes]
        sides = {
            size: sum((split_by[axis] for axis in axes), ())
            for size, axes in zip(view.sizes, view.modes, strict=True)
        }

        def spec(x: Any) -> PartitionSpec:
            own = [sides.get(size, ()) for size in x.shape]
            # Of two axes as long as one side, such as those of a square, the first is split.
            own = [() if names in own[:i] else names for i, names in enumerate(own)]
            ways = [math.prod(mesh.shape[name] for name in names) for names in own]
            pairs = zip(own, x.shape, ways, strict=True)
            return PartitionSpec(*batch, *(names if n % k == 0 else None for names, n, k in pairs))

        return jax.tree.map(spec, state)

    return with_automatic_axes(make, out, leaf)


def each_matrix(
    function: Callable[..., tuple[Array, State]],
    view: LeafView,
    leaf: Float[Array, "*shape"],
    state: State,
    beside: Any = (),
    common: Any = (),
    stacked: Callable[[Any], Any] = lambda beside: beside,
) -> tuple[Float[Array, "*shape"], State]:
    """Applies a function to each matrix, its state, its part of `beside`, and `common`.

    `stacked` turns `beside` into arrays with the axes of the stack first, as states have them.
    Returns the results, as a leaf that is sharded as the given one, and the new states.
    """

    def whole(leaf: Array, state: State, beside: Any, common: Any) -> tuple[Array, State]:
        def each(matrix: Array, state: State, beside: Any) -> tuple[Array, State]:
            return function(matrix, state, beside, common)

        one: Any = each
        for _ in view.batch_axes:
            one = jax.vmap(one)
        made, state = one(view.to_stack(leaf), state, stacked(beside))
        return view.from_stack(made), state

    given = leaf, state, beside, common
    return with_automatic_axes(whole, lambda _: (specs(leaf), specs(state)), *given)
