"""Recipes take the arguments of the optax optimizers that they are made of, with their meaning."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
    adamw8bit,
    apollo_adamw,
    apollo_mini_adamw,
    fira_adamw,
    galore_adafactor,
    galore_adamw,
    gradnorm_lorp_adamw,
)

PARAMS = {
    "w": jax.random.normal(jax.random.key(0), (6, 8)),
    "b": jax.random.normal(jax.random.key(1), (8,)),
}
GRADS = [jax.tree.map(lambda x, i=i: jnp.sin(i * x), PARAMS) for i in (2, 3, 4)]
AS_IT_IS = {"rank": 1.0, "scale": 1.0, "subspace": lambda g, *_: jnp.eye(g.shape[0])}
MASK = {"w": True, "b": False}


def halved(count):
    return 0.5 ** (count + 1.0)


def trajectory(tx):
    params, state, found = PARAMS, tx.init(PARAMS), []
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found += jax.tree.leaves(params)
    return found


ADAMW = {
    "weight_decay": {"weight_decay": 0.5},
    "weight_decay schedule": {"weight_decay": halved},
    "mask": {"weight_decay": 0.5, "mask": MASK},
    "mask function": {
        "weight_decay": halved,
        "mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    },
    "nesterov": {"nesterov": True},
    "mu_dtype": {"mu_dtype": jnp.bfloat16},
    "eps_root": {"eps_root": 0.1},
    "eps": {"eps": 0.1},
    "betas": {"b1": 0.5, "b2": 0.9},
    "learning rate schedule": {"learning_rate": halved},
}


@pytest.mark.parametrize("name", ADAMW)
def test_an_argument_of_adamw_acts_as_it_does_there(name):
    options = {"learning_rate": 0.1, "weight_decay": 0.0, **ADAMW[name]}
    expected = trajectory(optax.adamw(**options))
    np.testing.assert_allclose(
        np.concatenate([x.ravel() for x in trajectory(galore_adamw(**options, **AS_IT_IS))]),
        np.concatenate([x.ravel() for x in expected]),
        atol=1e-6,
    )
    if name != "mu_dtype":
        # These leaves are too small to be quantized.
        for got, wanted in zip(trajectory(adamw8bit(**options)), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)


ADAFACTOR = {
    "defaults": {},
    "momentum": {"momentum": 0.9, "dtype_momentum": jnp.float16},
    "decay": {"weight_decay_rate": 0.1},
    "decay schedule and mask": {"weight_decay_rate": halved, "weight_decay_mask": MASK},
    "parameter scale": {"multiply_by_parameter_scale": True},
    "not factored": {"factored": False},
    "offset": {"decay_offset": 0, "decay_rate": 0.5, "eps": 1e-3},
    "no clipping": {"clipping_threshold": None},
    "few factored": {"min_dim_size_to_factor": 7},
}


@pytest.mark.parametrize("name", ADAFACTOR)
def test_an_argument_of_adafactor_acts_as_it_does_there(name):
    options = {"min_dim_size_to_factor": 1, "multiply_by_parameter_scale": False}
    options.update({"learning_rate": 0.1, **ADAFACTOR[name]})
    expected = trajectory(optax.adafactor(**options))
    for got, wanted in zip(
        trajectory(galore_adafactor(**options, **AS_IT_IS)), expected, strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_adafactors_decay_times_the_learning_rate_may_be_a_schedule():
    made = [
        trajectory(galore_adafactor(halved, weight_decay=decay, **AS_IT_IS))
        for decay in (0.3, lambda count: 0.3 + 0 * count)
    ]
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    rate = galore_adafactor(halved, weight_decay_rate=lambda c: 0.3 * halved(c), **AS_IT_IS)
    for one, other in zip(made[0], trajectory(rate), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "of_optax"),
    [
        (galore_adamw, optax.adamw),
        (adamw8bit, optax.adamw),
        (fira_adamw, optax.adamw),
        (apollo_adamw, optax.adamw),
        (apollo_mini_adamw, optax.adamw),
        (gradnorm_lorp_adamw, optax.adamw),
        (galore_adafactor, optax.adafactor),
    ],
)
def test_every_argument_of_the_optax_optimizer_is_taken(recipe, of_optax):
    assert {*inspect.signature(of_optax).parameters} <= {*inspect.signature(recipe).parameters}


@pytest.mark.parametrize(
    ("recipe", "options", "named"),
    [
        (adamw8bit, {"mu_dtype": "bfloat16"}, "mu_dtype='bfloat16' with bits=8"),
        (
            galore_adamw,
            {"rank": 2, "bits": 4, "state_dtype": "float32"},
            "state_dtype='float32' wi",
        ),
        (galore_adamw, {"rank": 2, "mu_dtype": "int8"}, "mu_dtype='int8' is not a float type"),
        (galore_adamw, {"rank": 2, "nesterov": 1}, "nesterov=1 is unknown"),
        (galore_adamw, {"rank": 2, "weight_decay": -0.1}, "weight_decay=-0.1: give"),
        (galore_adafactor, {"rank": 2, "dtype_momentum": "float32"}, "needs momentum="),
        (galore_adafactor, {"rank": 2, "weight_decay_rate": "x"}, "weight_decay_rate='x' must be"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(recipe, options, named):
    with pytest.raises(ValueError, match=named):
        recipe(0.1, **options)


def test_numbers_of_recipes_can_be_hyperparameters():
    static = ("rank", "update_proj_gap", "projection_bits", "seed", "mask", "nesterov")
    tx = optax.inject_hyperparams(galore_adamw, static_args=static)(
        0.1, 2, weight_decay=halved, eps_root=0.1, mask=MASK, nesterov=True
    )
    state = tx.init(PARAMS)
    assert {"learning_rate", "weight_decay", "eps_root"} <= {*state.hyperparams}
    tx.update(GRADS[0], state, PARAMS)
    fira = optax.inject_hyperparams(fira_adamw, static_args=static)(0.1, 2, b1=0.8)
    state = fira.init(PARAMS)
    assert {"learning_rate", "b1", "b2", "eps"} <= {*state.hyperparams}
    fira.update(GRADS[0], state, PARAMS)
