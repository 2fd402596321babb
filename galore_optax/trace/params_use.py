"""How a transformation uses the params that it is given, read from its traced `init` and `update`.

Inside GaLore these are projected weights PᵀW. Three uses matter:

- *Decoupled weight decay*: an update that is affine in the params, with a slope that is one number
  for a whole leaf, and a state that never sees the params' values. It must reach all of W.
- *Remembered params* (L-BFGS, Prodigy): values of PᵀW in the state, in the basis of the step when
  they were stored. When the basis changes, PᵀW changes far more than by a step of training.
- Any other elementwise use acts within the subspace only, such as decay masked by the sign of the
  update. Two uses are harmless: regularization that is added to the gradient (it is projected like
  the gradient), and scalars such as a norm.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun
from jaxtyping import Array

from galore_optax.trace.dependence import dependences, is_zero
from galore_optax.trace.interpreter import Reading, interpret, shape_of
from galore_optax.trace.sign import UNKNOWN, ZERO, Sign
from galore_optax.trace.traced import Traced

Slopes = Callable[[Sequence[Array], Sequence[Array], Sequence[Array]], list[Array | None]]
"""Returns d update / d param for each param: an array with one value, None if it is zero.
Arguments: the leaves of updates, of the state (without `QuantizedArray`s) and of the params."""


def decoupled_decay(traced: Traced, *, check: bool = True) -> Slopes | None:
    """The slopes of decoupled weight decay; None if the use of params is something else.

    Without the check, any use of params is assumed to be decay.
    """
    params, n = traced.params, len(traced.params)
    if traced.update is None or (check and any(dependences(traced.init, ["params"] * n))):
        return None
    rest = [*params, *traced.states]
    # Integers and empty leaves have no slope.
    sloped = [i for i, x in enumerate(params) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
    names = ["params" if i in sloped else None for i in range(n)]
    uses = dependences(traced.update, [None] * len(rest) + names)
    if check and any(uses[n:]):
        return None
    if not any(uses[i] for i in sloped):
        return lambda updates, state, params: [None] * n
    floats, derivative = [params[i] for i in sloped], partial(_derivative, params, sloped)
    slopes = jax.make_jaxpr(derivative(jaxpr_as_fun(traced.update)))(rest, floats, floats)
    if check:
        none, others, count = [None] * len(sloped), [None] * len(rest), len(sloped)
        on = dependences(slopes, [*others, *["params"] * count, *["tangents"] * count])
        # A slope is one number for a whole leaf if arrays enter it through scalars only.
        arrays = ["arrays" if x.shape else None for x in rest]
        on_arrays = dependences(slopes, [*arrays, *none, *none], through_scalars=False)
        # A use of params without a derivative, as in a sign, is not affine.
        affine = all(("tangents" in on[k]) == bool(uses[i]) for k, i in enumerate(sloped))
        begun = [_CONSTANT] * (len(rest) + count) + [_PLACED] * count
        mixed = _MIXED in interpret(slopes, begun, _Mixing())
        if any("params" in names for names in on) or any(on_arrays) or not affine or mixed:
            return None
    # Arrays that a scalar of a slope is made of, such as whether all gradients are finite.
    numbers = [i if x.shape else None for i, x in enumerate(rest)]
    read = frozenset().union(*dependences(slopes, [*numbers, *[None] * 2 * len(sloped)]))
    # A decay of zero, such as that of many recipes by default, needs no pass over the weights.
    signs = interpret(slopes, [UNKNOWN] * len(slopes.jaxpr.invars), Sign())

    def at(
        updates: Sequence[Array], state: Sequence[Array], params: Sequence[Array]
    ) -> list[Array | None]:
        inputs = enumerate(zip([*updates, *state], slopes.in_avals, strict=False))
        # Traced with updates in the params' dtypes; here they may have another.
        rest = [
            x if i in read else jnp.zeros_like(x, a.dtype) if jnp.ndim(x) else _as(x, a.dtype)
            for i, (x, a) in inputs
        ]
        zeros = [jnp.zeros_like(params[i]) for i in sloped]
        ones = [jnp.ones_like(params[i]) for i in sloped]
        found: list[Array | None] = [None] * n
        # Within `jax.shard_map` the types of values differ from those that were traced.
        if read or jax.sharding.get_abstract_mesh().manual_axes:
            made = derivative(traced.function)(rest, zeros, ones)
        else:
            made = jaxpr_as_fun(slopes)(*rest, *zeros, *ones)
        for i, slope, sign in zip(sloped, made, signs, strict=True):
            found[i] = slope if uses[i] and sign != ZERO else None
        return found

    return at


def uses_params(traced: Traced) -> list[bool]:
    """Whether each leaf's update uses params, other than through scalars; empty if not known."""
    if traced.update is None:
        return []
    n = len(traced.params)
    names = [*[None] * (n + len(traced.states)), *["params"] * n]
    return [bool(x) for x in dependences(traced.update, names, through_scalars=False)[:n]]


def _as(x: Any, dtype: Any) -> Array:
    if not hasattr(x, "dtype"):  # a number, as `optax.tree.set` puts a learning rate into a state
        return jnp.asarray(x, dtype)
    return x if x.dtype == dtype else x.astype(dtype)  # a random key cannot be cast


def _derivative(
    params: Sequence[Any], sloped: Sequence[int], update: Callable[..., list[Array]]
) -> Callable[..., list[Array]]:
    """From the rest of an update's inputs, some params and tangents to the updates' derivatives."""

    def derivative(rest: Sequence[Array], own: Sequence[Array], tangents: Sequence[Array]) -> Any:
        def apply(own: Sequence[Array]) -> list[Array]:
            inputs = [jnp.zeros(x.shape, x.dtype) for x in params]
            for i, x in zip(sloped, own, strict=True):
                inputs[i] = x
            made = update(*rest, *inputs)
            return [made[i] for i in sloped]

        return jax.jvp(apply, (own,), (tangents,))[1]

    return derivative


def remembers_params(traced: Traced, counts: Sequence[bool]) -> bool:
    """Whether a state holds values of the params that count.

    It does if an array in it depends on the params' values as `init` makes it (DoG, Prodigy,
    schedule-free, MADGRAD), or after one update without depending on the gradient (L-BFGS). An
    average of gradients to which L2 regularization or a trust ratio was applied depends on both,
    and is a moment. Scalars belong to no basis. Without a traced update, `init` alone decides.
    """
    names = ["params" if count else None for count in counts]
    if any(_arrays(traced.init, dependences(traced.init, names))):
        return True
    if traced.update is None or not any(counts):
        return False
    states, nothing = [None] * len(traced.states), [None] * len(counts)
    on_params = dependences(traced.update, [*nothing, *states, *names])
    # Through values only: if a step is skipped because of its gradient, what it keeps depends on
    # the gradient by a choice, and is a remembered param nevertheless.
    on_updates = dependences(traced.update, [*names, *states, *nothing], through_choices=False)
    kept = [bool(p) and not u for p, u in zip(on_params, on_updates, strict=True)]
    return any(_arrays(traced.update, kept)[len(counts) :])


def acts_within_subspace(traced: Traced, counts: Sequence[bool]) -> bool:
    """Whether params that count enter updates elementwise, other than in regularization."""
    if traced.update is None:
        return False
    gradient, nothing = [_GRADIENT] * len(counts), [_NOTHING] * len(traced.states)
    params = [_PARAMS if count else _NOTHING for count in counts]
    updates, _ = traced.read(_Use(), gradient, nothing, params)
    return any(use in (_PARAMS, _USED) for use in updates)


def _arrays(traced: ClosedJaxpr, marks: Sequence[Any]) -> list[bool]:
    avals = traced.out_avals
    return [bool(mark) and np.ndim(aval) > 0 for mark, aval in zip(marks, avals, strict=True)]


_NOTHING, _GRADIENT, _PARAMS, _OTHER, _USED = range(5)
_LINEAR = {
    "neg", "convert_element_type", "reduce_precision", "copy", "broadcast_in_dim", "reshape",
    "squeeze", "transpose", "real", "sharding_constraint", "reshard",
}  # fmt: skip


_CONSTANT, _PLACED, _MIXED = range(3)
# Of the elements of their inputs, these put each into at most one place.
_PLACING = {
    "add", "add_any", "concatenate", "div", "dynamic_slice", "dynamic_update_slice", "expand_dims",
    "mul", "pad", "select_n", "slice", "split", "sub",
}  # fmt: skip


class _Mixing(Reading):
    """Abstract values say whether elements of tangents are added up (a mean), or only placed."""

    def constant(self, value: Any) -> int:
        return _CONSTANT

    def join(self, values: Sequence[int]) -> int:
        return max(values, default=_CONSTANT)

    def equation(self, equation: JaxprEqn, into: list[int]) -> int:
        name, known = equation.primitive.name, self.join(into)
        if known == _CONSTANT or (name == "mul" and any(map(is_zero, equation.invars))):
            return _CONSTANT
        return known if name in _PLACING | _LINEAR else _MIXED


class _Use(Reading):
    """Abstract values say what a value is linear in: the gradient, the params, or neither."""

    def constant(self, value: Any) -> int:
        return _NOTHING

    def join(self, values: Sequence[int]) -> int:
        known = {*values} - {_NOTHING}
        if not known:
            return _NOTHING
        if len(known) == 1:
            return known.pop()
        return _USED if known & {_PARAMS, _USED} else _OTHER

    def chosen(self, predicate: int, value: int) -> int:
        if _USED in (predicate, value) or predicate == _PARAMS:
            return _USED
        return _USED if value == _PARAMS and predicate != _NOTHING else value

    def bound(self, var: Any, value: int) -> int:
        # Scalars, such as norms, belong to no basis.
        return _NOTHING if shape_of(var) == () else value

    def equation(self, equation: JaxprEqn, into: list[int]) -> int:
        name, invars = equation.primitive.name, equation.invars
        known = {*into} - {_NOTHING}
        if not known or (name == "mul" and any(map(is_zero, invars))):
            return _NOTHING
        if name == "select_n":
            return self.chosen(into[0], self.join(into[1:]))
        if name in ("add", "add_any", "sub"):
            if known == {_GRADIENT, _PARAMS}:
                return _GRADIENT
            if known == {_GRADIENT} and self._array(equation, into):
                return _OTHER  # a momentum: what is added to it is no part of the gradient
            if known == {_PARAMS} and _NOTHING in into:
                # Params added to an array of the state are not regularization.
                return _USED if self._array(equation, into) else _PARAMS
            return self.join(into)
        scaled = into[1] == _NOTHING if name == "div" else name == "mul" and _NOTHING in into
        if name in _LINEAR or scaled:
            return self.join(into)
        return _USED if known & {_PARAMS, _USED} else _OTHER

    def _array(self, equation: JaxprEqn, into: list[int]) -> bool:
        """Whether something is added to an array that is not linear in it, as one of the state."""
        others = [x for x, use in zip(equation.invars, into, strict=True) if use == _NOTHING]
        return any(shape_of(x) != () and not is_zero(x) for x in others)
