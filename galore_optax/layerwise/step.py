"""Backward pass and update in one: a training step that stores one layer's gradient at a time.

A layer's gradient can be used, and freed, as soon as the backward pass has computed it (LOMO,
arXiv:2306.09782, section 3.1; GaLore, arXiv:2403.03507, section 4.3). The stacked layers and their
states are in the carry of one loop, from the last layer to the first, and overwritten in place.
"""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from galore_optax import checks
from galore_optax.layerwise.backward import Backward, Batch, Layered, Params, at, forward, squares
from galore_optax.layerwise.layers import Layers, changing_leaves
from galore_optax.layerwise.parts import PartUpdate, masked, matrices_of, of_one_layer
from galore_optax.ordering import after, codes_after
from galore_optax.quantization.array import dequantized
from galore_optax.sharding import sum_of_all
from galore_optax.trace.dependence import coupled_leaves
from galore_optax.transformation import subspace_parts

CLIPS = ("exact", "previous")


class LayerwiseState(NamedTuple):
    """State of a layer-wise optimizer."""

    count: ArrayLike  # steps done so far, an int32 scalar
    norm: Float[Array, ""]  # global norm of the last finite gradient; 0 before there is one
    layers: optax.OptState  # the transformation's state for one layer, stacked over the layers
    rest: dict[str, optax.OptState]  # its state for every other entry of the params, by key


class Metrics(NamedTuple):
    """Metrics of a step."""

    loss: Float[Array, ""]  # the sum of the microbatches' losses
    grad_norm: Float[Array, ""]  # global norm before clipping; not finite if the gradient is not
    finite: Bool[Array, ""]  # whether everything was updated


def _apply_updates(part: Params, updates: optax.Updates, *_: Any) -> Params:
    return optax.apply_updates(part, updates)  # pyrefly: ignore[bad-return]


@dataclasses.dataclass(frozen=True)
class Layerwise:
    """A training step that updates each layer as soon as the backward pass has its gradient.

    `tx`, with its learning rate, may be any transformation that updates each leaf from that leaf's
    gradient alone. It sees one layer's leaves, `(in, out)` of a stack `(layers, in, out)`, so give
    dimension numbers, masks and labels for those (axes counted from the end fit both), and gets the
    extra argument `value`, the loss. A transformation with a random key in its state draws the same
    numbers for each layer; `galore` does not.

    Up to rounding, the result equals the ordinary step's if there each layer's leaves are separate.
    If something is decided per leaf (which arrays are quantized, Adafactor's clipping), use
    `galore_optax.unstacked` there; of these, `galore` needs it for quantization alone.

    A loss or gradient that is not finite (or whose sum of squares overflows float32) is never
    applied. With `clip="exact"` it is known before anything changes, and the whole step is skipped,
    as by `optax.apply_if_finite`. Otherwise parts from the first such gradient on are not updated;
    parts nearer to the loss have been, and stay one update ahead, also in their schedules.

    If `tx` has a `sum_over`, call `step` within `jax.shard_map` (`check_vma=False`): each device
    gives its rows of a batch and its summand of the loss, and gets the update of the sum.
    Microbatches are then summed as with `accumulate_in_subspace`.

    Attributes:
        clip_norm: Gradients are scaled down to this global norm; None leaves them.
        clip: The norm that is compared with it: "exact" (an extra backward pass computes it first)
            or "previous" (the previous step's; the first step computes its own).
        accumulate: Microbatches per step; with more than one, every leaf of a batch has a first
            axis of them. Losses and gradients, in float32, are summed layer by layer, after the
            forward passes of all.
        accumulate_in_subspace: Whether the layers' gradients are summed projected; tx must be
            `galore` or a recipe of it. A layer's new basis is found from the first microbatch, and
            the norm for clipping and metrics is the projected sum's (for the first step's clipping
            an upper bound of it).
        checkpoint: Whether the backward pass recomputes a layer's activations (checkpointing).
        apply_updates: From a part of the params, its updates, the steps done so far and the layer
            (None for other parts) to the new part.
        factored: Whether `apply_updates` takes updates that are factors (`SubspaceParts`), as
            `galore_optax.apply_updates` does.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import Layered, Layerwise, galore
        >>> model = Layered(
        ...     embed=lambda params, batch: batch,
        ...     layer=lambda layer, x, batch: x + jnp.tanh(x @ layer["w"]),
        ...     head=lambda params, x, batch: jnp.mean((x @ params["out"]) ** 2),
        ... )
        >>> params = {"layers": {"w": jnp.ones((4, 16, 16))}, "out": jnp.ones((16, 1))}
        >>> optimizer = Layerwise(model, galore(4, optax.adamw(1e-2)), clip_norm=1.0)
        >>> step = jax.jit(optimizer.step, donate_argnums=(0, 1))
        >>> params, state, metrics = step(params, optimizer.init(params), jnp.ones((8, 16)))
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
    apply_updates: Callable[..., Any] = _apply_updates
    factored: bool = False

    def __post_init__(self):
        checks.choice(self.clip, "clip", tuple(CLIPS))
        if self.clip_norm is not None:
            checks.number(self.clip_norm, "clip_norm", positive=True, such_as=1.0)
        checks.whole(self.accumulate, "accumulate")
        for name in ("accumulate_in_subspace", "checkpoint", "factored"):
            checks.choice(getattr(self, name), name, (False, True))
        checks.instance(self.model, "model", Layered)
        checks.instance(self.tx, "tx", optax.GradientTransformation)
        checks.function(self.apply_updates, "apply_updates")
        if self.factored and self.apply_updates is _apply_updates:
            raise ValueError(
                "factored=True: optax.apply_updates takes arrays only; give an apply_updates that "
                "calls galore_optax.apply_updates, or leave factored out"
            )
        parts = subspace_parts(self.tx)
        if self.accumulate_in_subspace and (parts is None or parts.needs_gradient):
            lacks = "no subspace" if parts is None else "its way back needs whole gradients"
            said = f"accumulate_in_subspace=True with tx={checks.said(self.tx)}: {lacks}"
            raise ValueError(f'{said}; give galore(...) with recover="project", or a recipe of it')
        if self._projected and self._exact:
            what = f"sum_over={self._sum_over}" if self._sum_over else "accumulate_in_subspace=True"
            said = f'{what} with clip="exact": that norm is not known before'
            raise ValueError(f'{said} the new bases are; choose clip="previous", or clip_norm=None')

    def init(self, params: Params) -> LayerwiseState:
        """Returns the initial state; ValueError if tx needs all gradients at once."""
        key = self.model.layers
        stack, rest, layers = self.model.split(params)
        one = of_one_layer(params, key)
        # The transformation's warnings come from here: a part may lack what the whole has.
        tx = optax.with_extra_args_support(self.tx)
        extra_args = {"layer": jnp.int32(0), "layers": layers, "value": jnp.float32(0)}
        coupled = coupled_leaves(tx, one, self._sum_over, **extra_args)
        if coupled is not None:
            raise ValueError(
                f"tx: its update of {coupled[0]} depends on the gradient of {coupled[1]}, as that "
                "of optax.clip_by_global_norm and optax.apply_if_finite does, but a layer-wise "
                "step never has all gradients at once: take it out of tx (clip_norm= clips by the "
                "global norm, and what is not finite is not applied anyway)"
            )
        others = masked(one)

        def of_part(part: Params) -> optax.OptState:
            return self.tx.init({**others, **dequantized(part)})

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of_layers = jax.vmap(lambda own: of_part({key: own}))(stack)
            of_rest = {k: of_part({k: part}) for k, part in rest.items()}
        return LayerwiseState(
            jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), of_layers, of_rest
        )

    def step(
        self, params: Params, state: LayerwiseState, batch: Batch
    ) -> tuple[Params, LayerwiseState, Metrics]:
        """Returns params and state after one update, and metrics; jit it with both donated."""
        stack, rest, layers = self.model.split(params)
        batches = batch if self.accumulate > 1 else jax.tree.map(lambda x: x[None], batch)
        backward = forward(self.model, params, batches, checkpoint=self.checkpoint)
        norm = self._norm(backward, stack, state.norm)
        if norm is not None:  # quantized weights are dequantized for one pass, then for the other
            weights = codes_after(norm, backward.weights)
            backward = dataclasses.replace(backward, weights=weights)
        # The loss's cotangent is scaled, and with it all gradients, without a pass over them.
        factor = jnp.float32(1)
        if norm is not None and self.clip_norm is not None:
            factor = jnp.minimum(1.0, self.clip_norm / norm)
        loss, from_head, cotangent = backward.head(factor)
        loss = sum_of_all(loss, self._sum_over)
        others, count = masked(params), jnp.asarray(state.count)
        common = count, loss, matrices_of(self.tx, params, self.model.layers, layers)
        update = PartUpdate(
            self.tx, self.apply_updates, self.factored, others, *common, self._sum_over
        )
        ok = jnp.isfinite(loss) if norm is None else jnp.isfinite(loss) & jnp.isfinite(norm)
        early = {k: from_head[k] for k in backward.early}
        own = (rest, state.rest)
        new_rest, rest_states, total, ok = self._rest(update, *own, early, jnp.float32(0), ok)
        # The layers wait for these updates, so that the head's gradients are freed first.
        top = after((new_rest, cotangent), jnp.int32(layers - 1))
        stacks, key = (stack, state.layers), self.model.layers
        changes = changing_leaves(update, stacks, key, layers)
        own = Layers(update, key, layers, self._projected, changes)
        carry = stacks, own.as_it_is(*at(stacks, top)), cotangent, total, ok
        turn = partial(self._turn, backward, own)
        stacks, last, cotangent, total, ok = jax.lax.fori_loop(0, layers, turn, carry)
        new_stack, layer_states = own.written(stacks, 0, last)

        late = backward.embed(cotangent, from_head)
        late_rest, late_states, total, ok = self._rest(update, rest, state.rest, late, total, ok)

        grad_norm = norm if self._exact and norm is not None else jnp.sqrt(total) / factor
        finite_norm = jnp.where(jnp.isfinite(grad_norm), grad_norm, state.norm)
        count, rest_states = optax.safe_increment(state.count), rest_states | late_states
        new_state = LayerwiseState(count, finite_norm, layer_states, rest_states)
        new_params = {**new_rest, **late_rest, self.model.layers: new_stack}
        return new_params, new_state, Metrics(loss, grad_norm, ok)

    @property
    def _exact(self) -> bool:
        return self.clip_norm is not None and self.clip == "exact"

    @property
    def _sum_over(self) -> tuple[str, ...]:
        """Mesh axes along which each device has a summand of the gradients."""
        parts = subspace_parts(self.tx)
        return () if parts is None else parts.sum_over

    @property
    def _projected(self) -> bool:
        """Whether gradients are summed projected, over microbatches or devices."""
        return self.accumulate_in_subspace or bool(self._sum_over)

    def _norm(self, backward: Backward, stack: Any, previous: Array) -> Array | None:
        """Returns the global norm to clip by, infinite if the last hidden states are not finite."""
        if self.clip_norm is None:
            return None
        if self._exact:
            needed, other = jnp.isfinite(squares(backward.last)), jnp.float32(jnp.inf)
        else:
            needed, other = previous == 0, previous
        # In a conditional, across which XLA shares nothing: otherwise this backward pass and the
        # one that updates share, and so keep, arrays as large as the head's gradient.
        summed = not self._projected
        norm = jax.lax.cond(needed, lambda: backward.norm(stack, summed=summed), lambda: other)
        # The sum of the devices' norms is an upper bound of their sum's.
        return jnp.where(needed, sum_of_all(norm, self._sum_over), other)

    def _rest(
        self,
        update: PartUpdate,
        rest: Params,
        states: dict[str, Any],
        gradients: Params,
        total: Array,
        ok: Array,
    ) -> tuple[Params, dict[str, Any], Array, Array]:
        """Updates the entries of `rest` that have gradients; also returns what `_judged` does."""
        if self._sum_over:
            gradients, states = update.shared(rest, states, gradients, ok)
        total, ok = self._judged(total, ok, gradients)
        return *update.each(rest, states, gradients, ok), total, ok

    def _judged(self, total: Array, ok: Array, gradient: Params) -> tuple[Array, Array]:
        """Adds a gradient's squares to their sum; returns it, and whether it is still finite."""
        if self._exact:  # already known, and a part need not wait for its whole gradient
            return total, ok
        total += squares(gradient)
        return total, ok & jnp.isfinite(total)

    def _turn(self, backward: Backward, layers: Layers, turns: Array, carry: Any) -> Any:
        """Computes one layer's gradient and update."""
        stacks, above, cotangent, total, ok = carry
        i = layers.count - 1 - turns
        # A layer is written at the beginning of the next turn, before anything is read. If one turn
        # reads a stack and then writes it, XLA copies it in every turn (measured with 16 layers,
        # 86 MiB of params: Adam takes 237 MiB of temporaries then, 25 MiB here).
        stacks = layers.written(stacks, jnp.minimum(i + 1, layers.count - 1), above)
        own, state = at(stacks, i)
        if layers.projected:
            over = partial(layers.summed, own, state, i)
            gradient, state, cotangent = backward.layer(own, i, cotangent, over)
            gradient = sum_of_all(gradient, self._sum_over)
        else:
            gradient, cotangent = backward.layer(own, i, cotangent)
        total, ok = self._judged(total, ok, gradient)
        return stacks, layers.updated(own, state, gradient, i, ok), cotangent, total, ok
