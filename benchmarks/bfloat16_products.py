"""Trains on a CPU with linear layers whose products have bfloat16 arguments and float32 sums.

    python -m benchmarks.bfloat16_products train.finetune --task mrpc --init DIR ...

Weights, activations, attention and the optimizer stay float32, as with PyTorch's
`set_float32_matmul_precision("medium")`. An x86 CPU with AMX makes such products 5 to 8 times as
fast, but XLA lets it do so only where both matrices are stored by rows: it widens the others, and
those whose product is bfloat16, to float32.
"""

import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from galore_optax.adapters import base, lora, low_rank


@jax.custom_vjp
def multiply(rows: Float[Array, "N in"], matrix: Float[Array, "in out"]) -> Float[Array, "N out"]:
    """Returns `rows @ matrix` in the rows' dtype, of arguments rounded to bfloat16."""
    return _forward(rows, matrix)[0]


def _forward(rows: Array, matrix: Array) -> tuple[Array, Any]:
    # Kept: the backward pass would compute the rows again column by column, which takes longer.
    narrow = checkpoint_name(rows.astype(jnp.bfloat16), "product")
    factors = narrow, matrix.astype(jnp.bfloat16)
    return _product(*factors).astype(rows.dtype), (*factors, jnp.zeros((), matrix.dtype))


def _backward(kept: Any, cotangent: Array) -> tuple[Array, Array]:
    rows, matrix, like = kept
    narrow = cotangent.astype(jnp.bfloat16)
    of_rows = _product(narrow, matrix.T).astype(cotangent.dtype)
    return of_rows, _product(rows.T, narrow).astype(like.dtype)


multiply.defvjp(_forward, _backward)


def _product(a: Array, b: Array) -> Array:
    """Returns a b in float32, of matrices that are stored by rows."""
    by_rows = Layout((0, 1))
    a, b = (with_layout_constraint(x, by_rows) for x in (a, b))
    return with_layout_constraint(jnp.matmul(a, b, preferred_element_type=jnp.float32), by_rows)


def main() -> None:
    """Runs the program that the first word names with the other words."""
    if len(sys.argv) < 2:
        raise SystemExit("name a program: python -m benchmarks.bfloat16_products train.finetune")
    if (backend := jax.default_backend()) != "cpu":
        raise SystemExit(f"these products are for a CPU, and JAX runs on {backend}")
    for module in (base, lora, low_rank):
        module.multiply = multiply
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
