"""LoRA and DoRA, and dropout, which encoders have, too.

ReLoRA is LoRA with `galore_optax.restart`, QLoRA is LoRA of a quantized base.

Google's qwix (0.1.8) does not work in our `jax.lax.scan` over layers: it creates factors within the
products of Flax modules, which raises a TraceContextError, and its state breaks stacked weights.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from galore_optax import checks
from galore_optax.adapters.base import Adapter, is_adapter, multiply, wide
from galore_optax.adapters.gradnorm_lorp import column_norms, weight_norm
from galore_optax.keys import for_path
from galore_optax.quantization.array import dequantized
from galore_optax.quantization.codes import elements, random_bits
from galore_optax.serialization import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
    """W = W₀ + scale · a b (arXiv:2106.09685, section 4.1), an `Adapter` with three more fields.

    `dropout` is the share of the factors' inputs that is dropped if there is a `key`, one for each
    layer of a stack (see `with_dropout_keys`).

    Examples:
        >>> import functools, jax, jax.numpy as jnp
        >>> from galore_optax import LoRA, adapt
        >>> params = {"mlp": {"up": jnp.ones((2, 64, 256))}, "norm": jnp.ones(64)}
        >>> create = functools.partial(LoRA.create, rank=8, alpha=16)
        >>> adapted = adapt(params, create, jax.random.key(0), pattern="mlp")
        >>> adapted["mlp"]["up"].b.shape, adapted["norm"].shape
        ((2, 8, 256), (64,))
    """

    key: Key[Array, "*layers"] | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @classmethod
    def create(
        cls, weight: Any, key: Array, rank: int, *, alpha: float | None = None, dropout: float = 0.0
    ) -> Self:
        """Returns an adapter of a weight, as `Adapter.create`, with the scale alpha / rank.

        `alpha` is the rank by default. ValueError if it or `dropout` is out of its range.
        """
        for name, value in (("rank", rank), ("alpha", alpha), ("dropout", dropout)):
            checks.static(value, name)
        dropout = checks.number(dropout, "dropout", least=0, below=1, such_as=0.1)
        if alpha is not None:
            alpha = checks.number(alpha, "alpha", positive=True, such_as=rank)
        parts = cls.new_parts(weight, key, rank)
        return cls(weight, **parts, scale=1.0 if alpha is None else alpha / rank, dropout=dropout)

    def sum(self) -> Float[Array, "*layers in out"]:
        """Returns W₀ + scale · a b, in float32 or wider."""
        return wide(self.base) + self.scale * (wide(self.a) @ wide(self.b))

    def matrix(self) -> Float[Array, "*layers in out"]:
        """Returns `sum` in the dtype of the base."""
        return self.sum().astype(self.base.dtype)

    def times(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """Returns rows W₀ + scale · (rows a) b.

        Unlike a product with `matrix`, it has no gradient of W₀'s size, and a sum in bfloat16 does
        not round the correction away.
        """
        kept = dropout(rows, self.dropout, self.key)
        product = multiply(rows, dequantized(self.base))
        return product + self.scale * multiply(multiply(kept, self.a), self.b)


def dropout(x: Float[Array, "*A"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*A"]:
    """Returns x with a share of `rate` set to 0 and the rest scaled up; as it is without a key."""
    if key is None or rate == 0:
        return x
    # A tenth of the time of `jax.random.bernoulli` on a CPU.
    kept = random_bits(key, elements(x.shape)) >= np.uint32(rate * 2**32)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


@pytree
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """W = m ⊙ V / ‖V‖ by columns, V = W₀ + scale · a b (arXiv:2402.09353, equation 5).

    ‖V‖ has no gradient, as in its section 4.3; in `GradNormLoRP` it has one.
    """

    magnitude: Float[Array, "*layers out"] = dataclasses.field(kw_only=True)

    @classmethod
    def new_parts(cls, weight: Any, key: PRNGKeyArray, rank: int) -> dict[str, Array]:
        """Returns new factors and the norms of the weight's columns."""
        parts = super().new_parts(weight, key, rank)
        return parts | {"magnitude": column_norms(wide(weight)).astype(parts["b"].dtype)}

    def matrix(self) -> Float[Array, "*layers in out"]:
        """Returns m ⊙ V / ‖V‖, in the dtype of the base."""
        v = self.sum()
        return weight_norm(wide(self.magnitude), v, self._norms(v)).astype(self.base.dtype)

    def times(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """Returns LoRA's product with each column scaled."""
        factors = wide(self.magnitude) / self._norms(self.sum())
        return super().times(rows) * factors.astype(rows.dtype)[None]

    def _norms(self, v: Float[Array, "*layers in out"]) -> Float[Array, "*layers out"]:
        return jax.lax.stop_gradient(column_norms(v))


def with_dropout_keys(params: PyTree, key: PRNGKeyArray) -> PyTree:
    """Returns params whose LoRA adapters drop inputs, by a key for each path and layer."""

    def one(path: Any, x: Any) -> Any:
        if not (isinstance(x, LoRA) and x.dropout > 0):
            return x
        return dataclasses.replace(x, key=jax.random.split(for_path(key, path), x.a.shape[:-2]))

    return jax.tree.map_with_path(one, params, is_leaf=is_adapter)
