"""What galore and its recipes return is copied, mapped and pickled as any transformation of optax.

Flax NNX, Equinox and launchers of jobs (cloudpickle) do so.
"""

import copy
import functools

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galore_optax import (
    adamw8bit,
    cast_state,
    galore,
    galore_adafactor,
    galore_adamw,
    galore_adamw8bit,
    gradnorm_lorp_adamw,
    q_galore_adamw8bit,
    quantize_state,
    subspace_parts,
    unstacked,
    without_refresh,
)

PARAMS = {"w": jax.random.normal(jax.random.key(0), (16, 64)), "b": jnp.ones(8)}
RANDOM = {"subspace": "random"}  # quick to compile
AXES = {"w": 2, "b": 0}

TRANSFORMATIONS = {
    "optax.adamw": optax.adamw(0.01),
    "galore": galore(4, optax.adamw(optax.linear_schedule(0.01, 0, 9)), **RANDOM),
    "galore_adamw": galore_adamw(0.01, 4, **RANDOM),
    "galore_adamw8bit": galore_adamw8bit(0.01, 4, **RANDOM),
    "galore_adafactor": galore_adafactor(0.01, 4, **RANDOM),
    "q_galore_adamw8bit": q_galore_adamw8bit(0.01, 4, **RANDOM),
    "gradnorm_lorp_adamw": gradnorm_lorp_adamw(0.01, 4),
    "adamw8bit": adamw8bit(0.01),
    "quantize_state": quantize_state(optax.adam(0.01), min_size=1),
    "cast_state": cast_state(optax.adam(0.01)),
    "unstacked": unstacked(galore_adamw(0.01, 4, **RANDOM), lambda _: AXES),
    "without_refresh": without_refresh(galore_adamw(0.01, 4, **RANDOM)),
    "chain": optax.chain(optax.clip(1.0), galore_adamw(0.01, 4, **RANDOM)),
}


class Trainer(eqx.Module):
    tx: optax.GradientTransformationExtraArgs

    def update(self, *args):
        return self.tx.update(*args)


def trainer(tx):
    update = eqx.filter_jit(lambda own, *args: own.update(*args))
    return tx._replace(update=functools.partial(update, Trainer(tx)))


def argument(tx):
    update = eqx.filter_jit(lambda tx, *args: tx.update(*args))
    return tx._replace(update=functools.partial(update, tx))


COPIES = {
    "jax.tree.map": lambda tx: jax.tree.map(lambda f: f, tx),
    "deepcopy": copy.deepcopy,
    "cloudpickle": lambda tx: cloudpickle.loads(cloudpickle.dumps(tx)),
    "_replace": lambda tx: tx._replace(init=tx.init),
    "equinox partition": lambda tx: eqx.combine(*eqx.partition(tx, eqx.is_array)),
}


def first_update(tx):
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]


@pytest.fixture(scope="module")
def updates():
    return {name: first_update(tx) for name, tx in TRANSFORMATIONS.items()}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_copy_does_the_same_and_has_the_same_parts(name, way, updates):
    tx = TRANSFORMATIONS[name]
    assert type(tx) is optax.GradientTransformationExtraArgs
    copied = COPIES[way](tx)
    jax.tree.map(np.testing.assert_array_equal, first_update(copied), updates[name])
    parts = subspace_parts(copied)
    assert (parts is None) == (subspace_parts(tx) is None)
    if parts is not None:
        state = copied.init(PARAMS)
        refreshed = parts.refresh(PARAMS, state, PARAMS)
        projected = parts.project(PARAMS, refreshed)
        made, _ = parts.update_projected(projected, refreshed, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, made, updates[name])


@pytest.mark.parametrize("way", [argument, trainer])
@pytest.mark.parametrize("name", ["optax.adamw", "galore", "q_galore_adamw8bit", "unstacked"])
def test_equinox_jits_it_as_an_argument_and_as_a_field(name, way, updates):
    got = first_update(way(TRANSFORMATIONS[name]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, updates[name])


@pytest.mark.parametrize("name", ["optax.adamw", "galore", "q_galore_adamw8bit"])
def test_an_nnx_optimizer_with_it_is_copied(name):
    model = nnx.Linear(16, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TRANSFORMATIONS[name], wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    copied, trained = copy.deepcopy(optimizer), copy.deepcopy(model)
    optimizer.update(model, grads)
    copied.update(trained, grads)
    np.testing.assert_array_equal(trained.kernel[...], model.kernel[...])
