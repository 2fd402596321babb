"""What `galore` needs to know about its inner transformation, and the inner's update.

The inner runs on projected gradients and is given projected weights PᵀW as its params. Which leaves
of its state are moments, and what it does with params, is read from its traced functions
(`galore_optax.trace`).
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.projection.leaf import Plans
from galore_optax.projection.moments import (
    MomentsFunction,
    MomentsOf,
    check_rule,
    moments_of,
    moving_axes,
    small_leaves,
)
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.sharding import first_element
from galore_optax.trace.elementwise import is_elementwise, same_equations
from galore_optax.trace.interpreter import interpret
from galore_optax.trace.params_use import (
    acts_within_subspace,
    decoupled_decay,
    remembers_params,
    uses_params,
)
from galore_optax.trace.roles import Role, state_roles
from galore_optax.trace.sign import NONNEGATIVE, ZERO, Sign
from galore_optax.trace.traced import Traced, abstract, float_state, trace


@dataclasses.dataclass(frozen=True, eq=False)
class Inner:
    """An inner transformation, and how `galore` is to treat it.

    Attributes:
        tx: The transformation.
        moments: What becomes of its moments at a refresh: galore's argument of that name.
        decay: Whether its use of params is decoupled weight decay; None finds out.
        roles: A cache, by shapes and projected axes, of the roles of the leaves of its state.
        elementwise: A cache, by shapes, stacks and the tree of a given state, of whether its update
            of stacks is elementwise.
    """

    tx: optax.GradientTransformationExtraArgs
    moments: str | MomentsFunction | None
    decay: bool | None
    roles: dict[Any, list[Role]] = dataclasses.field(default_factory=dict)
    elementwise: dict[Any, bool] = dataclasses.field(default_factory=dict)

    @property
    def rule(self) -> str | MomentsFunction:
        """What becomes of moments at a refresh."""
        return "rotate" if self.moments is None else self.moments


@dataclasses.dataclass(frozen=True, eq=False)
class InnerCall:
    """An inner transformation in one call of `galore`; each question to it is answered once."""

    inner: Inner
    project: Callable[[], optax.Params]  # returns its params; only their shapes are used
    given: optax.OptState | None  # the state, only for its shapes; None: as `init` makes it
    plans: Plans
    extra_args: dict[str, Any]

    @functools.cached_property
    def params(self) -> optax.Params:
        """The shapes of the projected params."""
        return jax.eval_shape(self.project)

    @functools.cached_property
    def state(self) -> optax.OptState:
        """The shapes of the state; with floats for `QuantizedArray`s, unless it is given."""
        if self.given is not None:
            return self.given
        return float_state(self.inner.tx, self.params)

    @functools.cached_property
    def traced(self) -> Traced:
        """The traced functions; a quantized state counts as floats."""
        return self._trace(self.params, self.state)

    @functools.cached_property
    def roles(self) -> list[Role]:
        """What each leaf of the state is, a `QuantizedArray` being one leaf."""
        leaves, tree = jax.tree.flatten((self.params, self.state))
        moving = frozenset(moving_axes(self.plans))
        shapes = tree, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves), moving
        if shapes not in self.inner.roles:
            if self.traced.update is None:
                raise ValueError(self._why_unknown()) from self.traced.failure
            self._check_shapes(
                self.traced.update.out_avals[len(self.traced.params) :], self.traced.states
            )
            self.inner.roles[shapes] = state_roles(self.traced, moving)
        return self.inner.roles[shapes]

    def _why_unknown(self) -> str:
        """The message of an error for an update that cannot be traced."""
        failure = self.traced.failure
        reason = f" ({checks.reason(failure)})" if failure else ""
        return self._not_of_init(reason) or (
            "inner: its update cannot be traced, so that it is not known how its moments are "
            'carried over; pass the extra arguments that it needs, or choose moments="keep"'
            f"{reason}"
        )

    def _not_of_init(self, reason: str) -> str | None:
        """The message of an error for a given state that `init` does not make; None if it does."""
        if self.given is None:
            return None
        made = jax.eval_shape(lambda params: self.inner.tx.init(params), self.params)
        shapes, own = (
            (list(map(jnp.shape, arrays)), any(map(is_quantized, arrays)))
            for arrays in (jax.tree.leaves(x, is_leaf=is_quantized) for x in (made, self.given))
        )
        # Codes in place of floats fit an inner that makes some.
        if shapes[0] == own[0] and shapes[1] >= own[1]:
            return None
        return (
            "state: its arrays of inner are not those that init makes for these params"
            f"{reason}; give the state that init made with this inner and params of these "
            "shapes, or begin with init"
        )

    def _check_shapes(self, made: Any, given: Any) -> None:
        """Refuses a given state with which arrays grow: axes of length 1 meet others."""
        shapes, own = (list(map(jnp.shape, jax.tree.leaves(x))) for x in (made, given))
        if shapes != own and (message := self._not_of_init("")):
            raise ValueError(message)

    @property
    def elementwise(self) -> bool:
        """Whether a stack of matrices is updated element by element, as each of them would be.

        An inner that looks at the number of axes (Muon) may do something else with a stack.
        """
        leaves, tree = jax.tree.flatten(self.params)
        plans = enumerate(self.plans)
        stacks = {k: plan.batch_ndim for k, plan in plans if plan is not None and plan.together}
        given = None if self.given is None else jax.tree.structure(self.given, is_leaf=is_quantized)
        own = tuple((x.shape, x.dtype) for x in leaves)
        shapes = tree, own, tuple(stacks.items()), given
        if shapes not in self.inner.elementwise:
            for k, leaf in enumerate(leaves):
                leaves[k] = abstract(leaf.shape[stacks.get(k, 0) :], leaf.dtype)
            try:
                found = self._fits_the_state() and is_elementwise(self.traced, stacks)
                # A given state with arrays of a stack's shape shows that `init` checked the rest.
                if found and not self._of_stacks(stacks):
                    one = self._trace(tree.unflatten(leaves), None)
                    found = is_elementwise(one, stacks) and same_equations(self.traced, one)
            except Exception:  # of an inner that takes no stacks; it gets matrices then
                found = False
            self.inner.elementwise[shapes] = found
        return self.inner.elementwise[shapes]

    def _fits_the_state(self) -> bool:
        """Whether a given state is as `init` makes it for these params."""
        if self.given is None:
            return True
        made = jax.tree.structure(float_state(self.inner.tx, self.params))
        return made == jax.tree.structure(self.given, is_leaf=is_quantized)

    def _of_stacks(self, stacks: Collection[int]) -> bool:
        """Whether a given state has arrays of the shape of a stack of matrices."""
        if self.given is None:
            return False
        params = jax.tree.leaves(self.params)
        shapes = {params[k].shape for k in stacks}
        return any(
            jnp.shape(x) in shapes for x in jax.tree.leaves(self.given, is_leaf=is_quantized)
        )

    def _trace(self, params: optax.Params, state: optax.OptState | None) -> Traced:
        floats = None if state is None else jax.eval_shape(dequantized, state)
        return trace(self.inner.tx, params, floats, **self.extra_args)

    @functools.cached_property
    def counts(self) -> list[bool]:
        """For each of the inner's params whether it is projected by a basis."""
        owners = (self.plans[i] for i, _ in small_leaves(self.plans))
        return [plan is not None and bool(plan.modes) for plan in owners]

    @functools.cached_property
    def remembers(self) -> bool:
        """Whether the state remembers projected params."""
        return remembers_params(self.traced, self.counts)

    def moments(self) -> MomentsOf:
        """Where the moments of each matrix lie in the state."""
        return moments_of(self.roles, self.state, self.params, self.plans)

    def update(
        self, grads: optax.Updates, state: optax.OptState, params: optax.Params | None
    ) -> tuple[optax.Updates, optax.OptState, optax.Params | None]:
        """The inner's update of projected gradients, without its decoupled weight decay.

        Returns:
            The projected updates, the new state, and for each leaf minus the learning rate times
            the decay (None where there is none); None in all if there is no decoupled decay.
        """
        slopes, decay = None, self.inner.decay
        if params is not None and decay is not False:
            found = decoupled_decay(self.traced, check=decay is None)
            if found is not None:
                leaves, tree = jax.tree.flatten(params)
                made = found(jax.tree.leaves(grads), jax.tree.leaves(dequantized(state)), leaves)
                slopes = tree.unflatten([None if s is None else first_element(s) for s in made])
                # Integers have no slope; they decay as `tx` has it.
                params = jax.tree.map(
                    lambda x: jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
                    params,
                )
        try:
            updates, state = self.inner.tx.update(grads, state, params, **self.extra_args)
        except Exception as error:
            if message := self._not_of_init(f" ({checks.reason(error)})"):
                raise ValueError(message) from error
            raise
        self._check_shapes(updates, grads)
        return updates, state, slopes

    @functools.cached_property
    def ascends(self) -> bool:
        """Whether the first update surely goes along the gradient, for params that are zero."""
        traced, n = self.traced, len(self.traced.params)
        if traced.update is None or not traced.same:
            return False
        state = interpret(traced.init, [ZERO] * n, Sign())
        updates, _ = traced.read(Sign(), [NONNEGATIVE] * n, state, [ZERO] * n)
        return any(x == NONNEGATIVE for x, own in zip(updates, self.counts, strict=True) if own)

    def check(self, *, needs_descent: bool) -> None:
        """Refuses what cannot run in a subspace, and warns of what acts differently there."""
        if needs_descent and self.ascends:
            raise ValueError(
                "inner: its steps go along the gradient instead of against it, but recover= takes "
                "them for descents: put the learning rate into inner, as in "
                "optax.chain(inner, optax.scale_by_learning_rate(1e-2)), instead of after galore"
            )
        rule, decay = self.inner.rule, self.inner.decay
        if rule == "keep" and decay is not None:
            return
        traced = self.traced
        if self.inner.moments is None and self.remembers:
            raise ValueError(
                "inner: its state remembers the params, projected into the present subspace, which "
                "mean nothing in the next one; choose with moments= what becomes of them: "
                '"reset" starts again from the present params at every refresh, "keep" leaves them '
                "as they are"
            )
        undecided = decay is None and decoupled_decay(traced) is None
        if undecided and acts_within_subspace(traced, self.counts):
            # What an inner does at params zero means nothing if it remembers others.
            decays = "decoupled_decay=True takes it for decoupled decay, "
            otherwise = "" if self.remembers else decays
            _warn(
                "galore: inner uses params elementwise, and not as decoupled weight decay: this "
                "acts on the projected weights only (weight decay, for instance, does not reach "
                f"the whole matrix); {otherwise}decoupled_decay=False says that it is meant"
            )
        if rule == "keep" or traced.update is None:
            return
        pairs = jax.tree.leaves_with_path(self.state, is_leaf=is_quantized)
        for (path, _), role in zip(pairs, self.roles, strict=True):
            name = jax.tree_util.keystr(path)
            if role.shared:
                raise ValueError(
                    f"inner: its state {name} merges the moments of several params, which cannot "
                    'be told apart when a basis changes; choose moments="keep"'
                )
            if role.unclear and self._of_projected(path, role.param):
                then = "is set to what it was at first" if rule == "reset" else "stays as it is"
                _warn(
                    f"galore: it is not known how the inner's state {name} follows the gradient's "
                    f"coordinates; it {then} when a basis changes; choose with moments= what "
                    "becomes of it"
                )
        if callable(rule):
            check_rule(rule, [leaf for _, leaf in pairs], self.moments(), self.plans)

    def warn_of_masks(self, params: optax.Params) -> None:
        """Warns of leaves whose values the inner would use, but not of what it is given of them.

        A mask that is a function looks at paths and shapes. Those of matrices that are given one by
        one, or whose axes are merged, are not those of the leaf.
        """
        plans = [(i, plan, plan.view) for i, plan in enumerate(self.plans) if plan is not None]
        axes = {i: plan.batch_ndim + len(view.sizes) for i, plan, view in plans}
        others = [(i, plan.path) for i, plan, view in plans if len(view.shape) != axes[i]]
        if not others or self.traced.update is None:
            return
        try:
            whole = uses_params(self._trace(params, None))
        except Exception:  # an inner for matrices only says nothing about a stack
            return
        used = zip(small_leaves(self.plans), uses_params(self.traced), strict=True)
        kept = {i for (i, _), use in used if use}
        if lost := [path for i, path in others if whole and whole[i] and i not in kept]:
            _warn(
                f"galore: inner uses values of params (as in weight decay), but not of {len(lost)} "
                f"leaves when they are projected, the first at {lost[0]}: a mask's function "
                "is given paths and shapes of projected matrices, of a stack one by one unless "
                "inner is elementwise; give it as a tree of booleans instead"
            )

    def _of_projected(self, path: tuple[Any, ...], param: int | None) -> bool:
        """Whether a leaf of the state belongs to a projected param, by its role or else its path.

        The param's path is within it: its end in Adam's state, not if each param has a tuple.
        """
        if param is not None:
            return self.counts[param]
        paths = [path for path, _ in jax.tree.leaves_with_path(self.params)]
        own = [own for own, count in zip(paths, self.counts, strict=True) if count]
        return any(path[i : i + len(p)] == p for p in own for i in range(len(path) - len(p) + 1))


def with_stacks(plans: Plans, call: Callable[[Plans], InnerCall]) -> InnerCall:
    """The call that gives stacks of matrices to the inner as single arrays, if it is elementwise.

    One kernel of a GPU then updates a whole stack. To another inner matrices are separate leaves.
    """
    stacks = [plan is not None and bool(plan.view.batch_axes) for plan in plans]
    if not any(stacks):
        return call(plans)
    together = call(
        [
            dataclasses.replace(plan, together=True) if plan is not None and stack else plan
            for plan, stack in zip(plans, stacks, strict=True)
        ]
    )
    return together if together.elementwise else call(plans)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)
