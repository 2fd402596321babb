"""Microbatches summed in the subspace: what accumulating whole gradients gives, in less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_layers import (
    MODEL,
    NUMBERS,
    STEPS,
    apart,
    assert_equal,
    batches,
    by_layers,
    params,
    together,
)

from galore_optax import (
    Adaptive,
    GaLoreDimensionNumbers,
    Staggered,
    galore,
    galore_adafactor,
    gradnorm_lorp_adamw,
    q_galore_adamw8bit,
    quantize_weights,
)
from galore_optax.layerwise.microbatches import over_microbatches, over_microbatches_in_subspace
from galore_optax.layerwise.step import Layerwise
from galore_optax.transformation import subspace_parts
from train.step.mesh import make_mesh
from train.step.ordinary import summed_loss, train_step_in_subspace
from train.step.state import TrainState

MICROBATCHES = 3
STACKED = GaLoreDimensionNumbers(-2, -1)


def tree(rng, *lead):
    shapes = {"wide": (12, 20), "tall": (20, 6), "stack": (2, 8, 10), "norm": (7,)}
    return {k: rng.standard_normal((*lead, *s)).astype(np.float32) for k, s in shapes.items()}


NUMBERS_OF = {"wide": STACKED, "tall": STACKED, "stack": STACKED, "norm": None}
TXS = {
    "adamw, decayed": partial(galore, 3, optax.adamw(0.01, weight_decay=0.1)),
    "both sides": partial(galore, 3, optax.adam(0.01), side="both"),
    "reset, svd": partial(galore, 3, optax.adam(0.01), moments="reset", subspace="svd"),
    "staggered, adaptive": partial(
        galore, 3, optax.adam(0.01), update_proj_gap=Adaptive(Staggered(200), window=1)
    ),
    "adafactor": partial(galore_adafactor, 0.01, 3, momentum=0.9),
    "q-galore": partial(q_galore_adamw8bit, 0.01, 3),
}


def made(name):
    return TXS[name](update_proj_gap=2, weight_dimension_numbers=NUMBERS_OF)


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        # Of codes and of the last bits of sums in another order.
        tolerance = 1 if x.dtype == jnp.uint8 else 2e-5
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=2e-4, atol=tolerance
        )


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x == "both sides")) for x in TXS]
)
def test_sums_in_the_subspace_are_projections_of_the_sum(name):
    """Several steps: refreshed by the first microbatch, then `update` with whole gradients."""
    tx, rng = made(name), np.random.default_rng(0)
    weights = tree(rng)
    state = reference = tx.init(weights)

    @jax.jit
    def summed(state, gradients):
        total, state, kept = over_microbatches_in_subspace(
            subspace_parts(tx), state, weights, lambda g: (g, g["norm"]), gradients
        )
        return *subspace_parts(tx).update_projected(total, state, weights), kept

    @jax.jit
    def whole(state, gradients):
        state = subspace_parts(tx).refresh(jax.tree.map(lambda g: g[0], gradients), state, weights)
        return tx.update(jax.tree.map(partial(jnp.sum, axis=0), gradients), state, weights)

    for step in range(5):
        gradients = tree(rng, MICROBATCHES)
        updates, state, kept = summed(state, gradients)
        expected, reference = whole(reference, gradients)
        close(updates, expected)
        np.testing.assert_array_equal(kept, gradients["norm"])
        assert state.count == step + 1
        np.testing.assert_array_equal(state.refreshes, reference.refreshes)
        np.testing.assert_array_equal(state.next_refresh, reference.next_refresh)


@pytest.mark.parametrize("name", ["adamw, decayed", "q-galore"])
def test_the_three_parts_are_the_update(name):
    tx, rng = made(name), np.random.default_rng(0)
    weights = quantize_weights(tree(rng), {**dict.fromkeys(NUMBERS_OF, True), "norm": False})
    state = reference = tx.init(weights)
    for _ in range(3):
        gradient = tree(rng)
        expected, reference = tx.update(gradient, reference, weights)
        state = subspace_parts(tx).refresh(gradient, state, weights)
        updates, state = subspace_parts(tx).update_projected(
            subspace_parts(tx).project(gradient, state), state, weights
        )
        jax.tree.map(np.testing.assert_array_equal, (updates, state), (expected, reference))


def test_a_refresh_waits_for_the_first_microbatch_that_can_make_it():
    tx = galore(2, optax.sgd(1.0), subspace="svd", scale=1.0)
    gradient = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
    weights = {"w": jnp.zeros((6, 8))}
    several = {"w": np.concatenate([np.zeros((1, 6, 8), np.float32), gradient])}
    total, state, _ = over_microbatches_in_subspace(
        subspace_parts(tx), tx.init(weights), weights, lambda g: (g, ()), several
    )
    basis = np.linalg.svd(gradient[0])[0][:, :2]
    np.testing.assert_allclose(np.abs(basis.T @ state.bases["w"]), np.eye(2), atol=1e-5)
    close(total["w"], state.bases["w"].T @ gradient.sum(0))


def test_every_recipe_can_be_updated_in_parts_and_what_is_around_it_cannot():
    assert subspace_parts(gradnorm_lorp_adamw(0.01, 2)) is not None
    init, update = galore(2, optax.sgd(1.0))
    assert callable(init)
    assert callable(update)
    chained = optax.chain(optax.clip_by_global_norm(1.0), galore(2, optax.sgd(1.0)))
    with pytest.raises(ValueError, match=r"accumulate_in_subspace=True with tx=.*galore\(\.\.\.\)"):
        Layerwise(MODEL, chained, accumulate_in_subspace=True)
    with pytest.raises(ValueError, match=r'accumulate_in_subspace=True with clip="exact"'):
        Layerwise(MODEL, galore(2, optax.sgd(1.0)), clip_norm=1.0, accumulate_in_subspace=True)


def by_hand(tx, cut):
    """Losses and params of the ordinary step, whose layers are leaves of their own."""
    here = apart(params())
    state = jax.jit(tx.init)(here)

    def loss(params, batch):
        stacked = together(params)
        x = MODEL.embed(stacked, batch)
        for own in params["layers"]:
            x = MODEL.layer(own, x, batch)
        return MODEL.head(stacked, x, batch) / 2

    @jax.jit
    def step(here, state, batch):
        losses, gradients = jax.vmap(jax.value_and_grad(loss), (None, 0))(here, batch)
        state = subspace_parts(tx).refresh(jax.tree.map(lambda g: g[0], gradients), state, here)
        gradient = jax.tree.map(partial(jnp.sum, axis=0), gradients)
        updates, state = tx.update(gradient, state, here)
        return optax.apply_updates(here, updates), state, jnp.sum(losses)

    value, trajectory = [], []
    for batch in cut:
        here, state, one = step(here, state, batch)
        value.append(one)
        trajectory.append(jax.device_get(here))
    return value, trajectory, True


HALF = MODEL._replace(head=lambda *args: MODEL.head(*args) / 2)


def test_layer_by_layer_too():
    unstacked = {**NUMBERS, "layers": [NUMBERS["layers"]] * 3}

    def recipe(numbers):
        # No random numbers: those of leaves of other paths are others.
        return galore(
            3, optax.adamw(0.01, weight_decay=0.1), update_proj_gap=2, subspace="svd",
            weight_dimension_numbers=numbers,
        )  # fmt: skip

    cut = batches(STEPS, 2)
    got = by_layers(
        recipe(NUMBERS), model=HALF, accumulate=2, accumulate_in_subspace=True, batches=cut
    )
    assert_equal(got, by_hand(recipe(unstacked), cut), 2e-5)


def test_the_first_step_by_layers_is_clipped_by_no_less_than_its_norm():
    cut = batches(1, 2)
    tx = galore(3, optax.sgd(0.1), update_proj_gap=2, weight_dimension_numbers=NUMBERS)
    run = partial(by_layers, tx, model=HALF, accumulate=2, batches=cut)
    _, trajectory, told = run(accumulate_in_subspace=True, clip_norm=0.3, clip="previous")
    own = float(run()[2][0].grad_norm)
    moved = float(optax.tree.norm(optax.tree.sub(trajectory[0]["out"], params()["out"])))
    unclipped = run(accumulate_in_subspace=True)
    free = float(optax.tree.norm(optax.tree.sub(unclipped[1][0]["out"], params()["out"])))
    # Of the bound, between the norm and twice it, the update says what it was.
    assert own <= 0.3 * free / moved <= np.sqrt(2) * own
    assert float(told[0].grad_norm) <= own


def trainer(forward, tx, clip_norm, accumulate):
    schedule = optax.constant_schedule(0.1)
    parts, mesh = subspace_parts(tx), make_mesh(None)
    return partial(
        train_step_in_subspace,
        partial(summed_loss, forward),
        parts,
        clip_norm,
        schedule,
        accumulate,
        False,
        mesh,
    )


def test_the_trainers_step_clips_by_what_is_summed_and_skips_what_is_not_finite():
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((6, 8)).astype(np.float32)}
    tx = galore(2, optax.sgd(0.1), update_proj_gap=2, scale=1.0)

    def forward(params, batch):
        return params["w"][batch["inputs"]], jnp.eye(8)

    batch = {name: rng.integers(6, size=(4, 5)).astype(np.int32) for name in ("inputs", "targets")}
    batch["weights"] = np.ones((4, 5), np.float32)
    whole = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(0.01), tx), 2**31 - 1)
    state = TrainState(weights, whole.init(weights), jnp.int32(0), jax.random.key(0))
    step = jax.jit(trainer(forward, tx, 0.01, 2))
    after, metrics = step(state, batch)
    moved = optax.tree.norm(optax.tree.sub(after.params, weights))
    assert float(metrics["grad_norm"]) > 0.01
    assert float(moved) == pytest.approx(0.1 * 0.01, rel=1e-4)
    own = after.optimizer.inner_state[1]
    assert (own.count, own.refreshes) == (1, 1)

    bad = {**batch, "weights": np.where(np.arange(4)[:, None] == 3, np.nan, batch["weights"])}
    skipped, metrics = step(after, bad)
    np.testing.assert_array_equal(skipped.params["w"], after.params["w"])
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    assert skipped.optimizer.inner_state[1].count == 1
    _, metrics = step(skipped, batch)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)


def test_the_sum_takes_the_subspaces_share_of_the_memory():
    count, rows, columns, rank, microbatches = 3, 256, 512, 16, 4
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    weights = {str(i): shape((rows, columns)) for i in range(count)}
    tx = galore(rank, optax.adam(0.01), subspace="random")

    def loss(params, x):
        return sum(jnp.sum(jnp.sin(x @ w)) for w in params.values())

    def temporaries(step):
        state = jax.eval_shape(tx.init, weights)
        jitted = jax.jit(step, donate_argnums=(0, 1))
        lowered = jitted.lower(weights, state, shape((microbatches, 64, rows)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    def gradient_of(params):
        return lambda x: (jax.grad(loss)(params, x), ())

    def whole(params, state, batches):
        gradient, _ = over_microbatches(gradient_of(params), batches)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def in_subspace(params, state, batches):
        small, state, _ = over_microbatches_in_subspace(
            subspace_parts(tx), state, params, gradient_of(params), batches
        )
        updates, state = subspace_parts(tx).update_projected(small, state, params)
        return optax.apply_updates(params, updates), state

    saved = count * rows * columns * 4 * (1 - rank / rows)
    assert temporaries(whole) - temporaries(in_subspace) > 0.9 * saved
