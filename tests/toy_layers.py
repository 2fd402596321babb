"""A small network of stacked layers, and its training by the ordinary and the layer-wise step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import GaLoreDimensionNumbers
from galore_optax.layerwise.step import Layered, Layerwise

N, B, L, D, F, V = 3, 4, 5, 8, 12, 11
STEPS = 5


def embed(params, batch):
    return params["embedding"][batch["inputs"]]


def layer(layer, x, batch):
    del batch
    x = x + jnp.tanh(x * layer["norm"] @ layer["up"]) @ layer["down"]
    return x + jnp.sin(x @ layer["mix"])


def head(params, x, batch):
    scores = jax.nn.log_softmax(x * params["out"]["norm"] @ params["out"]["head"])
    picked = jnp.take_along_axis(scores, batch["targets"][..., None], -1)
    return -jnp.mean(picked)


def tied_head(params, x, batch):
    scores = jax.nn.log_softmax(x * params["out"]["norm"] @ params["embedding"].T)
    return -jnp.mean(jnp.take_along_axis(scores, batch["targets"][..., None], -1))


MODEL = Layered(embed, layer, head)
TIED = Layered(embed, layer, tied_head)


@functools.cache
def params():
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (V, D),
        "layers": {"norm": (N, D), "up": (N, D, F), "down": (N, F, D), "mix": (N, D, D)},
        "out": {"norm": (D,), "head": (D, V)},
    }
    return jax.tree.map(
        lambda shape: np.float32(0.5) * rng.standard_normal(shape, np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@functools.cache
def batches(steps=STEPS, *lead):
    rng = np.random.default_rng(0)
    return [
        {name: rng.integers(V, size=(*lead, B, L)) for name in ("inputs", "targets")}
        for _ in range(steps)
    ]


def apart(tree):
    """Every layer's leaves as leaves of their own."""
    return {**tree, "layers": [jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(N)]}


def together(tree):
    return {**tree, "layers": jax.tree.map(lambda *x: jnp.stack(x), *tree["layers"])}


def ordinary(tx, *, model=MODEL, unstack=False, batches=None):
    """Losses, and params after every step."""

    def loss(params, batch):
        params = together(params) if unstack else params
        x = model.embed(params, batch)
        for i in range(N):
            x = model.layer(jax.tree.map(lambda w, i=i: w[i], params["layers"]), x, batch)
        return model.head(params, x, batch)

    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step)
    here = apart(params()) if unstack else params()
    state, losses, trajectory = jax.jit(tx.init)(here), [], []
    for batch in batches or globals()["batches"]():
        here, state, value = step(here, state, batch)
        losses.append(value)
        trajectory.append(jax.device_get(here))
    return losses, trajectory, unstack


def by_layers(tx, *, model=MODEL, batches=None, **options):
    optimizer = Layerwise(model, tx, **options)
    here = jax.tree.map(jnp.array, params())  # given away
    state, losses, trajectory, told = jax.jit(optimizer.init)(here), [], [], []
    step = jax.jit(optimizer.step, donate_argnums=(0, 1))
    for batch in batches or globals()["batches"]():
        here, state, metrics = step(here, state, batch)
        losses.append(metrics.loss)
        trajectory.append(jax.device_get(here))
        told.append(metrics)
    return losses, trajectory, told


def assert_equal(got, expected, tolerance=2e-6):
    np.testing.assert_allclose(got[0], expected[0], atol=tolerance)
    for step, (ours, theirs) in enumerate(zip(got[1], expected[1], strict=True)):
        ours = apart(ours) if expected[2] else ours
        for (path, x), y in zip(
            jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
        ):
            np.testing.assert_allclose(x, y, atol=tolerance, err_msg=f"{step} {path}")


MATRIX = GaLoreDimensionNumbers(-2, -1)
NUMBERS = {
    "embedding": None,
    "layers": {"norm": None, "up": MATRIX, "down": MATRIX, "mix": None},
    "out": {"norm": None, "head": None},
}
