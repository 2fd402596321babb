"""GaLore's update of a weight as its factors: scale · P N and the decay, not added up yet.

A GPU adds the product to weights of 8 or 16 bits while it makes it (`quantization.product_added`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from galore_optax.lowering import on_one_gpu
from galore_optax.ordering import after_on_cpu
from galore_optax.projection.leaf import Bases, Plans, Projection
from galore_optax.quantization.array import dequantized
from galore_optax.quantization.product_added import Factors, add_product, fits_sum
from galore_optax.quantization.weights import rounded_sum


@dataclasses.dataclass(frozen=True)
class FactoredUpdate:
    """The update of one leaf, scale · P N + slope · W.

    Attributes:
        projection: How the leaf is projected.
        bases: P.
        small: scale · N, as `Projection.into` gives it.
        weights: W, dequantized (the gradient, if params are not given); a program that does not
            use it does not make it.
        slope: Minus the learning rate times the decay: one number or, for a stack, one for each
            matrix; None for no decay.
    """

    projection: Projection
    bases: Bases
    small: Any
    weights: Float[Array, "*shape"]
    slope: Any

    def whole(self, previous: Any = ()) -> Float[Array, "*shape"]:
        """The update as an array, made after the `previous` one."""
        small = after_on_cpu(previous, self.small)  # one product after the other
        update = self.projection.out_of(self.bases, small, self.weights)
        return with_decay(update, self.projection, self.weights, self.slope)

    def added_to(
        self, param: Any, seed: UInt32[Array, "2"] | None, leaf: int, previous: Any
    ) -> Any:
        """The new param, as `quantization.weights.rounded_sum` makes it of the whole update."""
        factors = self._factors()
        if factors is None or not fits_sum(param, factors, seed):
            return rounded_sum(param, self.whole(previous), seed, leaf)

        def in_kernel(param: Any, seed: Any) -> Any:
            return add_product(param, factors, seed, leaf=leaf)

        def in_memory(param: Any, seed: Any) -> Any:  # not on one GPU
            return rounded_sum(param, self.whole(previous), seed, leaf, in_kernel=False)

        return on_one_gpu(in_kernel, in_memory, param, seed)

    def _factors(self) -> Factors | None:
        """The factors of a matrix or a stack of matrices; None of what is none in memory."""
        view = self.projection.view
        if len(self.bases) != 1 or not view.in_order:
            return None
        small, slopes = self.projection.stacked(self.small), _slopes(self.slope, jnp.float32)
        slopes = None if slopes is None else slopes.astype(jnp.float32)
        basis = dequantized(self.bases[0]).astype(small.dtype)
        if self.projection.modes == (0,):
            return Factors(basis, small, slopes, transposed=False)
        return Factors(small, basis, slopes, transposed=True)


def project_back(
    steps: Sequence[Any],
    bases: Sequence[Bases],
    scale: Any,
    plans: Plans,
    weights: Sequence[Array],
    slopes: Sequence[Any],
    *,
    factored: bool,
) -> list[Any]:
    """Each leaf's update with its decay; of a projected leaf scale · P N, perhaps `factored`."""
    made, previous = [], ()
    for n, basis, plan, weight, slope in zip(steps, bases, plans, weights, slopes, strict=True):
        if plan is None:
            made.append(with_decay(n, plan, weight, slope))
            continue
        scaled = jax.tree.map(lambda x: scale * x, n)
        update = FactoredUpdate(plan, basis, scaled, weight, slope)
        previous = update if factored else update.whole(previous)
        made.append(previous)
    return made


def as_arrays(updates: Sequence[Any]) -> list[Any]:
    """Updates as arrays, those that are factored made one after the other."""
    made, previous = [], ()
    for x in updates:
        if isinstance(x, FactoredUpdate):
            x = previous = x.whole(previous)
        made.append(x)
    return made


def with_decay(
    update: Float[Array, "*shape"],
    plan: Projection | None,
    weights: Float[Array, "*shape"],
    slope: Any,
) -> Float[Array, "*shape"]:
    """An update plus slope · W; `slope` is None, one number, or one for each matrix of a stack."""
    slopes = _slopes(slope, weights.dtype)
    if slopes is None:
        return update
    batch = () if plan is None or plan.together else plan.view.batch_axes
    each = slopes.reshape([n if i in batch else 1 for i, n in enumerate(weights.shape)])
    return update + (each * weights).astype(update.dtype)


def _slopes(slope: Any, dtype: Any) -> Float[Array, " k"] | None:
    """Numbers as one array, zeros of that dtype where there is none; None if all are missing."""
    slopes = jax.tree.leaves(slope, is_leaf=lambda x: x is None)
    if all(s is None for s in slopes):
        return None
    return jnp.stack([jnp.zeros([], dtype) if s is None else s for s in slopes])
