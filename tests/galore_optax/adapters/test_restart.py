"""Restarts of adapters: outputs, moments, and what a sum of low-rank updates reaches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_adapters import IN, OUT, normal, trained_a_while

from galore_optax import galore, gradnorm_lorp_adamw, quantize_state
from galore_optax.adapters.base import factor_dimension_numbers, join, merge, product, split
from galore_optax.adapters.gradnorm_lorp import GradNormLoRP
from galore_optax.adapters.lora import DoRA, LoRA
from galore_optax.adapters.restart import restart
from galore_optax.quantization.array import dequantized


def train(tx, params, steps: int, restart_every: int | None = None):
    x, target = normal(30, 64, IN), normal(30, 64, IN) @ normal(31, IN, OUT)

    @jax.jit
    def step(params, state):
        trained, frozen = split(params)

        def loss(trained):
            return jnp.mean((product(x, join(trained, frozen)["w"]) - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradient, state, trained)
        return join(optax.apply_updates(trained, updates), frozen), state, value

    again = jax.jit(functools.partial(restart, tx))
    state, losses = tx.init(split(params)[0]), []
    for i in range(steps):
        if restart_every and i and i % restart_every == 0:
            params, state = again(params, state, jax.random.key(i))
        params, state, value = step(params, state)
        losses.append(float(value))
    return params, state, losses


def test_restarts_reach_what_one_adapter_of_the_rank_cannot():
    # The target is of full rank, and the weight that it starts from next to nothing.
    params = {"w": GradNormLoRP.create(normal(0, IN, OUT) / 100, jax.random.key(1), 2)}
    tx = gradnorm_lorp_adamw(0.1, 1, update_proj_gap=20, scale=1.0)
    _, _, once = train(tx, params, 400)
    _, _, again = train(tx, params, 400, restart_every=80)
    assert np.isfinite(again).all()
    assert once[-1] < 0.9 * once[0]
    assert again[-1] < 0.6 * once[-1]


@pytest.mark.parametrize(
    ("inner", "keep"),
    [("adamw", 0.0), ("adamw", 0.1), ("galore", 0.0), ("galore", 0.1), ("8-bit galore", 0.1)],
)
def test_a_restart_keeps_the_outputs_and_drops_the_factors_moments(inner, keep):
    params = {"w": trained_a_while(2), "norm": normal(21, IN)}
    projected = inner != "adamw"
    inner = {
        "adamw": optax.adamw(0.01),
        "galore": gradnorm_lorp_adamw(0.01, 2, update_proj_gap=50),
        "8-bit galore": galore(
            2,
            quantize_state(optax.adamw(0.01), min_size=0),
            weight_dimension_numbers=factor_dimension_numbers,
        ),
    }[inner]
    tx = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), inner), 5)
    trained, _ = split(params)
    state = jax.jit(tx.init)(trained)
    for i in range(2):
        gradient = jax.tree.map(lambda p, i=i: jnp.cos(p + i), trained)
        _, state = jax.jit(tx.update)(gradient, state, trained)
    again = jax.jit(functools.partial(restart, tx, keep=keep))
    new_params, new_state = again(params, state, jax.random.key(0))
    np.testing.assert_allclose(merge(new_params)["w"], merge(params)["w"], atol=1e-5)
    new = new_params["w"]
    np.testing.assert_array_equal(new.b, 0)
    np.testing.assert_allclose(new.magnitude, np.abs(params["w"].magnitude), rtol=1e-5)
    assert not np.array_equal(new.a[0], new.a[1])
    assert jax.tree.structure(new_state) == jax.tree.structure(state)

    old, state = state.inner_state[1], new_state.inner_state[1]
    if projected:
        np.testing.assert_array_equal(state.next_refresh, 2)
        jax.tree.map(np.testing.assert_array_equal, state.bases, old.bases)
        old, state = old.inner, state.inner
    old, adam = old[0], state[0]
    assert int(adam.count) == 2
    for name in ("mu", "nu"):
        before, after = dequantized((getattr(old, name), getattr(adam, name)))
        np.testing.assert_array_equal(after["norm"], before["norm"])
        np.testing.assert_array_equal(after["w"].magnitude, before["w"].magnitude)
        for x, y in zip(
            jax.tree.leaves((before["w"].a, before["w"].b)),
            jax.tree.leaves((after["w"].a, after["w"].b)),
            strict=True,
        ):
            for m, n in zip(
                x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *x.shape[-2:]), strict=True
            ):
                kept = np.asarray(n != 0)
                assert kept.mean() == pytest.approx(keep, abs=1.5 / kept.size)
                np.testing.assert_array_equal(n[kept], m[kept])
                assert keep == 0 or np.abs(m)[kept].min() >= np.abs(m)[~kept].max()


@pytest.mark.parametrize("adapters_only", [False, True])
def test_an_optimizer_that_remembers_the_factors_is_refused(adapters_only):
    """A remembered factor that is set to zero is no factor: Prodigy measures distances from it."""
    params = {"w": trained_a_while(), "norm": normal(21, IN)}
    trained, _ = split(params, adapters_only=adapters_only)
    for tx in (optax.contrib.prodigy(0.1), optax.lbfgs(linesearch=None)):
        with pytest.raises(ValueError, match="tx: its state remembers the params"):
            restart(tx, params, tx.init(trained), jax.random.key(0))
    tx = optax.contrib.momo(0.1)
    restart(tx, params, tx.init(trained), jax.random.key(0))


@pytest.mark.parametrize("keep", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(keep):
    with pytest.raises(ValueError, match=f"keep={keep}: give a finite number, at least 0"):
        restart(optax.sgd(0.1), {}, (), jax.random.key(0), keep=keep)


@pytest.mark.parametrize("kind", [LoRA, DoRA, GradNormLoRP])
def test_a_weight_in_bfloat16_keeps_the_mean_of_factors_that_are_below_its_resolution(kind):
    """To the nearest a restart would lose a fifth to two thirds of them, 0.001 of the weight."""
    weight = (normal(0, 2, 64, 64) / 8).astype(jnp.bfloat16)
    adapter = kind.create(weight, jax.random.key(1), 4)
    adapter = dataclasses.replace(adapter, b=(normal(2, 2, 4, 64) / 2000).astype(jnp.bfloat16))
    keys = jax.random.split(jax.random.key(3), 64)
    bases = jax.jit(lambda keys: jax.lax.map(lambda key: adapter.restarted(key).base, keys))(keys)
    assert bases.dtype == jnp.bfloat16
    made = np.mean(np.asarray(bases, np.float64), axis=0) - np.asarray(weight, np.float64)
    wanted = dataclasses.replace(adapter, base=weight.astype(jnp.float32)).merged()
    wanted = np.asarray(wanted, np.float64) - np.asarray(weight, np.float64)
    np.testing.assert_allclose(np.sum(made * wanted), np.sum(wanted**2), rtol=0.05)
