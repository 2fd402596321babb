"""Backward pass and update in one: a training step that holds one layer's gradient at a time.

A gradient is as large as the weights. In a model of repeated layers that of a layer can be used,
and forgotten, as soon as the backward pass has made it (LOMO, arXiv:2306.09782, section 3.1;
GaLore, arXiv:2403.03507, section 4.3). The stacked layers, their weights and optimizer states, stay
in the carry of one loop, from the last layer to the first, and are overwritten where they are.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from galore_optax.layerwise.backward import (
    Backward,
    Batch,
    Layered,
    Params,
    at,
    forward,
    squares,
    written,
)
from galore_optax.layerwise.microbatches import over_microbatches_in_subspace
from galore_optax.ordering import after, codes_after
from galore_optax.quantization.array import dequantized
from galore_optax.trace.coupling import coupled_leaves
from galore_optax.transformation import subspace_parts

CLIPS = ("exact", "previous")


class LayerwiseState(NamedTuple):
    """State of a layer-wise optimizer.

    Attributes:
        count: Steps done so far.
        norm: Global norm of the last gradient that was finite; 0 before there is one.
        layers: The transformation's state for one layer, stacked over the layers.
        rest: Its state for every other entry of the params, by key.
    """

    count: ArrayLike  # int32 scalar
    norm: Float[Array, ""]
    layers: optax.OptState
    rest: dict[str, optax.OptState]


class Metrics(NamedTuple):
    """What a step tells.

    Attributes:
        loss: The sum of the microbatches' losses.
        grad_norm: Global norm of the gradient before clipping; not finite where that is not.
        finite: Whether everything was updated.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    finite: Bool[Array, ""]


ApplyUpdates = Callable[[Params, optax.Updates, Array, Array | None], Params]
"""From a part of the params, its updates, the steps done so far and the layer (None where it is not
one) to the new part."""


def _apply_updates(
    part: Params, updates: optax.Updates, count: Array, layer: Array | None
) -> Params:
    del count, layer
    return optax.apply_updates(part, updates)  # pyrefly: ignore[bad-return]


@dataclasses.dataclass(frozen=True)
class Layerwise:
    """A training step that updates each layer as soon as the backward pass has its gradient.

    Any transformation will do that updates every leaf from that leaf's gradient. Its `init` is
    mapped over the layers, so that it sees one layer's leaves, `(in, out)` of a stack `(layers, in,
    out)`: dimension numbers, masks and labels are to be given for those (an axis counted from the
    end fits both). Its update gets the extra argument `value`, the loss, and for a layer `layer`
    and `layers`, which of how many. With random numbers of its own, from a key in its state, it
    draws the same ones in each layer; `galore` does not.

    The result is that of the ordinary step, to rounding, where each layer's leaves are leaves of
    their own there: to what runs inside `galore` its matrices are, and `galore_optax.layerwise.unstacked`
    makes them so for what does anything by leaf (8 bits from a size on, Adafactor's clipping).

    A loss or gradient that is not finite is never applied. With `clip="exact"` it is known before
    anything is changed, and the whole step is left out, as `optax.apply_if_finite` does. Else it is
    found as the backward pass goes on: from the first gradient on that is not finite nothing is
    updated, but what lies nearer to the loss has been, and is an update ahead from then on, its
    learning rate schedule too. (What counts is the sum of squares, in float32: it is not finite
    either where an element is beyond 1e19.)

    Attributes:
        model: The model.
        tx: The transformation, with its learning rate in it.
        clip_norm: Gradients are scaled down to this global norm; None leaves them.
        clip: By which norm: "exact" (a backward pass before, which finds it) or "previous" (that of
            the step before; the first step's is its own).
        accumulate: Where it is more than one, every leaf of a batch has a first axis of so many
            microbatches. Their losses, and gradients in float32, are summed, layer by layer, so
            that one layer's gradient is all that there is of them; what is kept for the backward
            pass is kept of all microbatches.
        accumulate_in_subspace: Whether the layers' gradients are summed projected
            (`galore_optax.transformation`), which takes `galore`, or a recipe of it, as tx. A layer's
            new basis is found from its first microbatch then, and "the gradient" whose norm is
            clipped by, and told, is what is summed; the first step is clipped by a bound on its
            own.
        checkpoint: Whether a layer is computed again in the backward pass, from the hidden states
            before it; else all that its backward pass needs is kept, of every layer.
        apply_updates: From a part of the params, its updates, the steps done so far and the layer
            (None for other entries) to the new part.

    Raises:
        ValueError: If an argument is out of range, at construction.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import galore
        >>> from galore_optax.layerwise.step import Layered, Layerwise
        >>> model = Layered(
        ...     embed=lambda params, batch: batch["x"] @ params["into"],
        ...     layer=lambda layer, x, batch: x + jnp.tanh(x @ layer["w"]),
        ...     head=lambda params, x, batch: jnp.mean((x @ params["out"] - batch["y"]) ** 2),
        ... )
        >>> params = {
        ...     "into": jnp.ones((3, 16)),
        ...     "layers": {"w": jnp.ones((4, 16, 16))},
        ...     "out": jnp.ones((16, 1)),
        ... }
        >>> optimizer = Layerwise(model, galore(4, optax.adamw(1e-2)), clip_norm=1.0)
        >>> state = optimizer.init(params)
        >>> step = jax.jit(optimizer.step, donate_argnums=(0, 1))
        >>> batch = {"x": jnp.ones((8, 3)), "y": jnp.ones((8, 1))}
        >>> params, state, metrics = step(params, state, batch)
        >>> bool(metrics.finite), state.layers.bases["layers"]["w"].shape
        (True, (4, 16, 4))
    """

    model: Layered
    tx: optax.GradientTransformation
    clip_norm: float | None = None
    clip: str = "exact"
    accumulate: int = 1
    accumulate_in_subspace: bool = False
    checkpoint: bool = True
    apply_updates: ApplyUpdates = _apply_updates

    def __post_init__(self):
        if self.clip not in CLIPS:
            raise ValueError(f"clip={self.clip!r} is unknown; choose one of {', '.join(CLIPS)}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(
                f"clip_norm={self.clip_norm} is no positive number; None clips nothing"
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate={self.accumulate}: expected at least 1 microbatch")
        if not self.accumulate_in_subspace:
            return
        if subspace_parts(self.tx) is None:
            raise ValueError(
                f"accumulate_in_subspace=True with tx={self.tx!r}, which has no subspace: give "
                "galore(...), or a recipe such as galore_adamw(...), as it is (what is to act on "
                "projected gradients goes into galore's inner), or leave accumulate_in_subspace out"
            )
        if self._exact:
            raise ValueError(
                'accumulate_in_subspace=True with clip="exact": the norm of what is summed is not '
                'known before the new bases are; choose clip="previous", or clip_norm=None'
            )

    def init(self, params: Params) -> LayerwiseState:
        """The state of params.

        Raises:
            ValueError: If the transformation needs all gradients at once, or the layers of the
                params are not stacked.
        """
        key = self.model.layers
        stack, rest, layers = self.model.split(params)
        one = jax.eval_shape(lambda p: dequantized({**p, key: at(p[key], 0)}), params)
        # This warns of what there is to be warned of: a part may lack what the whole has.
        tx = optax.with_extra_args_support(self.tx)
        coupled = coupled_leaves(tx, one, layer=jnp.int32(0), layers=layers, value=jnp.float32(0))
        if coupled is not None:
            raise ValueError(
                f"tx: its update of {coupled[0]} depends on the gradient of {coupled[1]}, as that "
                "of optax.clip_by_global_norm and optax.apply_if_finite does, and a layer-wise "
                "step never has all gradients at once: take it out of tx (clip_norm= clips by the "
                "global norm, and what is not finite is not applied anyway)"
            )
        nothing = absent(one)

        def of_part(part: Params) -> optax.OptState:
            return self.tx.init({**nothing, **dequantized(part)})

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LayerwiseState(
                count=jnp.zeros((), jnp.int32),
                norm=jnp.zeros((), jnp.float32),
                layers=jax.vmap(lambda own: of_part({key: own}))(stack),
                rest={k: of_part({k: part}) for k, part in rest.items()},
            )

    def step(
        self, params: Params, state: LayerwiseState, batch: Batch
    ) -> tuple[Params, LayerwiseState, Metrics]:
        """One update; to be compiled with params and state donated.

        Args:
            params: The params.
            state: The state.
            batch: What the model's functions take, with a first axis of microbatches where there
                are several.

        Returns:
            The new params and state, and metrics.
        """
        key = self.model.layers
        stack, rest, layers = self.model.split(params)
        batches = batch if self.accumulate > 1 else jax.tree.map(lambda x: x[None], batch)
        backward = forward(self.model, params, batches, checkpoint=self.checkpoint)
        clip_at = self._norm(backward, stack, state.norm)
        if clip_at is not None:  # quantized weights are dequantized for one pass, then the other
            backward = dataclasses.replace(backward, weights=codes_after(clip_at, backward.weights))
        loss, from_head, cotangent = backward.head()
        nothing = absent(jax.eval_shape(dequantized, params))
        update = functools.partial(self._update, nothing, jnp.asarray(state.count), clip_at, loss)

        ok = jnp.isfinite(loss) if clip_at is None else jnp.isfinite(loss) & jnp.isfinite(clip_at)
        early = {k: from_head[k] for k in backward.early}
        total, ok = self._judged(jnp.zeros((), jnp.float32), ok, early)
        new_rest, rest_states = _update_rest(update, rest, state.rest, early, ok)
        # The layers come when that is done, and its gradients are gone.
        top = after((new_rest, cotangent), jnp.int32(layers - 1))
        stacks = stack, state.layers
        carry = stacks, at(stacks, top), cotangent, total, ok
        turn = functools.partial(self._turn, backward, update, nothing, layers)
        stacks, above, cotangent, total, ok = jax.lax.fori_loop(0, layers, turn, carry)
        new_stack, layer_states = written(stacks, 0, above)

        late = backward.embed(cotangent, from_head)
        total, ok = self._judged(total, ok, late)
        late_rest, late_states = _update_rest(update, rest, state.rest, late, ok)

        grad_norm = clip_at if self._exact and clip_at is not None else jnp.sqrt(total)
        new_state = LayerwiseState(
            count=optax.safe_increment(state.count),
            norm=jnp.where(jnp.isfinite(grad_norm), grad_norm, state.norm),
            layers=layer_states,
            rest=rest_states | late_states,
        )
        return {**new_rest, **late_rest, key: new_stack}, new_state, Metrics(loss, grad_norm, ok)

    @property
    def _exact(self) -> bool:
        return self.clip_norm is not None and self.clip == "exact"

    def _norm(self, backward: Backward, stack: Any, previous: Array) -> Array | None:
        """The global norm to clip by; infinite where the gradient's is."""
        if self.clip_norm is None:
            return None
        if self._exact:
            wanted, other = jnp.isfinite(squares(backward.last)), jnp.float32(jnp.inf)
        else:
            wanted, other = previous == 0, previous
        # In a branch, since elsewhere XLA shares what this backward pass has in common with the one
        # that updates, and so keeps arrays as large as the head's gradient.
        summed = not self.accumulate_in_subspace
        return jax.lax.cond(wanted, lambda: backward.norm(stack, summed=summed), lambda: other)

    def _judged(self, total: Array, ok: Array, gradient: Params) -> tuple[Array, Array]:
        """The sum of squares with a gradient's, and whether all is still finite."""
        if self._exact:  # it is known, so that a part of a gradient may be used before the rest
            return total, ok
        total += squares(gradient)
        return total, ok & jnp.isfinite(total)

    def _turn(
        self,
        backward: Backward,
        update: Callable[..., tuple[Params, optax.OptState, optax.Updates]],
        nothing: Params,
        layers: int,
        turns: Array,
        carry: Any,
    ) -> Any:
        """One layer's backward pass and update."""
        stacks, above, cotangent, total, ok = carry
        key, i = self.model.layers, layers - 1 - turns
        # A layer is written at the beginning of the next turn, before anything is read: where one
        # turn both reads and writes, XLA copies the whole stacks, in every turn.
        stacks = written(stacks, jnp.minimum(i + 1, layers - 1), above)
        own, own_state = at(stacks, i)
        place = {"layer": i, "layers": layers}
        if self.accumulate_in_subspace:
            over = functools.partial(self._in_subspace, nothing, {key: own}, own_state, place)
            gradient, own_state, cotangent = backward.layer(own, i, cotangent, over)
        else:
            gradient, cotangent = backward.layer(own, i, cotangent)
        total, ok = self._judged(total, ok, gradient)
        part, new_state, _ = update({key: own}, own_state, gradient, **place)
        chosen = functools.partial(jnp.where, ok)
        above = jax.tree.map(chosen, (part[key], new_state), (own, own_state))
        return stacks, above, cotangent, total, ok

    def _in_subspace(
        self,
        nothing: Params,
        part: Params,
        state: optax.OptState,
        place: dict[str, Any],
        pull: Callable[..., tuple[Params, Any]],
        *batches: Any,
    ) -> tuple[Params, optax.OptState, Any]:
        """As `over_microbatches`, of a layer's gradients in the subspace, with the new state."""
        parts = subspace_parts(self.tx)
        assert parts is not None

        def whole(*batch: Any) -> tuple[Params, Any]:
            gradient, kept = pull(*batch)
            return {**nothing, **gradient}, kept

        params = {**nothing, **dequantized(part)}
        summed, state, kept = over_microbatches_in_subspace(
            parts, state, params, whole, *batches, **place
        )
        return {k: summed[k] for k in part}, state, kept  # pyrefly: ignore[bad-index]

    def _update(
        self,
        nothing: Params,
        count: Array,
        clip_at: Array | None,
        loss: Array,
        part: Params,
        state: optax.OptState,
        gradient: Params,
        **layer: Any,
    ) -> tuple[Params, optax.OptState, optax.Updates]:
        """A part of the params and its state, updated, and by what."""
        if clip_at is not None and self.clip_norm is not None:
            gradient = _clipped(gradient, clip_at, self.clip_norm)
        update = optax.with_extra_args_support(self.tx).update
        if layer and self.accumulate_in_subspace:
            update = subspace_parts(self.tx).update_projected
        updates, new_state = update(
            {**nothing, **gradient},
            state,
            {**nothing, **dequantized(part)},
            value=loss,
            **layer,
        )
        updates = {k: updates[k] for k in part}  # pyrefly: ignore[bad-index]
        return self.apply_updates(part, updates, count, layer.get("layer")), new_state, updates


def _update_rest(
    update: Callable[..., tuple[Params, optax.OptState, optax.Updates]],
    rest: Params,
    states: dict[str, optax.OptState],
    gradients: Params,
    ok: Array,
) -> tuple[Params, dict[str, optax.OptState]]:
    """Those entries of the params, and their states, that have gradients, updated where `ok`."""
    new, new_states = {}, {}
    for k, gradient in gradients.items():
        # A loop of one turn or none, so that what XLA copies for an update it copies here, and not
        # at the beginning of the step. The updates take the gradient's place.
        def once(_: Array, own: tuple[Params, Any, Params]) -> tuple[Params, Any, Params]:
            part, state, updates = update(*own)
            like = own[2]
            return part, state, jax.tree.map(lambda u, g: u.astype(g.dtype), updates, like)

        own = {k: rest[k]}, states[k], {k: gradient}
        part, new_states[k], _ = jax.lax.fori_loop(0, ok.astype(jnp.int32), once, own)
        new |= part
    return new, new_states


def _clipped(gradient: Params, norm: Array, at: float) -> Params:
    # As optax.clip_by_global_norm rounds it.
    return jax.tree.map(lambda g: jnp.where(norm < at, g, g / norm.astype(g.dtype) * at), gradient)


def absent(params: Params) -> Params:
    """The params as `optax.masked` shows them where no leaf is meant, for a part to be put in."""
    return jax.tree.map(lambda _: optax.MaskedNode(), params)
