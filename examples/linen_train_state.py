"""GaLore in Flax Linen: `TrainState` takes it like any other optax transformation.

After `pip install -e '.[test]'` run `python examples/linen_train_state.py`. It prints a falling
loss.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.training.train_state import TrainState

from galore_optax import galore_adamw


class Network(nn.Module):
    """Two layers for a regression from 16 to 8 numbers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, 16)` to `(batch, 8)`."""
        return nn.Dense(8)(nn.relu(nn.Dense(64)(x)))


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    """Returns the state after one update, and the loss before it."""

    def loss_fn(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> list[float]:
    """Learns a random linear map; returns the losses that it prints."""
    x = jax.random.normal(jax.random.key(0), (256, 16))
    y = x @ jax.random.normal(jax.random.key(1), (16, 8)) / 4
    model = Network()
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(2), x)["params"],
        tx=galore_adamw(1e-2, rank=4, update_proj_gap=20, scale=1.0),
    )
    losses = []
    for step in range(101):
        state, loss = train_step(state, x, y)
        if step % 20 == 0:
            losses.append(float(loss))
            print(f"step {step:3d}  loss {loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
