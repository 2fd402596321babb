"""The layer-wise step: the ordinary step's numbers, with one layer's gradient alive at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import GaLoreDimensionNumbers, galore, galore_adafactor
from galore_optax.layerwise import Layered, Layerwise

N, B, L, D, F, V = 3, 4, 5, 8, 12, 11
STEPS = 5
# Compiling takes nearly all of the time.
FAST = {"xla_backend_optimization_level": 0}


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
def params(seed=0):
    shapes = {
        "embedding": (V, D),
        "layers": {"norm": (N, D), "up": (N, D, F), "down": (N, F, D), "mix": (N, D, D)},
        "out": {"norm": (D,), "head": (D, V)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [0.5 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
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

    step = jax.jit(step, compiler_options=FAST)
    here = apart(params()) if unstack else params()
    state, losses, trajectory = tx.init(here), [], []
    for batch in batches or globals()["batches"]():
        here, state, value = step(here, state, batch)
        losses.append(value)
        trajectory.append(together(here) if unstack else here)
    return losses, trajectory


def by_layers(tx, *, model=MODEL, batches=None, **options):
    optimizer = Layerwise(model, tx, **options)
    here = jax.tree.map(jnp.array, params())  # given away
    state, losses, trajectory, told = optimizer.init(here), [], [], []
    step = jax.jit(optimizer.step, donate_argnums=(0, 1), compiler_options=FAST)
    for batch in batches or globals()["batches"]():
        here, state, metrics = step(here, state, batch)
        losses.append(metrics.loss)
        trajectory.append(jax.device_get(here))
        told.append(metrics)
    return losses, trajectory, told


def assert_equal(got, expected, tolerance=2e-6):
    np.testing.assert_allclose(got[0], expected[0], atol=tolerance)
    for step, (ours, theirs) in enumerate(zip(got[1], expected[1], strict=True)):
        for (path, x), y in zip(
            jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
        ):
            np.testing.assert_allclose(x, y, atol=tolerance, err_msg=f"{step} {path}")


INNERS = {
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=2, momentum=0.9),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(0.001),
}


@pytest.mark.parametrize("name", INNERS)
def test_it_equals_the_ordinary_step(name):
    assert_equal(by_layers(INNERS[name]), ordinary(INNERS[name], unstack=True))


MATRICES = {
    "embedding": None,
    "layers": {
        "norm": None,
        **dict.fromkeys(("up", "down", "mix"), GaLoreDimensionNumbers(-2, -1)),
    },
    "out": {"norm": None, "head": GaLoreDimensionNumbers(-2, -1)},
}
LAYERS_ONLY = MATRICES | {"out": {"norm": None, "head": None}}
GALORE = {
    "adam": dict(inner=INNERS["adam"]),
    "adamw on both sides, reset": dict(inner=INNERS["adamw"], side="both", moments="reset"),
    "momentum, power": dict(inner=INNERS["momentum"], subspace="power"),
    "lion, a schedule of ranks": dict(inner=INNERS["lion"], rank_schedule=lambda step: 0.5),
    "adam, staggered": dict(
        inner=INNERS["adam"], stagger=True, weight_dimension_numbers=LAYERS_ONLY, update_proj_gap=4
    ),
}


@pytest.mark.parametrize("name", GALORE)
def test_galore_draws_and_refreshes_as_it_does_for_the_whole_stack(name):
    options = dict(update_proj_gap=2, weight_dimension_numbers=MATRICES) | GALORE[name]
    tx = galore(3, **options)
    assert_equal(by_layers(tx), ordinary(tx), 1e-5)


def test_galore_with_adafactor_keeps_its_statistics_by_matrix():
    # Norms, too, are a leaf for each layer.
    tx = galore_adafactor(
        0.01, 3, momentum=0.9, update_proj_gap=2, subspace="svd",
        weight_dimension_numbers=lambda p: jax.tree.map(
            lambda x: GaLoreDimensionNumbers() if x.shape in [(D, F), (F, D), (D, D)] else None, p
        ),
    )  # fmt: skip
    assert_equal(by_layers(tx), ordinary(tx, unstack=True), 1e-5)


def clipped(tx):
    return optax.chain(optax.clip_by_global_norm(0.3), tx)


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_clipping_by_the_global_norm_is_exact(model):
    tx = optax.sgd(0.1, momentum=0.9)
    got = by_layers(tx, model=model, clip_norm=0.3)
    assert float(got[2][0].grad_norm) > 0.3
    assert_equal(got, ordinary(clipped(tx), model=model))


def test_clipping_by_the_previous_norm_takes_the_first_steps_own():
    free = by_layers(optax.sgd(0.1))
    one = by_layers(optax.sgd(0.1), clip_norm=0.3, clip="previous")
    exact = by_layers(optax.sgd(0.1), clip_norm=0.3)
    norms = [float(told.grad_norm) for told in one[2]]
    assert norms[0] == pytest.approx(float(exact[2][0].grad_norm), rel=1e-6)
    before, (first, second, *_) = params(), one[1]

    def moved(a, b):
        return float(optax.tree.norm(optax.tree.sub(a, b)))

    assert min(norms[:2]) > 0.3
    assert moved(first, before) == pytest.approx(0.1 * 0.3, rel=1e-4)
    assert moved(second, first) == pytest.approx(0.1 * 0.3 * norms[1] / norms[0], rel=1e-4)
    assert moved(free[1][0], before) == pytest.approx(0.1 * norms[0], rel=1e-4)


def test_microbatches_are_summed_layer_by_layer():
    tx = galore(3, optax.adam(0.01), update_proj_gap=2, weight_dimension_numbers=MATRICES)
    cut = batches(STEPS, 2)
    whole = [{k: x.reshape(-1, L) for k, x in batch.items()} for batch in cut]
    half = Layered(embed, layer, lambda *args: head(*args) / 2)
    got = by_layers(tx, model=half, accumulate=2, clip_norm=1.0, batches=cut)
    assert_equal(
        got, ordinary(optax.chain(optax.clip_by_global_norm(1.0), tx), batches=whole), 1e-5
    )
