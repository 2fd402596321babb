"""What becomes of an inner optimizer's moments when a subspace changes.

Moments live in the coordinates of the old basis. With the transition Q = P_newᵀ P_old between the
two (LDAdam, arXiv:2410.16103, section 3.2), a first moment m becomes Q m, and a second moment v,
with the first beside it,

    v ← (Q∘Q) (v - m²) + (Q m)²

since v - m² is a variance, whose covariances are taken as zero, and m² is turned as m is; a second
moment that stands alone becomes (Q∘Q) v, as do Adafactor's factors along the rank. Of m² no more
than v is counted, so that no second moment falls below zero.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from galore_optax.projection.leaf import Projection
from galore_optax.quantization.array import dequantized, is_quantized, stored_like
from galore_optax.sharding import sharded_like

Turn = Callable[..., Array]
MomentsFunction = Callable[[str, Array, Turn], Array]
"""From a moment's name in the inner's state, the moment, and `turn(x, squared=False)`, which
changes the basis of x by Q (or Q∘Q), to the moment in the new basis."""

RULES = ("rotate", "keep", "reset")

# Names of fields of optax's states (and of torch's, for states that follow them).
_FIRST = ("mu", "trace", "m", "m1", "m2", "ema", "exp_avg")
_SECOND = ("nu", "nu_max", "exp_avg_sq")
_FACTORS = ("v_row", "v_col", "v")  # of FactoredState


@dataclasses.dataclass(frozen=True)
class Place:
    """A leaf of the inner's state that belongs to a matrix.

    Attributes:
        position: Its index among the leaves of the state, a `QuantizedArray` being one.
        name: Its field's name.
        container: The path of the state that has the field.
    """

    position: int
    name: str
    container: str


class _Slot:
    """Which matrix a place belongs to; no pytree, so that it is a leaf."""

    def __init__(self, leaf: int, matrix: int):
        self.leaf, self.matrix, self.depth = leaf, matrix, 0


def places(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    plans: Sequence[Projection | None],
) -> list[list[list[Place]]]:
    """Where the moments of each matrix lie in the inner's state.

    Args:
        inner: The inner transformation.
        state: Its state.
        params: Tree like the params, for its structure.
        plans: How each leaf is projected.

    Returns:
        For each leaf and each of its matrices, the places; none for leaves that are not projected.

    Raises:
        ValueError: If optax cannot map the state to the params, as that of `optax.flatten`.
    """
    tree = jax.tree.structure(params)
    slots = tree.unflatten(
        [
            _Slot(i, 0)
            if plan is None or not plan.view.batch_axes
            else tuple(_Slot(i, j) for j in range(plan.matrices))
            for i, plan in enumerate(plans)
        ]
    )
    by_path = dict(jax.tree.leaves_with_path(slots))
    for path, slot in by_path.items():
        slot.depth = len(path)
    other = _Slot(-1, 0)

    def owner(like_params: Any) -> Any:
        # By path, since a state may lack leaves (masked ones) or have several for one.
        return jax.tree.map_with_path(
            lambda path, _: by_path.get(path, other), like_params, is_leaf=is_quantized
        )

    try:
        owners = optax.tree_utils.tree_map_params(
            inner.init, owner, state, transform_non_params=lambda _: other, is_leaf=lambda _: True
        )
    except Exception as error:  # whatever an init does with a tree that has no leaves
        raise ValueError(
            "inner: its moments cannot be told apart from the rest of its state, since its init "
            f'does not map the params leaf by leaf ({error}); choose moments="keep"'
        ) from error
    found: list[list[list[Place]]] = [
        [] if plan is None else [[] for _ in range(plan.matrices)] for plan in plans
    ]
    paths = [path for path, _ in jax.tree.leaves_with_path(state, is_leaf=is_quantized)]
    slots = jax.tree.leaves(owners, is_leaf=is_quantized)
    for position, (path, slot) in enumerate(zip(paths, slots, strict=True)):
        if is_quantized(slot) or slot is other or plans[slot.leaf] is None:
            continue
        field = path[: len(path) - slot.depth]
        name = jax.tree_util.keystr(field[-1:], simple=True) if field else ""
        container = jax.tree_util.keystr(field[:-1])
        found[slot.leaf][slot.matrix].append(Place(position, name, container))
    return found


def reset(
    init: Callable[[], optax.OptState],
    leaves: list[Array],
    moments_of: Sequence[Sequence[Sequence[Place]]],
    refreshed: list[Any],
) -> list[Array]:
    """The leaves of the inner's state, made anew where they belong to a refreshed matrix."""
    moved = [
        (place.position, refreshed[i][j])
        for i, matrices in enumerate(moments_of)
        for j, matrix in enumerate(matrices)
        for place in matrix
        if len(refreshed[i])
    ]
    if not moved:
        return leaves
    # No conditional: zeros are chosen in the pass that updates a moment, and one conditional for
    # all matrices would let each of them depend on the gradients of the others.
    fresh = sharded_like(jax.tree.leaves(init(), is_leaf=is_quantized), leaves)
    new = list(leaves)
    for position, found in moved:
        new[position] = jax.tree.map(partial(jnp.where, found), fresh[position], leaves[position])
    return new


@dataclasses.dataclass(frozen=True)
class CarryOver:
    """Carries the moments of one matrix over to a new basis.

    Attributes:
        projection: How the matrix's leaf is projected.
        rule: "rotate", or the user's own function.
        names: For each moment, its field's name and the path of the state that has the field.
    """

    projection: Projection
    rule: str | MomentsFunction
    names: tuple[tuple[str, str], ...]

    def __call__(
        self, transitions: Sequence[Float[Array, "r r"]], moments: Sequence[Any]
    ) -> tuple[Any, ...]:
        """The moments in the new bases, each in its own shape, dtype and code."""
        by_mode = dict(zip(self.projection.modes, transitions, strict=True))
        floats = dequantized(tuple(moments))
        carried = [self._carried(i, floats, by_mode) for i in range(len(floats))]
        for (name, _), new, moment in zip(self.names, carried, floats, strict=True):
            if jnp.shape(new) != moment.shape:
                raise ValueError(
                    f"moments: of the moment {name!r}, of shape {moment.shape}, it makes one of "
                    f"shape {jnp.shape(new)}"
                )
        return tuple(
            stored_like(c.astype(m.dtype), m) for c, m in zip(carried, moments, strict=True)
        )

    def _carried(self, i: int, moments: Sequence[Array], transitions: dict[int, Array]) -> Array:
        (name, container), moment = self.names[i], moments[i]
        axes = self._axes(name, moment)

        def turn(x: Array, squared: bool = False) -> Array:
            for at, axis in enumerate(axes):
                if axis in transitions:
                    q = transitions[axis]
                    turned = jnp.tensordot(q * q if squared else q, _wide(x), (1, at))
                    x = jnp.moveaxis(turned, 0, at)
            return x

        if callable(self.rule):
            return self.rule(name, moment, turn) if axes else moment
        if not axes:
            return moment
        if name in _FIRST:
            return turn(moment)
        if name not in _SECOND:
            return turn(moment, squared=True) if name in _FACTORS else moment
        beside = [
            _wide(other)
            for other, (n, c) in zip(moments, self.names, strict=True)
            if n in _FIRST and c == container and other.shape == moment.shape
        ]
        if not beside:
            return turn(moment, squared=True)
        second, first = _wide(moment), beside[0]
        mean = jnp.minimum(second, first * first)
        turned = turn(jnp.sign(first) * jnp.sqrt(mean))
        return turn(second - mean, squared=True) + turned * turned

    def _axes(self, name: str, moment: Array) -> tuple[int, ...]:
        """Which axes of the projected matrix the moment has; none where it is to be kept."""
        shape = self.projection.small_shape
        if name in ("v_row", "v_col") and len(shape) > 1:
            # optax drops the longest axis for the one, the second longest for the other.
            second, longest = (int(axis) for axis in np.argsort(shape)[-2:])
            dropped = longest if name == "v_row" else second
            axes = tuple(axis for axis in range(len(shape)) if axis != dropped)
        else:
            axes = tuple(range(len(shape)))
        return axes if moment.shape == tuple(shape[axis] for axis in axes) else ()


def check_rule(
    rule: MomentsFunction,
    leaves: Sequence[Any],
    moments_of: Sequence[Sequence[Sequence[Place]]],
    plans: Sequence[Projection | None],
) -> None:
    """Whether a user's function carries moments over.

    Args:
        rule: The function.
        leaves: Of the inner's state.
        moments_of: From `places`.
        plans: How each leaf is projected.

    Raises:
        ValueError: If it makes moments of another shape, or cannot be called.
    """
    for plan, matrices in zip(plans, moments_of, strict=True):
        if plan is None or not matrices or not matrices[0]:
            continue
        carry_over = CarryOver(plan, rule, tuple((p.name, p.container) for p in matrices[0]))
        turns = [jax.ShapeDtypeStruct((rank, rank), jnp.float32) for rank in plan.ranks]
        own = tuple(leaves[place.position] for place in matrices[0])
        try:
            jax.eval_shape(carry_over, turns, own)
        except Exception as error:
            said = str(error).removeprefix("moments: ")
            raise ValueError(f"moments: the function does not carry them over: {said}") from error


def transition(old: Float[Array, "n r"], new: Float[Array, "n r"]) -> Float[Array, "r r"]:
    """Q = P_newᵀ P_old, at least in float32."""
    return _wide(new).T @ _wide(old)


def _wide(x: Any) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
