"""Low-rank adapters of a model's matrices, by path: LoRA, DoRA, W = A B; GradNormLoRP is one more.

An adapter is a pytree node in a weight's place (`galore_optax.adapters.base`), so adapted params
checkpoint, shard, split into trained and frozen, and merge as any params do. ReLoRA is LoRA with
`galore_optax.adapters.restart`, QLoRA is LoRA over a quantized base.

Google's qwix (0.1.8) has LoRA and QLoRA for Flax. It was tried and is not used: it finds weights by
intercepting products in Flax modules and makes the factors there, which ends in a
TraceContextError inside the `jax.lax.scan` that our layers run in, so the models would have to be
written anew; the state that it adds to the modules breaks the scan over their stacked weights. Of
what is here it would save the class LoRA, 60 lines; it has no DoRA, no merging or restarting, none
of PEFT's format, and its NF4 no double quantization.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from galore_optax.adapters.base import (
    Adapter,
    is_adapter,
    merge,
    new_factors,
    stored,
    wide,
)
from galore_optax.adapters.gradnorm_lorp import column_norms, weight_norm
from galore_optax.keys import for_path
from galore_optax.projection import subspace
from galore_optax.quantization.array import dequantized, is_quantized


def _static(default: float) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


def _scale(rank: int, alpha: float | None) -> float:
    if alpha is None:
        return 1.0
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha}: a positive number is needed, such as the rank")
    return alpha / rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
    """W = W₀ + scale · a b (arXiv:2106.09685, section 4.1).

    Attributes:
        base: W₀, frozen.
        a: The factor at the input.
        b: The factor at the output.
        key: Of the dropout, one for each layer of a stack; without it there is none (see
            `with_dropout_keys`).
        scale: alpha / rank.
        dropout: The share of inputs that the factors do not see.

    Examples:
        >>> import functools, jax, jax.numpy as jnp
        >>> from galore_optax.adapters.lora import LoRA, adapt
        >>> params = {"mlp": {"up": jnp.ones((2, 64, 256))}, "norm": jnp.ones(64)}
        >>> create = functools.partial(LoRA.create, rank=8, alpha=16)
        >>> adapted = adapt(params, create, jax.random.key(0), pattern="mlp")
        >>> adapted["mlp"]["up"].b.shape, adapted["norm"].shape
        ((2, 8, 256), (64,))
    """

    key: Key[Array, "*layers"] | None = None
    scale: float = _static(1.0)
    dropout: float = _static(0.0)

    @classmethod
    def create(
        cls,
        weight: Any,
        key: PRNGKeyArray,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> Self:
        """An adapter of a weight that does not change it yet.

        Args:
            weight: `(*layers, in, out)`, an array or a `QuantizedArray`.
            key: Of the factor at the input; that at the output is zero.
            rank: Of the factors.
            alpha: Numerator of the scale, alpha / rank; the rank by default.
            dropout: The share of inputs that the factors do not see in training.

        Raises:
            ValueError: If the rank does not fit the weight, or a number is out of its range.
        """
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: a share from 0 to below 1 is needed")
        a, b = new_factors(weight, key, rank)
        return cls(weight, a, b, scale=_scale(rank, alpha), dropout=dropout)

    def sum(self) -> Float[Array, "*layers in out"]:
        """W₀ + scale · a b, in float32 at least."""
        return wide(self.base) + self.scale * (wide(self.a) @ wide(self.b))

    def matrix(self) -> Float[Array, "*layers in out"]:
        """The sum, in the dtype of the base."""
        return self.sum().astype(self.base.dtype)

    def times(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """The rows through W₀ and, beside it, through both factors.

        The gradient of W₀'s size that `matrix` has on the way back is never made, and a bfloat16
        sum does not round the correction away.
        """
        kept = rows
        if self.key is not None:
            mask = jax.random.bernoulli(self.key, 1 - self.dropout, rows.shape)
            kept = jnp.where(mask, rows / (1 - self.dropout), 0)
        a, b = (factor.astype(rows.dtype) for factor in (self.a, self.b))
        return rows @ dequantized(self.base).astype(rows.dtype) + self.scale * ((kept @ a) @ b)

    def restarted(self, key: PRNGKeyArray) -> Self:
        """W in the place of W₀, with factors that do not change it yet."""
        new, old = jax.random.split(key)
        base = stored(self.merged(), self.base, old)
        a, b = new_factors(base, new, self.a.shape[-1])
        return dataclasses.replace(self, base=base, a=a, b=b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """W = m ⊙ V / ‖V‖ by columns, V = W₀ + scale · a b (arXiv:2402.09353, equation 5).

    Gradients take ‖V‖ for a constant, as in its section 4.3; `GradNormLoRP` is without that, and
    without scale and dropout.

    Attributes:
        base: W₀, frozen.
        a: The factor at the input.
        b: The factor at the output.
        key: As in `LoRA`, like the next two.
        scale: As there.
        dropout: As there.
        magnitude: m, the norm of each column of W.
    """

    magnitude: Float[Array, "*layers out"] = dataclasses.field(kw_only=True)

    @classmethod
    def create(
        cls,
        weight: Any,
        key: PRNGKeyArray,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> Self:
        """An adapter of a weight that does not change it yet; arguments as for `LoRA.create`."""
        lora = LoRA.create(weight, key, rank, alpha=alpha, dropout=dropout)
        magnitude = column_norms(wide(weight)).astype(lora.b.dtype)
        return cls(**vars(lora), magnitude=magnitude)

    def matrix(self) -> Float[Array, "*layers in out"]:
        """W = m ⊙ V / ‖V‖, in the dtype of the base."""
        return weight_norm(wide(self.magnitude), self.sum()).astype(self.base.dtype)

    def times(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """LoRA's product, each column scaled."""
        norms = jax.lax.stop_gradient(column_norms(self.sum()))
        return super().times(rows) * (wide(self.magnitude) / norms).astype(rows.dtype)

    def restarted(self, key: PRNGKeyArray) -> Self:
        """W in the place of W₀, with an adapter that does not change it yet."""
        new = super().restarted(key)
        magnitude = column_norms(wide(new.base)).astype(new.b.dtype)
        return dataclasses.replace(new, magnitude=magnitude)


@functools.partial(jax.jit, static_argnames="rank")
def _leading_directions(
    w: Float[Array, "*layers in out"], key: PRNGKeyArray, rank: int
) -> Float[Array, "*layers in r"]:
    """Orthonormal columns that hold most of each matrix's energy."""
    start = jnp.eye(w.shape[-2], rank, dtype=w.dtype)

    def of_one(pair: tuple[Array, Array]) -> Array:
        return subspace.refreshed(subspace.randomized, pair[0], start, pair[1])[0]

    # One matrix at a time, as factorizations of a batch can deadlock on a CPU.
    matrices = w.reshape(-1, *w.shape[-2:])
    found = jax.lax.map(of_one, (matrices, jax.random.split(key, len(matrices))))
    return found.reshape(*w.shape[:-1], rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Adapter):
    """W = a b, with nothing frozen beside it: the low-rank baseline of GaLore's table 2.

    Attributes:
        base: None.
        a: The factor at the input.
        b: The factor at the output.
    """

    @classmethod
    def create(cls, weight: Any, key: PRNGKeyArray, rank: int) -> Self:
        """A weight's projection onto `rank` of its leading directions, found by random sketches.

        The weight itself is given up: a random one keeps as much of its size as the rank allows, a
        trained one is compressed.

        Args:
            weight: `(*layers, in, out)`, an array or a `QuantizedArray`.
            key: Of the sketch.
            rank: Of the factors.

        Raises:
            ValueError: If the rank does not fit the weight.
        """
        jax.eval_shape(lambda: new_factors(weight, key, rank))  # for its checks
        w = wide(weight)
        a = _leading_directions(w, key, rank)
        b = a.mT @ w
        return cls(None, *(factor.astype(weight.dtype) for factor in (a, b)))

    def matrix(self) -> Float[Array, "*layers in out"]:
        """W = a b."""
        return self.a @ self.b

    def times(self, rows: Float[Array, "N in"]) -> Float[Array, "N out"]:
        """The rows through one factor, then the other."""
        return (rows @ self.a.astype(rows.dtype)) @ self.b.astype(rows.dtype)

    def restarted(self, key: PRNGKeyArray) -> Self:
        """Itself: there is nothing to merge into."""
        return self


def adapt(
    params: PyTree,
    create: Callable[[Any, PRNGKeyArray], Adapter],
    key: PRNGKeyArray,
    *,
    pattern: str = "",
) -> PyTree:
    """A model's params with adapters in the place of some of its matrices.

    Args:
        params: A model's params: the matrices that can be adapted are stacked over its layers,
            `(layers, in, out)`; nothing else in our models has three axes.
        create: From a weight and a key to its adapter, such as
            `functools.partial(LoRA.create, rank=8)`.
        key: Of the factors; paths are folded in.
        pattern: A regular expression, searched for in the path of each of these matrices, such as
            "attention|mlp/up" in "layers/mlp/up". All of them by default.

    Raises:
        ValueError: If no matrix's path has the pattern, or one cannot be adapted.
    """
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_quantized)
    matrices = [_name(path) for path, x in leaves if x.ndim == 3]
    chosen = {name for name in matrices if re.search(pattern, name)}
    if not chosen:
        raise ValueError(
            f"pattern={pattern!r} is found in the path of no matrix that can be adapted; these are "
            + (", ".join(matrices) or "none: adapters take stacks (layers, in, out)")
        )

    def one(path: Any, x: Any) -> Any:
        return create(x, for_path(key, path)) if _name(path) in chosen else x

    return jax.tree.map_with_path(one, params, is_leaf=is_quantized)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def with_dropout_keys(params: PyTree, key: PRNGKeyArray) -> PyTree:
    """Params whose LoRA adapters drop inputs, as they do in a training step and nowhere else.

    Args:
        params: Trained and frozen params in one tree.
        key: Of the step; paths and layers are told apart.
    """

    def one(path: Any, x: Any) -> Any:
        if not (isinstance(x, LoRA) and x.dropout > 0):
            return x
        return dataclasses.replace(x, key=jax.random.split(for_path(key, path), x.a.shape[:-2]))

    return jax.tree.map_with_path(one, params, is_leaf=is_adapter)


def logical_axes(params: PyTree) -> PyTree:
    """`models.llama.config.logical_axes` of params with adapters in them.

    Of a weight (layer, in, out) the factors are (layer, in, None) and (layer, None, out).
    """

    def one(x: Any, axes: tuple[str | None, ...]) -> Any:
        if not is_adapter(x):
            return axes
        *layers, rows, columns = axes
        parts = {
            "base": axes,
            "a": (*layers, rows, None),
            "b": (*layers, None, columns),
            "magnitude": (*layers, columns),
        }
        present = {f.name for f in dataclasses.fields(x) if getattr(x, f.name) is not None}
        return dataclasses.replace(x, **{n: a for n, a in parts.items() if n in present})

    from models.llama import config as llama_config

    plain = llama_config.logical_axes(jax.eval_shape(merge, params))
    return jax.tree.map(one, params, plain, is_leaf=lambda x: is_adapter(x) or is_quantized(x))
