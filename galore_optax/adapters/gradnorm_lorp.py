"""GradNormLoRP (arXiv:2412.19616): weight-normalised low-rank training of a weight.

    V = W₀ + a b        W₀ frozen, a (in, rank) and b (rank, out) trained
    W = m ⊙ V / ‖V‖     ‖V‖ of each output's column; m, one magnitude for each column, trained

With ∇W the gradient of the loss with respect to W, and V̂ = V / ‖V‖,

    ∇m = Σ ∇W ⊙ V̂ (down each column)     ∇V = (m / ‖V‖) (∇W - V̂ ∇m)
    ∇a = ∇V bᵀ                           ∇b = aᵀ ∇V

and the gradients of a and b go through GaLore, at a rank below the adapter's. The paper's abstract
states that the weight matrix is normalised, that low-rank approximations are applied to the weight
and to the gradient matrices, and that inference costs nothing more. The rest is a reconstruction,
not the published code, which differs from the paper: norms by columns, a trained magnitude, which
gradients are projected and to what rank, and restarts as in ReLoRA (arXiv:2307.05695).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax.adapters.base import Adapter, wide
from galore_optax.serialization import pytree


def column_norms(v: Float[Array, "*layers in out"]) -> Float[Array, "*layers out"]:
    """Returns ‖V‖ of each column as √(Σv² + 1e-12), which is differentiable at zero columns."""
    # Far below the squared norm of any column that matters, far above float32's least number.
    return jnp.sqrt(jnp.sum(v * v, axis=-2) + 1e-12)


def weight_norm(
    magnitude: Float[Array, "*layers out"],
    v: Float[Array, "*layers in out"],
    norms: Float[Array, "*layers out"],
) -> Float[Array, "*layers in out"]:
    """Returns m ⊙ V / ‖V‖, with one magnitude for each column."""
    return (magnitude / norms)[..., None, :] * v


@pytree
@dataclasses.dataclass(frozen=True)
class GradNormLoRP(Adapter):
    """A frozen weight, and the factors and magnitudes that are trained instead.

    Computed in float32 or wider for any dtype of the weight. A zero column starts with a magnitude
    of 1e-6, at which its factors have the gradient of a plain weight. For ∇m and ∇V see Salimans
    and Kingma, `Weight normalization <https://arxiv.org/abs/1602.07868>`_, 2016, equation 3.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from galore_optax import GradNormLoRP, join, merge, product, split
        >>> w = jax.random.normal(jax.random.key(0), (64, 32))
        >>> params = {"w": GradNormLoRP.create(w, jax.random.key(1), rank=8)}
        >>> trained, frozen = split(params)
        >>> x = jnp.ones((5, 64))
        >>> loss = lambda trained: jnp.mean(product(x, join(trained, frozen)["w"]) ** 2)
        >>> merge(params)["w"].shape, jax.grad(loss)(trained)["w"].b.shape
        ((64, 32), (8, 32))
    """

    magnitude: Float[Array, "*layers out"]  # m, the norm of each column of W

    @classmethod
    def new_parts(cls, weight: Any, key: PRNGKeyArray, rank: int) -> dict[str, Array]:
        """Returns new factors and the norms of the weight's columns."""
        parts = super().new_parts(weight, key, rank)
        return parts | {"magnitude": column_norms(wide(weight)).astype(parts["b"].dtype)}

    def matrix(self) -> Float[Array, "*layers in out"]:
        """Returns m ⊙ V / ‖V‖, in the dtype of the base."""
        v = wide(self.base) + wide(self.a) @ wide(self.b)
        return weight_norm(wide(self.magnitude), v, column_norms(v)).astype(self.base.dtype)
