"""`explain`: what a transformation decides for each leaf of the params, as a table."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.inner import InnerCall
from galore_optax.params import without_variables
from galore_optax.projection.moments import moving_axes, small_leaves
from galore_optax.quantization.array import QuantizedArray, dequantized, is_quantized
from galore_optax.stages import GaLoreState
from galore_optax.trace.params_use import decoupled_decay, uses_params
from galore_optax.trace.roles import FACTOR, FIRST, SECOND, Role, state_roles
from galore_optax.trace.traced import Traced, trace
from galore_optax.transformation import observed

_ROLES = {FIRST: "first moment", SECOND: "second moment", FACTOR: "factor of a second moment"}
_SIDES: dict[tuple[int, ...], str] = {(0,): "left", (1,): "right", (0, 1): "both", (): "whole"}
_NONE, _UNKNOWN = "none", "unknown"
_WHOLE, _WITHIN = "of the whole leaf", "within the subspace"


@dataclasses.dataclass(frozen=True)
class StateArray:
    """An array of a leaf's state.

    Attributes:
        name: Its place in the state, such as "[0].mu".
        role: "basis", "first moment", "second moment", "factor of a second moment", "other", or
            "unclear", which keeps its numbers when a basis changes, or with moments="reset" gets
            its first ones.
        shape: Its shape; where matrices of a stack are separate, that of one matrix.
        stored: Its dtype, such as "float32", or "8 bits".
    """

    name: str
    role: str
    shape: tuple[int, ...]
    stored: str

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.stored}, {self.role}"


@dataclasses.dataclass(frozen=True)
class ExplainedLeaf:
    """What was decided for a leaf.

    Attributes:
        path: Its path in the params (with `unstacked`, that of one layer of it).
        shape: Its shape.
        projection: Which side is projected: "left", "right", "both"; "axes 0, 1" of a tensor;
            "whole" where none is longer than the rank; or "none".
        rank: Dimensions of the subspace, one number for each projected side.
        matrices: How many matrices it holds.
        together: Whether a stack is one array to the inner transformation; else each matrix is.
        decay: Decoupled weight decay "of the whole leaf", as is any other use of a leaf's values
            outside of `galore`; "within the subspace", as is any other elementwise use of a
            projected leaf's; "none" (a norm of them, as in a trust ratio, does not count); or
            "unknown", if the update needs extra arguments.
        state: The arrays of its state that have axes.
    """

    path: str
    shape: tuple[int, ...]
    projection: str
    rank: tuple[int, ...]
    matrices: int
    together: bool
    decay: str
    state: tuple[StateArray, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What was decided for all leaves, printed as a table.

    Attributes:
        leaves: In the order of the params; of several parts of a chain, one part after the other.
        rest: Arrays of the state that belong to none of these leaves, or to several, but for the
            times and similarities of GaLore's refreshes.
        notes: The warnings that `init` gives.
    """

    leaves: tuple[ExplainedLeaf, ...]
    rest: tuple[StateArray, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("leaf", "projected", "decay", "state")]
        for leaf in self.leaves:
            how = leaf.projection
            if leaf.rank:
                how += f", rank {' x '.join(map(str, dict.fromkeys(leaf.rank)))}"
            if leaf.matrices > 1:
                how += f", {leaf.matrices} matrices {'together' if leaf.together else 'apart'}"
            shape = "x".join(map(str, leaf.shape))
            states = [str(x) for x in leaf.state] or [""]
            rows.append((f"{leaf.path} {shape}", how, leaf.decay, states[0]))
            rows += [("", "", "", state) for state in states[1:]]
        rows += [("(no leaf)", "", "", str(x)) for x in self.rest]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def explain(
    tx: optax.GradientTransformation, params: optax.Params, **extra_args: Any
) -> Explanation:
    """Says what `tx` decides for each leaf of the params, without computing anything.

    Args:
        tx: Any transformation; what `galore` decides is seen through `optax.chain`, `unstacked` and
            all other wrappers, whose own states count, too.
        params: The params, of arrays or of `jax.ShapeDtypeStruct`.
        **extra_args: Extra arguments of the update, other than optax's usual ones, if it needs any.

    Returns:
        A table to print, whose parts are attributes.

    Raises:
        ValueError: If `tx` is no transformation, or hides from this what `galore` decided.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from galore_optax import explain, galore_adamw8bit
        >>> params = {"w": jnp.ones((64, 512)), "b": jnp.ones(512)}
        >>> tx = optax.chain(optax.clip(1.0), galore_adamw8bit(1e-2, rank=8, weight_decay=0.1))
        >>> print(explain(tx, params))
        leaf          projected     decay              state
        ['b'] 512     none          of the whole leaf  [0].mu 512 float32, first moment
                                                       [0].nu 512 float32, second moment
        ['w'] 64x512  left, rank 8  of the whole leaf  basis 64x8 float32, basis
                                                       [0].mu 8x512 8 bits, first moment
                                                       [0].nu 8x512 8 bits, second moment
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"tx={checks.said(tx)} must be an optax.GradientTransformation")
    found: list[_Seen] = []
    observing = observed(lambda call, own: found.append(_Seen(call, own, extra_args)))
    with observing, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        # A function of its own, since what is traced already is not traced again.
        params = jax.eval_shape(lambda p: dequantized(without_variables(p)), params)
        state = jax.eval_shape(lambda p: tx.init(p), params)
    notes = dict.fromkeys(str(w.message) for w in warned if issubclass(w.category, UserWarning))
    nodes = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, GaLoreState))
    galores = [(path, x) for path, x in nodes if isinstance(x, GaLoreState)]
    # Leaves that `optax.partition` or `optax.masked` keeps from a galore.
    masked = frozenset().union(*(seen.masked for seen in found))
    leaves: list[ExplainedLeaf] = []
    of_inner: list[StateArray] = []
    for _, node in galores:
        own = next((seen for seen in found if seen.fits(node)), None)
        if own is None:
            raise ValueError(
                "tx: it hides what galore decided, as a jitted init does that has been called; "
                "give the transformation without jax.jit"
            )
        found.remove(own)
        made, shared = own.leaves(node)
        leaves += made
        of_inner += shared
    others, rest = _others(tx, params, state, [path for path, _ in galores], extra_args)
    beside = {leaf.path: leaf for leaf in others}
    for i, leaf in enumerate(leaves):
        if outer := beside.get(leaf.path):
            decay = outer.decay if leaf.decay == _NONE else leaf.decay
            leaves[i] = dataclasses.replace(leaf, decay=decay, state=leaf.state + outer.state)
    seen = {leaf.path for leaf in leaves}
    others = [leaf for leaf in others if leaf.path not in seen]
    leaves += [x for x in others if x.state or not seen or x.path in masked]
    return Explanation(tuple(leaves), (*of_inner, *rest), tuple(notes))


class _Seen:
    """What one `galore` decided in `init`, in which its shapes are known."""

    def __init__(self, call: InnerCall, params: optax.Params, extra_args: Any):
        call = dataclasses.replace(call, extra_args=extra_args)
        self.plans, self.owners = call.plans, small_leaves(call.plans)
        self.small = jax.tree.leaves_with_path(call.params)
        self.params, self.whole = jax.tree.flatten_with_path(jax.eval_shape(lambda: params))
        pairs = jax.tree.leaves_with_path(params, is_leaf=_is_masked)
        self.masked = {jax.tree_util.keystr(path) for path, x in pairs if _is_masked(x)}
        self.tree = jax.tree.structure(call.state, is_leaf=is_quantized)
        self.decays = _decays(call.traced, call.counts, call.inner.decay)
        # Of leaves that are not projected, too; these cannot be unclear.
        moving = state_roles(call.traced, moving_axes(self.plans))
        pairs = zip(state_roles(call.traced), moving, strict=True)
        self.roles = [
            dataclasses.replace(role, unclear=own.unclear, shared=own.shared) for role, own in pairs
        ]

    def fits(self, node: GaLoreState) -> bool:
        """Whether it is the state that was made there."""
        if self.tree != jax.tree.structure(node.inner, is_leaf=is_quantized):
            return False
        try:
            bases = self.whole.flatten_up_to(node.bases)
        except ValueError:  # of a label of `optax.partition` with other leaves
            return False
        made = [plan.ranks if plan and plan.modes else () for plan in self.plans]
        return made == [_ranks(own) for own in bases]

    def leaves(self, node: GaLoreState) -> tuple[list[ExplainedLeaf], list[StateArray]]:
        """All leaves, with their parts of the state, and the inner's other arrays."""
        arrays = jax.tree.leaves_with_path(node.inner, is_leaf=is_quantized)
        state = _by_param(arrays, self.roles, self.small)
        recovery = [()] * len(self.plans)
        if jax.tree.leaves(node.recovery):
            recovery = self.whole.flatten_up_to(node.recovery)
        owns = zip(self.whole.flatten_up_to(node.bases), recovery, strict=True)
        triples = zip(self.plans, self.params, owns, strict=True)
        made = []
        for i, (plan, (path, x), (bases, remembered)) in enumerate(triples):
            k = self.owners.index((i, 0))
            leaf = _unprojected(path, x, self.decays[k], state.get(k, ()))
            if plan is not None:
                bases = bases if isinstance(bases, tuple) else (bases,)
                axes = ", ".join(str(plan.view.modes[mode][0]) for mode in plan.modes)
                leaf = dataclasses.replace(
                    leaf,
                    projection=f"axes {axes}" if axes and plan.view.tensor else _SIDES[plan.modes],
                    rank=plan.ranks,
                    matrices=plan.matrices,
                    together=plan.together,
                    state=(
                        *(_array("basis", "basis", basis) for basis in bases),
                        *(_array("recovery", "other", x) for x in _with_axes(remembered)),
                        *leaf.state,
                    ),
                )
            made.append(leaf)
        return made, state.get(None, [])


def _unprojected(path: Any, x: Any, decay: str, state: Sequence[StateArray]) -> ExplainedLeaf:
    path = jax.tree_util.keystr(path)
    return ExplainedLeaf(path, tuple(x.shape), "none", (), 1, False, decay, tuple(state))


def _others(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    galores: Sequence[Any],
    extra_args: Any,
) -> tuple[list[ExplainedLeaf], list[StateArray]]:
    """The leaves as the state outside of every `galore` has them, and its other arrays."""
    arrays = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
    outside = [all(path[: len(own)] != own for own in galores) for path, _ in arrays]
    if () in galores:  # nothing is outside
        return [], []
    tx = optax.with_extra_args_support(tx)
    traced = trace(tx, params, jax.eval_shape(dequantized, state), **extra_args)
    leaves = jax.tree.leaves_with_path(params)
    decays = _decays(traced, [False] * len(leaves), None)
    # No basis changes here.
    roles = [dataclasses.replace(x, unclear=False, shared=False) for x in state_roles(traced)]
    chosen = [i for i, out in enumerate(outside) if out]
    found = _by_param([arrays[i] for i in chosen], [roles[i] for i in chosen], leaves)
    made = [
        _unprojected(path, x, decay, found.get(k, ()))
        for k, ((path, x), decay) in enumerate(zip(leaves, decays, strict=True))
    ]
    return made, found.get(None, [])


def _decays(traced: Traced, projected: Sequence[bool], decay: bool | None) -> list[str]:
    """What becomes of weight decay, for each leaf that a transformation is given."""
    n = len(traced.params)
    if traced.update is None:
        return [_UNKNOWN] * n
    used = uses_params(traced)
    found = None if decay is False else decoupled_decay(traced, check=decay is None)
    if found is not None:
        slopes = jax.eval_shape(found, traced.params, traced.states, traced.params)
        return [_NONE if slope is None else _WHOLE for slope in slopes]
    return [
        (_WITHIN if inside else _WHOLE) if use else _NONE
        for use, inside in zip(used, projected, strict=True)
    ]


def _by_param(
    arrays: Sequence[Any], roles: Sequence[Role], params: Sequence[Any]
) -> dict[int | None, list[StateArray]]:
    """The arrays of a state that have axes, by the index of the param that they belong to."""
    ends = [jax.tree_util.keystr(path) for path, _ in params]
    found: dict[int | None, list[StateArray]] = {}
    for (path, x), role in zip(arrays, roles, strict=True):
        if not x.ndim:
            continue
        name, k = jax.tree_util.keystr(path), role.param
        if k is None:
            k = next((k for k, end in enumerate(ends) if end and name.endswith(end)), None)
        kind = "unclear" if role.unclear or role.shared else _ROLES.get(role.kind, "other")
        short = name if k is None else name.removesuffix(ends[k])
        found.setdefault(k, []).append(_array(short, kind, x))
    return found


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _ranks(bases: Any) -> tuple[int, ...]:
    """The ranks of a leaf's bases; none of one that is not projected."""
    if _is_masked(bases):
        return ()
    return tuple(x.shape[-1] for x in (bases if isinstance(bases, tuple) else (bases,)))


def _with_axes(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if x.ndim]


def _array(name: str, role: str, x: Any) -> StateArray:
    stored = f"{x.code.bits} bits" if isinstance(x, QuantizedArray) else jnp.dtype(x.dtype).name
    return StateArray(name, role, tuple(x.shape), stored)
