"""`sum_over`: devices' gradients are summed projected, with the updates of their sum."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_layers
from jax.sharding import AxisType, PartitionSpec
from toy_layers import MODEL

from galore_optax import (
    Adaptive,
    GaLoreDimensionNumbers,
    Layerwise,
    galore,
    galore_adamw,
    without_refresh,
)

PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (64, 96)),
    "stack": jax.random.normal(jax.random.key(1), (3, 80, 48)),
    "b": jnp.zeros(96),
}
NUMBERS = {"w": GaLoreDimensionNumbers(0, 1), "stack": GaLoreDimensionNumbers(1, 2), "b": None}


def parts(step: int) -> dict:
    """Each device's gradient, of another size each."""

    def draw(x):
        key = jax.random.fold_in(jax.random.key(2 + x.ndim), step)
        return jax.random.normal(key, (8, *x.shape)) * jnp.arange(1.0, 9).reshape(8, *[1] * x.ndim)

    return jax.tree.map(draw, PARAMS)


@pytest.mark.parametrize(
    ("options", "typed"),
    [
        (dict(update_proj_gap=2, bits=8), True),
        pytest.param(
            dict(update_proj_gap=Adaptive(1), moments="reset", side="both"),
            True,
            marks=pytest.mark.slow,
        ),
        (dict(update_proj_gap=2, subspace="power", projection_bits=4), False),
    ],
    ids=["8 bits", "reset on both sides", "power, not typed by shard_map"],
)
def test_devices_gradients_give_the_update_of_their_sum_and_no_gradient_is_sent(options, typed):
    options |= dict(weight_dimension_numbers=NUMBERS, weight_decay=0.1)
    alone = galore_adamw(1e-2, 8, **options)
    shared = galore_adamw(1e-2, 8, **options, sum_over="data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = PartitionSpec(), PartitionSpec("data")

    def own(gradients, state, params):
        return shared.update(jax.tree.map(lambda x: x[0], gradients), state, params)

    update = jax.jit(
        jax.shard_map(
            own, mesh=mesh, in_specs=(rows, whole, whole), out_specs=whole, check_vma=typed
        )
    )
    summed = jax.jit(alone.update)
    ours, theirs = (PARAMS, shared.init(PARAMS)), (PARAMS, alone.init(PARAMS))
    for step in range(3):
        gradients = parts(step)
        steps = update(gradients, ours[1], ours[0])
        ours = optax.apply_updates(ours[0], steps[0]), steps[1]
        total = jax.tree.map(lambda x: x.sum(0), gradients)
        steps = summed(total, theirs[1], theirs[0])
        theirs = optax.apply_updates(theirs[0], steps[0]), steps[1]
    for x, y in zip(*map(jax.tree.leaves, (ours[0], theirs[0])), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    text = update.lower(gradients, ours[1], ours[0]).compile().as_text()
    sent = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = {shape for line in sent for shape in re.findall(r"f32\[([\d,]*)\]", line)}
    assert "96" in shapes  # the bias, as it is
    assert not shapes & {"64,96", "96,64", "80,48", "48,80", "3,80,48"}


def test_a_step_without_a_refresh_sums_too():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shared, alone = (galore(4, optax.sgd(1.0), sum_over=axes) for axes in ("data", ()))
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(3)}
    gradients = jax.tree.map(lambda x: jnp.arange(8.0).reshape(-1, *[1] * x.ndim) * x, params)

    def own(gradients):
        gradient = jax.tree.map(lambda x: x[0], gradients)
        return without_refresh(shared).update(gradient, shared.init(params), params)[0]

    rows, whole = PartitionSpec("data"), PartitionSpec()
    got = jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=whole)(gradients)
    total = jax.tree.map(lambda x: x.sum(0), gradients)
    expected, _ = without_refresh(alone).update(total, alone.init(params), params)
    jax.tree.map(np.testing.assert_allclose, got, expected)


def test_a_layerwise_step_sums_devices_gradients_projected():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    numbers = {**toy_layers.NUMBERS, "embedding": toy_layers.MATRIX}  # a part that is no layer, too
    how = dict(weight_dimension_numbers=numbers, update_proj_gap=2)
    alone = Layerwise(
        MODEL, galore_adamw(1e-2, 4, **how), accumulate=2, accumulate_in_subspace=True
    )
    parts = MODEL._replace(head=lambda *args: MODEL.head(*args) / mesh.size)
    shared = Layerwise(parts, galore_adamw(1e-2, 4, **how, sum_over="data"), accumulate=2)
    whole, rows = PartitionSpec(), PartitionSpec(None, "data")
    specs = {"mesh": mesh, "in_specs": (whole, whole, rows), "out_specs": whole}
    step = jax.jit(jax.shard_map(shared.step, **specs, check_vma=False))
    ours = theirs = toy_layers.params()
    states, alone_step = [shared.init(ours), alone.init(theirs)], jax.jit(alone.step)
    for batch in toy_layers.batches(3, 2):
        ours, states[0], told = step(ours, states[0], batch)
        theirs, states[1], wanted = alone_step(theirs, states[1], batch)
        np.testing.assert_allclose(told.loss, wanted.loss, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), ours, theirs)
    with pytest.raises(ValueError, match=r"sum_over=\('data',\) with clip=\"exact\": that norm"):
        dataclasses.replace(shared, clip_norm=1.0)


def test_what_needs_the_gradient_itself_is_refused():
    with pytest.raises(ValueError, match="subspace='svd' needs the gradient itself"):
        galore(8, optax.sgd(1.0), subspace="svd", sum_over="data")
    with pytest.raises(ValueError, match="sum_over=3 is not of type str"):
        galore(8, optax.sgd(1.0), sum_over=(3,))
