"""What each leaf of an optimizer's state is, read from its traced `init` and `update`.

The one answer for everything that treats leaves differently: moments that are carried over to a new
basis (`projection.moments`), and the codes that leaves are quantized with (`quantization.state`).
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from galore_optax.trace.averages import WHOLE, Share, Shares
from galore_optax.trace.coordinates import (
    EITHER,
    EVEN,
    NEITHER,
    ODD,
    SIGNED,
    Coordinates,
    CoordinatesReading,
)
from galore_optax.trace.divisors import Divisors, Made
from galore_optax.trace.interpreter import interpret
from galore_optax.trace.sign import UNKNOWN, Sign
from galore_optax.trace.traced import Traced

FIRST, SECOND, FACTOR, OTHER = "first", "second", "factor", "other"


@dataclasses.dataclass(frozen=True)
class Role:
    """What one leaf of a state is.

    Attributes:
        kind: FIRST, a first moment: it changes its sign with the gradient's coordinates. SECOND, a
            second moment: it does not. FACTOR: a second moment that lacks some of the gradient's
            axes (Adafactor, SM3). OTHER: anything else, such as a count.
        param: The index of the param that it belongs to; None if it belongs to none or to several.
        axes: For each of its axes the param's axis that it runs along; None for another one.
        nonnegative: Whether it is shown to be never negative.
        divisor: Whether the update may divide by it.
        stale: Whether it divides by it as it was before the step, without the step's gradient.
        rooted: Whether the update takes a root of its difference from another leaf.
        root: Whether the update takes a root of it, as of a square; AdaMax's is a magnitude.
        average: Whether it may be an average of gradients: no sum of them, nor of quotients.
        unclear: Whether it is not known how its elements follow a param's coordinates.
        shared: Whether it merges coordinates of several params.
    """

    kind: str = OTHER
    param: int | None = dataclasses.field(default=None, compare=False)
    axes: tuple[int | None, ...] = ()
    nonnegative: bool = False
    divisor: bool = True
    stale: bool = False
    rooted: bool = False
    root: bool = False
    average: bool = True
    unclear: bool = False
    shared: bool = False


def state_roles(traced: Traced, moving: Collection[tuple[int, int]] | None = None) -> list[Role]:
    """The role of each leaf of a state, in the order of `jax.tree.leaves`.

    Without a traced update every leaf is OTHER, and a divisor. `moving` are the params, by index,
    and their axes whose coordinates change with a basis; None for all axes of all params.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax.trace.roles import state_roles
        >>> from galore_optax.trace.traced import trace
        >>> params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
        >>> roles = state_roles(trace(optax.scale_by_adam(), params))
        >>> [(role.kind, role.nonnegative) for role in roles]  # of count, mu, nu
        [('other', True), ('first', False), ('second', True)]
    """
    leaves, states = traced.params, traced.states
    if traced.update is None:
        return [Role(axes=(None,) * x.ndim) for x in states]
    if moving is None:
        moving = {(i, axis) for i, x in enumerate(leaves) for axis in range(x.ndim)}
    given = [
        Coordinates(
            axes=tuple((i, axis) for axis in range(x.ndim)),
            parity=ODD if any((i, axis) in moving for axis in range(x.ndim)) else EVEN,
            leaves=frozenset([i]),
        )
        for i, x in enumerate(leaves)
    ]
    reading = CoordinatesReading(frozenset(moving))
    constants = [Coordinates((None,) * x.ndim, EVEN if x.ndim == 0 else EITHER) for x in states]
    begun = interpret(traced.init, given, reading) if traced.same else constants
    # A constant that a moment starts from (Yogi: 1e-6) says nothing of how it goes on, unless
    # nothing else does (Rprop's step sizes).
    start = [v if v.leaves else c for v, c in zip(begun, constants, strict=True)]
    found = traced.settled(reading, given, start, given)
    triples = zip(found, begun, start, strict=True)
    start = [v if f.parity == EITHER and v.parity == EVEN else s for f, v, s in triples]
    found = traced.settled(reading, given, start, given)

    signs, unknown = [UNKNOWN] * len(states), [UNKNOWN] * len(leaves)
    if traced.same:
        start = interpret(traced.init, unknown, Sign())
        signs = traced.settled(Sign(), unknown, start, unknown)

    jaxpr = traced.update.jaxpr
    before, after = jaxpr.invars[len(leaves) :], jaxpr.outvars[len(leaves) :]
    unchanged = [a is b for a, b in zip(before, after, strict=False)]
    divisors = Divisors()
    made_of = [Made(frozenset([i])) for i in range(len(states))]
    incoming, constant = [Made(fresh=True)] * len(leaves), [Made()] * len(leaves)
    traced.read(divisors, incoming, made_of, constant)
    own = [Share(state=x.ndim > 0) for x in states]
    reading, given = Shares(), ([Share(WHOLE)] * len(leaves), own, [Share()] * len(leaves))
    traced.read(reading, *given)
    _, shares = traced.read(reading, *given)
    return [
        dataclasses.replace(
            _role(value, x, [y.ndim for y in leaves], frozenset(moving), unchanged[i]),
            nonnegative=signs[i] != UNKNOWN,
            divisor=i in divisors.divisors,
            stale=i in divisors.stale,
            rooted=i in divisors.rooted,
            root=i in divisors.roots,
            average=shares[i].is_average,
        )
        for i, (value, x) in enumerate(zip(found, states, strict=True))
    ]


def _role(
    value: Coordinates, leaf: Any, ndims: list[int], moving: frozenset[Any], unchanged: bool
) -> Role:
    """The kind, the param and the axes of a leaf."""
    param = next(iter(value.leaves)) if len(value.leaves) == 1 else None
    mixed = any(axis is not None and not _is_one(axis) for axis in value.axes)
    known: list[Any] = [axis for axis in value.axes if _is_one(axis)]
    ones: list[Any] = [axis if _is_one(axis) else (None, None) for axis in value.axes]
    axes = tuple(axis for _, axis in ones)
    follows = any(axis in moving for axis in known)
    of_moving = any(i in value.leaves for i, _ in moving)
    floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
    if not floating or not leaf.ndim or not of_moving or param is None:
        # Elements that differ, though along no axis of a param (Sophia's, from random directions).
        unknown = not (known or unchanged) and max(leaf.shape, default=1) > 1
        unclear = floating and leaf.ndim > 0 and (mixed if of_moving else bool(moving) and unknown)
        # Signs, counts or codes of an inner's own: no product with Q is an integer.
        unclear |= not floating and of_moving and (follows or mixed)
        shared = unclear and len(value.leaves) > 1
        return Role(param=param, axes=axes, unclear=unclear and not shared, shared=shared)
    repeated = len({*known}) < len(known)
    if mixed or value.parity in (SIGNED, NEITHER) or repeated:
        return Role(param=param, axes=axes, unclear=follows or mixed)
    if not follows:
        return Role(param=param, axes=axes)
    if value.parity == ODD:
        return Role(FIRST, param, axes)
    return Role(SECOND if len(known) == ndims[param] else FACTOR, param, axes)


def _is_one(axis: Any) -> bool:
    """Whether it is one axis of a param, rather than several merged ones, or none."""
    return isinstance(axis, tuple) and len(axis) == 2 and isinstance(axis[0], int)
