"""The way back: from the inner's step in the subspace to the update of a whole matrix.

GaLore's is P N: the part of the gradient outside the subspace is lost. Other ways back use it, so
they need the gradient itself, and cannot work on a sum of projected gradients. Each is a module in
this folder (`fira` is the shortest); their names are in `galore_optax.galore.RECOVERS`.
"""

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from galore_optax import checks
from galore_optax.projection.each import State, each_matrix, first_state, turned
from galore_optax.projection.leaf import Bases, Plans, Projection
from galore_optax.quantization.array import dequantized, is_quantized

GAMMA = 1.01  # by which an update's norm may grow from step to step, in every paper
_TINY = 1e-8  # added to norms, as in the authors' code
# States of what makes an update of several gradients, or of none.
_SKIPS = (
    optax.MultiStepsState, optax.ApplyEvery, optax.ApplyIfFiniteState, optax.ConditionallyMaskState
)  # fmt: skip


class Matrix(NamedTuple):
    """One matrix at one step, seen with the projected side first.

    Attributes:
        gradient: The gradient G.
        basis: The basis P.
        projected: R = PᵀG.
        step: N, what the inner made of R; it descends, with the learning rate in it.
        scale: The argument of `galore`.
        count: Steps done before.
        orthonormal: Whether P is; a basis stored in 4 or 8 bits is not quite.
    """

    gradient: Float[Array, "n m"]
    basis: Float[Array, "n r"]
    projected: Float[Array, "r m"]
    step: Float[Array, "r m"]
    scale: Any  # a number, or an array without axes
    count: Any  # an integer, likewise
    orthonormal: bool = True

    def back(self, small: Float[Array, "r m"]) -> Float[Array, "n m"]:
        """P times a projected matrix, in the dtype of N."""
        dtype = self.step.dtype
        return self.basis.astype(dtype) @ small.astype(dtype)


Recover = Callable[[Matrix, State], tuple[Float[Array, "n m"], State]]
"""From a matrix and its state to its update and its new state. A method `init`, if it has one,
makes the first state from a `jax.ShapeDtypeStruct` of shape (n, m), in float32 or wider, and
the rank; otherwise the state is (). If it has a `history`, a hashable function from the state and P
to columns (n, k), a new subspace is found from the gradient's columns and these together. If its
attribute `needs_descent` is true, an inner whose steps surely ascend is refused."""


def energies(x: Float[Array, "n m"]) -> Float[Array, " m"]:
    """The sum of squares of each column, in float32 or wider."""
    return jnp.sum(jnp.square(x.astype(_wide(x))), axis=0)


def growth(
    step: Float[Array, "r m"], projected: Float[Array, "r m"], columns: bool = True
) -> Float[Array, "*m"]:
    """The factor by which the inner scaled R: ‖N‖ / ‖R‖ of each column, or of the whole matrix."""
    made, given = energies(step), energies(projected)
    if not columns:
        made, given = jnp.sum(made), jnp.sum(given)
    return jnp.sqrt(made) / (jnp.sqrt(given) + _TINY)


def limit(
    squares: Float[Array, " m"], previous: Float[Array, ""], learning_rate: ArrayLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The factor that keeps an update's norm from growing by more than γ, and the norm after it.

    The norm-growth limiter (Fira, arXiv:2410.01623, section 4.3). Norms are divided by the learning
    rate before they are compared, `squares` are the energies of the update's columns, and
    `previous` is the norm returned by the step before, 0 if there was none. The previous norm is
    returned if the new one is unknown: if the update is not finite, or the learning rate is zero.
    """
    learning_rate = jnp.asarray(learning_rate, squares.dtype)  # a schedule's may be float64
    norm = jnp.sqrt(jnp.sum(jnp.maximum(squares, 0)))
    most = GAMMA * (previous + _TINY) * learning_rate
    factor = jnp.where((previous > 0) & (norm > most), most / norm, 1)
    found = factor * norm / learning_rate
    known = jnp.isfinite(found) & (norm > 0)
    return factor, jnp.where(known, found, previous)


def at(learning_rate: optax.ScalarOrSchedule | None, count: Any) -> Any:
    """The learning rate at a step; 1 if it is not given."""
    if learning_rate is None:
        return 1.0
    return learning_rate(count) if callable(learning_rate) else learning_rate


def first_states(
    recover: Recover | None, plans: Plans, leaves: Sequence[Array], inner: optax.OptState
) -> list[State]:
    """The first state of each leaf: the states of its matrices, with the axes of the stack first.

    Refuses leaves that are projected on other than one side, a function that returns something
    other than an update, and an inner that sums gradients or skips steps. Warns if a limiter is not
    given the schedule in the inner's state.
    """
    _warn_of_schedule(recover, inner)
    if recover is not None and any(plans):
        _refuse_skipped_steps(recover, inner)
    states: list[State] = [optax.MaskedNode()] * len(leaves)
    for i, (plan, leaf) in enumerate(zip(plans, leaves, strict=True)):
        if recover is not None and plan is not None:
            _check(recover, plan)
            states[i] = first_state(
                partial(_one_state, recover, _rank(plan)), turned(plan.view, _mode(plan)), leaf
            )
    return states


def check_states(recover: Recover | None, plans: Plans, tree: Any, recovery: Any) -> None:
    """Refuses a state whose `recovery`, a tree like the params, another way back made."""
    if recover is None or not remembers(recover) or not any(plans):
        return
    empty = isinstance(recovery, tuple) and not recovery
    states = [()] * len(plans) if empty else tree.flatten_up_to(recovery)
    for plan, own in zip(plans, states, strict=True):
        if plan is None:
            continue
        like = jax.ShapeDtypeStruct(turned(plan.view, _mode(plan)).sizes, jnp.float32)
        made = jax.eval_shape(partial(_one_state, recover, _rank(plan), like))
        needed = [(*plan.view.batch_shape, *x.shape) for x in jax.tree.leaves(made)]
        found = list(map(jnp.shape, jax.tree.leaves(own)))
        if found != needed:
            raise ValueError(
                f"state: it has arrays of shapes {found} instead of {needed} of the leaf at "
                f"{plan.path}, which recover={checks.said(recover)} remembers; give the state "
                "that init made with it"
            )


def _warn_of_schedule(recover: Recover | None, inner: optax.OptState) -> None:
    if getattr(recover, "learning_rate", 1) is not None:
        return

    def scheduled(x: Any) -> bool:  # by `optax.inject_hyperparams`, too
        by_hyperparams = bool(getattr(x, "hyperparams_states", None))
        return isinstance(x, optax.ScaleByScheduleState) or by_hyperparams

    if any(map(scheduled, jax.tree.leaves(inner, is_leaf=scheduled))):
        warnings.warn(
            f"recover={checks.said(recover)} limits how fast updates grow, and inner has a "
            "schedule, whose warm-up it limits, too: give the schedule as its learning_rate",
            stacklevel=4,
        )


def _refuse_skipped_steps(recover: Recover, inner: optax.OptState) -> None:
    """A way back uses the gradient of every step, also where N is 0 or of several gradients."""

    def skips(x: Any) -> bool:
        return isinstance(x, _SKIPS)

    for x in filter(skips, jax.tree.leaves(inner, is_leaf=skips)):
        raise ValueError(
            f"inner: {type(x).__name__} in its state says that it sums gradients or skips steps, "
            f"but recover={checks.said(recover)} uses the gradient of each step: put that "
            'transformation around galore instead, or choose recover="project"'
        )


def _check(recover: Recover, plan: Projection) -> None:
    if len(plan.modes + plan.whole) != 1 or plan.view.tensor:
        raise ValueError(
            f"recover={checks.said(recover)} needs matrices of which one side is projected, unlike "
            f'the leaf at {plan.path}: choose side= other than "both" and GaLoreDimensionNumbers, '
            'or recover="project"'
        )
    (n, m), rank = turned(plan.view, _mode(plan)).sizes, _rank(plan)
    like = jax.ShapeDtypeStruct((n, m), jnp.float32)
    shapes = (n, m), (n, rank), (rank, m), (rank, m), ()
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def update(*arrays: Any) -> Array:
        return recover(Matrix(*arrays), _one_state(recover, rank, like))[0]

    checks.gives(update, "recover", (*given, jax.ShapeDtypeStruct((), jnp.int32)), like)
    if (past := history(recover)) is None:
        return
    if not (remembers(recover) and isinstance(past, Hashable)):
        raise ValueError(
            f"recover={checks.said(recover)} has a history, which needs to be a hashable function "
            "of what a method init makes: give both, or leave history out"
        )
    state = jax.eval_shape(lambda: _one_state(recover, rank, like))
    columns = jax.eval_shape(past, state, jax.ShapeDtypeStruct((n, rank), jnp.float32))
    if columns.ndim != 2 or len(columns) != n:
        raise ValueError(
            f"recover={checks.said(recover)}: its history returns an array of shape "
            f"{columns.shape}; it must return columns ({n}, k)"
        )


def recovered(
    recover: Recover,
    plan: Projection,
    bases: Bases,
    gradient: Float[Array, "*shape"],
    small: tuple[Any, Any],
    state: State,
    scalars: tuple[Any, Any],
) -> tuple[Float[Array, "*shape"], State]:
    """The update of a leaf and the new states of its matrices.

    `small` are R and N as the inner has them, `scalars` the scale and the count.
    """
    mode = _mode(plan)
    rank, rounded = _rank(plan), any(map(is_quantized, bases))
    with_arrays, arrays = _apart(recover, scalars[1])

    def one(gradient: Array, state: State, beside: Any, common: Any) -> tuple[Array, State]:
        basis, *pair = beside
        scalars, arrays = common
        sides = (jnp.moveaxis(x, mode, 0) for x in pair)
        own = Matrix(gradient, basis, *sides, *scalars, orthonormal=not rounded)
        update, state = with_arrays(arrays)(own, state)
        return update.astype(pair[1].dtype), state

    def stacked(beside: Any) -> Any:
        bases, pair = beside
        identity = jnp.broadcast_to(jnp.eye(rank), (*plan.view.batch_shape, rank, rank))
        (basis,) = dequantized(bases) if plan.modes else (identity,)
        return basis.astype(gradient.dtype), *map(plan.stacked, pair)

    view = turned(plan.view, mode)
    return each_matrix(one, view, gradient, state, (bases, small), (scalars, arrays), stacked)


def _apart(recover: Any, count: Any) -> tuple[Callable[[dict[str, Array]], Recover], Any]:
    """A function from a way back's fields that are arrays to it, and these fields at a step.

    Under explicit mesh axes it must not close over arrays, and `optax.inject_hyperparams` makes
    hyperparameters arrays.
    """
    if not dataclasses.is_dataclass(recover):
        return lambda _: recover, {}
    fields = {field.name: getattr(recover, field.name) for field in dataclasses.fields(recover)}
    rate = fields.get("learning_rate")
    if callable(rate):
        fields["learning_rate"] = rate(count)

    def with_arrays(arrays: dict[str, Array]) -> Recover:
        new: dict[str, Any] = dict(arrays)
        if callable(rate) and "learning_rate" in arrays:
            new["learning_rate"] = lambda _: arrays["learning_rate"]
        return dataclasses.replace(recover, **new)

    return with_arrays, {k: x for k, x in fields.items() if isinstance(x, jax.Array)}


def history(recover: Recover | None) -> Callable[[State, Array], Array] | None:
    """The function to the columns that are added to a gradient when a subspace is found, if any."""
    return getattr(recover, "history", None)


def remembers(recover: Recover | None) -> bool:
    """Whether a way back has a state."""
    return hasattr(recover, "init")


def _one_state(recover: Any, rank: int, like: jax.ShapeDtypeStruct) -> State:
    return recover.init(like, rank) if remembers(recover) else ()


def _mode(plan: Projection) -> int:
    """The side that is projected, or would be if it were longer than the rank."""
    return (plan.modes + plan.whole)[0]


def _rank(plan: Projection) -> int:
    return plan.ranks[0] if plan.modes else plan.view.sizes[_mode(plan)]


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
