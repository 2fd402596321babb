"""An optimizer's `init` and `update` as equations: what every question about it is read from."""

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr
from jax.sharding import ManualAxisType
from jax.typing import DTypeLike

from galore_optax.trace.interpreter import Reading, Value, interpret

_AS_FLOATS: ContextVar[bool] = ContextVar("as_floats", default=False)
"""Whether `quantize_state`'s `init` leaves out the codes, which it traces an update to find."""


def as_floats_asked() -> bool:
    """Whether `float_state` calls; a context variable in a user's function cannot be pickled."""
    return _AS_FLOATS.get()


def float_state(
    inner: optax.GradientTransformation, params: optax.Params, make: Any = jax.eval_shape
) -> Any:
    """The shapes of the state that `init` makes, with floats for `QuantizedArray`s."""
    token = _AS_FLOATS.set(True)
    try:
        # A function of its own, since the other state may be traced already.
        return make(lambda params: inner.init(params), params)
    finally:
        _AS_FLOATS.reset(token)


class Traced(NamedTuple):
    """A transformation's functions, traced.

    Attributes:
        params: Shapes and dtypes of the leaves of the params.
        states: Those of the leaves of the state.
        init: From the leaves of the params to those of the state as `init` makes it.
        same: Whether these are the leaves of `states`, which has floats for `QuantizedArray`s.
        update: From the leaves of updates, state and params to those of the new updates and the new
            state; None if the update needs extra arguments that are not known.
        function: The same, not traced.
        failure: What it raised when it was traced.
    """

    params: list[jax.ShapeDtypeStruct]
    states: list[jax.ShapeDtypeStruct]
    init: ClosedJaxpr
    same: bool
    update: ClosedJaxpr | None
    function: Callable[..., list[Any]]
    failure: Exception | None = None

    def read(
        self, reading: Reading, updates: Sequence[Value], state: Sequence[Value], params: Any
    ) -> tuple[list[Value], list[Value]]:
        """The abstract values of the new updates and the new state."""
        assert self.update is not None
        made = interpret(self.update, [*updates, *state, *params], reading)
        return made[: len(self.params)], made[len(self.params) :]

    def settled(
        self, reading: Reading, updates: Sequence[Value], state: Sequence[Value], params: Any
    ) -> list[Value]:
        """The abstract values of the state that hold before and after any number of updates."""
        state = list(state)
        while True:
            _, after = self.read(reading, updates, state, params)
            new = [reading.join(pair) for pair in zip(state, after, strict=True)]
            if new == state:
                return state
            state = new


def trace(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    state: optax.OptState | None = None,
    **extra_args: Any,
) -> Traced:
    """Traces a transformation once, without using values of params and state.

    The state is by default what `init` makes. The update's usual extra arguments (`value`, `grad`,
    `value_fn`, `obj_fn`, `grad_fn`) are made up if it fails without them.
    """
    # Without shardings, which some updates cannot be traced with, and which change nothing here.
    params = _without_shardings(params)
    init, made = float_state(
        inner, params, lambda init, params: jax.make_jaxpr(init, return_shape=True)(params)
    )
    state = made if state is None else _without_shardings(state)
    leaves, tree = jax.tree.flatten(params)
    states, state_tree = jax.tree.flatten(state)
    same = state_tree == jax.tree.structure(made)
    trees: list[Any] = []

    def update(made_up: bool, *inputs: Any) -> list[Any]:
        n, m = len(leaves), len(leaves) + len(states)
        updates, params = tree.unflatten(inputs[:n]), tree.unflatten(inputs[m:])
        usual = _usual_arguments(inner.update, updates) if made_up else {}
        updates, state = inner.update(
            updates, state_tree.unflatten(inputs[n:m]), params, **{**usual, **extra_args}
        )
        trees.append(jax.tree.structure(state))
        return jax.tree.leaves((updates, state))

    # As it is called first: an argument that is optional may change what is done.
    function = partial(update, False)
    try:
        traced = jax.make_jaxpr(function)(*leaves, *states, *leaves)
    except Exception:  # a missing argument may fail in any manner
        function = partial(update, True)
        try:
            traced = jax.make_jaxpr(function)(*leaves, *states, *leaves)
        except Exception as error:
            return Traced(leaves, states, init, same, None, function, error)
    if trees[-1].num_leaves != state_tree.num_leaves:
        if not same:
            raise ValueError(
                f"state: its {state_tree.num_leaves} arrays of inner are not those that init makes "
                "for these params; give the state that init made with this inner"
            )
        raise ValueError(
            f"inner: its update changes the tree of its state from {state_tree} to {trees[-1]}, as "
            "the first one of optax.monitor does; put the part that does so outside, in "
            "optax.chain(optax.monitor(...), galore(...))"
        )
    return Traced(leaves, states, init, same, traced, function)


def _without_shardings(tree: Any) -> Any:
    """The shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda x: abstract(jnp.shape(x), jnp.result_type(x)), tree)


def abstract(shape: Sequence[int], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array that is the same on all devices of a `jax.shard_map`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType())


def _usual_arguments(update: Callable[..., Any], updates: optax.Updates) -> dict[str, Any]:
    # The curvature is constant, since a Hessian's diagonal (Sophia) is not a remembered value of
    # the params; values are negative, as a loss may be. Line searches refuse arguments that their
    # value_fn does not name.
    def value_fn(params: optax.Params, obj_fn: Any = None, grad_fn: Any = None) -> Any:
        return -sum(jnp.sum(x * x).real for x in jax.tree.leaves(params))

    arguments = {
        "value": np.float32(-1),
        "grad": updates,
        "value_fn": value_fn,
        "obj_fn": value_fn,
        "grad_fn": lambda *_: updates,
    }
    taken = inspect.signature(update).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return arguments
    names = {p.name for p in taken}
    return {name: value for name, value in arguments.items() if name in names}
