"""The training step: its loss, its gradient, accumulation, and what is not finite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore
from train.step import loss as loss_module
from train.step import skipping
from train.step.loss import summed_cross_entropy
from train.step.mesh import make_mesh, put_batch, replicated
from train.step.ordinary import loss_and_gradient, summed_loss, train_step
from train.step.state import TrainState

B, L, V, D = 8, 6, 12, 5


def gradient_of(forward, *rest):
    return loss_and_gradient(partial(summed_loss, forward), *rest)


def forward(params, batch):
    return jnp.tanh(params["embedding"][batch["inputs"]]), params["head"]


@pytest.fixture
def params():
    k1, k2 = jax.random.split(jax.random.key(0))
    return {
        "embedding": jax.random.normal(k1, (V, D)),
        "head": jax.random.normal(k2, (V, D)),
    }


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "inputs": rng.integers(V, size=(B, L)).astype(np.int32),
        "targets": rng.integers(V, size=(B, L)).astype(np.int32),
        # Rows with very different numbers of targets: a mean of microbatch means would be wrong.
        "weights": (rng.random((B, L)) < np.linspace(0.05, 1, B)[:, None]).astype(np.float32),
    }


@pytest.mark.parametrize("length", [6, 128, 130, 67])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("ids", [None, 4, 12])  # in a part of the vocabulary
def test_cross_entropy_and_its_gradient_equal_float64(length, dtype, ids, monkeypatch):
    monkeypatch.setattr(loss_module, "IDS", ids)
    k1, k2, k3, k4 = jax.random.split(jax.random.key(0), 4)
    hidden = (5 * jax.random.normal(k1, (B, length, D))).astype(dtype)
    head = (3 * jax.random.normal(k2, (V, D))).astype(dtype)
    targets = jax.random.randint(k3, (B, length), 0, V)
    weights = jax.nn.relu(jax.random.normal(k4, (B, length)))

    def function(h, w):
        return summed_cross_entropy(h, w, targets, weights, ids is not None)

    loss, pull = jax.vjp(function, hidden, head)
    h, w = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    p = np.exp(h @ w.T - (h @ w.T).max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    one_hot, s = np.eye(V)[targets], np.asarray(weights)
    expected = -(s * np.log((p * one_hot).sum(-1))).sum()
    gradient = (p - one_hot) * s[..., None]
    # Float32 rounding of logits up to 50; bfloat16 keeps 8 bits of each logit's gradient.
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(
        summed_cross_entropy(hidden, head, targets, weights), loss, rtol=1e-6
    )
    for found, wanted in zip(
        pull(jnp.float32(2)),
        (2 * gradient @ w, 2 * np.einsum("blv,bld->vd", gradient, h)),
        strict=True,
    ):
        assert found.dtype == dtype
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance * scale)


def test_no_array_as_large_as_all_logits_is_kept():
    shape = jax.ShapeDtypeStruct
    lowered = jax.jit(jax.grad(summed_cross_entropy, argnums=(0, 1))).lower(
        shape((4, 1024, 8), jnp.float32),
        shape((4096, 8), jnp.float32),
        shape((4, 1024), jnp.int32),
        shape((4, 1024), jnp.float32),
    )
    # 16 chunks; two arrays of a chunk's logits at once.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * 1024 * 4096 * 4 / 4


def test_the_loss_is_the_mean_over_targets_that_count(params, batch):
    loss, _, tokens = gradient_of(forward, params, batch)
    hidden, head = forward(params, batch)
    nll = -np.asarray(jax.nn.log_softmax(hidden @ head.T))
    picked = np.take_along_axis(nll, batch["targets"][..., None], -1)[..., 0]
    assert float(tokens) == batch["weights"].sum()
    assert float(loss) == pytest.approx(np.average(picked, weights=batch["weights"]), rel=1e-6)


def test_padding_counts_for_nothing_whatever_is_in_it(params, batch):
    other = dict(batch, targets=np.where(batch["weights"] > 0, batch["targets"], V - 1))
    for a, b in zip(
        jax.tree.leaves(gradient_of(forward, params, batch)),
        jax.tree.leaves(gradient_of(forward, params, other)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=4"])
def test_accumulated_microbatches_give_the_gradient_of_the_whole_batch(
    params, batch, accumulate, mesh
):
    mesh = make_mesh(mesh)
    if mesh.size > 1:
        batch = {k: np.concatenate([v] * accumulate) for k, v in batch.items()}
    whole = gradient_of(forward, params, batch)
    step = jax.jit(lambda p, b: gradient_of(forward, p, b, accumulate, mesh))
    parts = step(jax.device_put(params, replicated(mesh)), put_batch(mesh, batch))
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # float32 sums in another order


def test_every_microbatch_has_its_number(params, batch):
    def numbered(params, batch):
        hidden, head = forward(params, batch)
        return hidden * (1 + batch["microbatch"]), head

    loss, *_ = gradient_of(numbered, params, batch, 4)
    hidden, head = forward(params, batch)
    by_row = 1 + np.arange(B) % 4  # row i goes to microbatch i mod 4
    nll = -np.asarray(jax.nn.log_softmax(hidden * by_row[:, None, None] @ head.T))
    picked = np.take_along_axis(nll, batch["targets"][..., None], -1)[..., 0]
    assert float(loss) == pytest.approx(np.average(picked, weights=batch["weights"]), rel=1e-5)


def one_step(params, batch, forward=forward, accumulate=1, tx=None, clip_norm=None):
    mesh = make_mesh(None)
    loss, schedule = partial(summed_loss, forward), optax.linear_schedule(1.0, 0.0, 10)
    tx = optax.adam(schedule) if tx is None else tx
    optimizer = skipping.init(optax.chain(optax.identity(), tx).init(params))
    state = TrainState(params, optimizer, jnp.int32(0), jax.random.key(0))
    step = jax.jit(
        partial(train_step, loss, tx, clip_norm, schedule, accumulate, False, mesh),
        donate_argnums=0,
    )
    return step, jax.tree.map(jnp.array, state), put_batch(mesh, batch)


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(1.0), *(galore(2, optax.sgd(1.0), recover=way) for way in ("project", "fira"))],
    ids=["sgd", "galore", "fira"],
)
def test_a_step_clips_as_optax_does(params, batch, tx):
    _, gradient, _ = gradient_of(forward, params, batch)
    norm = float(optax.tree.norm(gradient))
    step, state, placed = one_step(params, batch, tx=tx, clip_norm=norm / 4)
    after, metrics = step(state, placed)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    whole = optax.chain(optax.clip_by_global_norm(norm / 4), tx)
    updates, _ = whole.update(gradient, whole.init(params), params)
    expected = optax.apply_updates(params, updates)
    for name in params:
        np.testing.assert_allclose(after.params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_step_is_optax_on_that_gradient(params, batch):
    step, state, placed = one_step(params, batch)
    _, gradient, _ = gradient_of(forward, params, batch)
    tx = optax.adam(1.0)
    updates, _ = tx.update(gradient, tx.init(params))
    after, metrics = step(state, placed)
    assert int(after.step) == 1
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    expected = optax.apply_updates(params, updates)
    for name in params:
        # Adam's first update is sign(g), but where g is near its eps.
        np.testing.assert_allclose(after.params[name], expected[name], atol=1e-3)


def test_the_old_state_is_given_up(params, batch):
    step, state, placed = one_step(params, batch)
    step(state, placed)
    assert state.params["embedding"].is_deleted()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loss_that_is_not_finite_changes_nothing_even_where_the_gradient_is_finite(
    params, batch, accumulate
):
    @jax.custom_vjp
    def infinite(x):  # with a gradient of zero
        return jax.tree.map(lambda v: v + jnp.inf, x)

    infinite.defvjp(lambda x: (infinite(x), x), lambda x, _: (jax.tree.map(jnp.zeros_like, x),))

    def overflowing(params, batch):
        bad = jnp.any(batch["inputs"][:, :1] == 100)
        return jax.lax.cond(bad, infinite, lambda x: x, forward(params, batch))

    bad = {name: array.copy() for name, array in batch.items()}
    bad["inputs"][5, 0], bad["targets"][5], bad["weights"][5] = 100, 0, 1
    step, state, placed = one_step(params, bad, overflowing, accumulate)
    after, metrics = step(state, placed)
    assert not np.isfinite(metrics["loss"])
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
    for name in params:
        np.testing.assert_array_equal(after.params[name], params[name])
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(after.optimizer.inner_state))
    after, metrics = step(after, put_batch(make_mesh(None), batch))
    assert int(metrics["skipped"]) == 1
    assert int(metrics["skipped_in_a_row"]) == 0
    # The skipped step has not used up a learning rate.
    assert float(metrics["learning_rate"]) == 1.0
    assert float(jnp.abs(after.params["head"] - params["head"]).max()) > 0


def test_a_step_with_no_target_at_all_is_harmless(params, batch):
    step, state, placed = one_step(params, {**batch, "weights": np.zeros((B, L), np.float32)})
    after, metrics = step(state, placed)
    assert float(metrics["loss"]) == 0
    for name in params:
        np.testing.assert_array_equal(after.params[name], params[name])


def test_bfloat16_gradients_are_summed_in_float32(batch):
    # 256 equal gradients of 1/256: in bfloat16 the sum stops growing at 1 - 1/256 or before.
    n = 256
    params = {"w": jnp.zeros((), jnp.bfloat16)}
    rows = {k: np.ones((n, 1), v.dtype) * (k == "weights") for k, v in batch.items()}

    def linear(params, batch):
        hidden = params["w"].astype(jnp.float32) * jnp.ones((*batch["inputs"].shape, 1))
        return hidden, jnp.array([[-1.5], [1.5]])

    one = gradient_of(linear, params, jax.tree.map(jnp.asarray, rows))[1]["w"]
    many = loss_and_gradient(
        partial(summed_loss, linear), params, jax.tree.map(jnp.asarray, rows), n
    )[1]["w"]
    assert float(one) == float(many) == 1.5
