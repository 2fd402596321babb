"""GaLore in Flax NNX: `nnx.Optimizer` takes it like any other optax transformation.

After `pip install -e '.[test]'` run `python examples/nnx_optimizer.py`. It prints a falling loss.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from galore_optax import galore


class Network(nnx.Module):
    """Two layers for a regression from 16 to 8 numbers."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(16, 64, rngs=rngs)
        self.output = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, 16)` to `(batch, 8)`."""
        return self.output(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Updates the model in place; returns the loss before the update."""
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def main() -> list[float]:
    """Learns a random linear map; returns the losses that it prints."""
    x = jax.random.normal(jax.random.key(0), (256, 16))
    y = x @ jax.random.normal(jax.random.key(1), (16, 8)) / 4
    model = Network(nnx.Rngs(0))
    # AdamW sees kernels projected to rank 4, and biases as they are.
    tx = galore(rank=4, inner=optax.adamw(1e-2), update_proj_gap=20, scale=1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = []
    for step in range(101):
        loss = train_step(model, optimizer, x, y)
        if step % 20 == 0:
            losses.append(float(loss))
            print(f"step {step:3d}  loss {loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
