"""GaLore in Equinox: the arrays of the module are the params; optax sees None for everything else.

After `pip install -e '.[test]'` run `python examples/equinox_module.py`. It prints a falling loss.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from galore_optax import GaLoreDimensionNumbers, galore

# Equinox stores the weight of a layer as (out, in).
TX = galore(
    rank=4,
    inner=optax.adamw(1e-2),
    update_proj_gap=20,
    scale=1.0,
    weight_dimension_numbers=GaLoreDimensionNumbers(reduction_axis=1, output_axis=0),
)


@eqx.filter_jit
def train_step(
    model: eqx.nn.MLP, state: optax.OptState, x: jax.Array, y: jax.Array
) -> tuple[eqx.nn.MLP, optax.OptState, jax.Array]:
    """Returns the model and the state after one update, and the loss before it."""

    def loss_fn(model):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    updates, state = TX.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def main() -> list[float]:
    """Learns a random linear map; returns the losses that it prints."""
    x = jax.random.normal(jax.random.key(0), (256, 16))
    y = x @ jax.random.normal(jax.random.key(1), (16, 8)) / 4
    model = eqx.nn.MLP(16, 8, width_size=64, depth=1, key=jax.random.key(2))
    state = TX.init(eqx.filter(model, eqx.is_inexact_array))
    losses = []
    for step in range(101):
        model, state, loss = train_step(model, state, x, y)
        if step % 20 == 0:
            losses.append(float(loss))
            print(f"step {step:3d}  loss {loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
