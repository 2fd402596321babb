"""States and weights survive the ways in which they are stored: Flax, pickle, Orbax, NumPy."""

import copy
import dataclasses
import importlib.util
import pickle

import cloudpickle
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from galore_optax import (
    Adaptive,
    DoRA,
    GradNormLoRP,
    LoRA,
    LowRank,
    adamw8bit,
    galore,
    quantize_nf4,
    quantize_state,
    quantize_weights,
    split,
    unstacked,
)
from galore_optax.serialization import REGISTERED, WhenImported

PARAMS = {"w": jax.random.normal(jax.random.key(0), (16, 256)), "b": jnp.ones(8)}
KEY, WEIGHT = jax.random.key(1), PARAMS["w"]
LOW_BIT = quantize_state(optax.adam(0.01), min_size=1)

TRANSFORMATIONS = {
    "adamw8bit": adamw8bit(0.01),
    "Q-GaLore": galore(
        4, LOW_BIT, subspace="random", projection_bits=4, update_proj_gap=Adaptive(3)
    ),
    "unstacked": unstacked(adamw8bit(0.01), lambda _: {"w": 1, "b": None}),
}
NODES = {
    "8 bits": quantize_weights(PARAMS),
    "4 bits": quantize_weights(PARAMS, bits=4),
    "NF4": quantize_nf4(WEIGHT),
    "LoRA": LoRA.create(WEIGHT, KEY, 4, alpha=8),
    "QLoRA, trained part": split({"w": LoRA.create(quantize_nf4(WEIGHT), KEY, 4)})[0],
    "DoRA": DoRA.create(WEIGHT, KEY, 4),
    "GradNormLoRP": GradNormLoRP.create(WEIGHT, KEY, 4),
    "LowRank": LowRank.create(WEIGHT, KEY, 4),
}


def orbax(tree, directory):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "tree", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "tree", jax.eval_shape(lambda: tree))


WAYS = {
    "flax bytes": lambda tree, _: serialization.from_bytes(tree, serialization.to_bytes(tree)),
    "flax state": lambda tree, _: serialization.from_state_dict(
        tree, serialization.to_state_dict(tree)
    ),
    "pickle": lambda tree, _: pickle.loads(pickle.dumps(tree)),
    "cloudpickle": lambda tree, _: pickle.loads(cloudpickle.dumps(tree)),
    "copy": lambda tree, _: copy.deepcopy(tree),
    "numpy": lambda tree, _: jax.tree.map(np.asarray, tree),
    "orbax": orbax,
}


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_training_goes_on_from_a_stored_state(name, way, tmp_path):
    update = jax.jit(TRANSFORMATIONS[name].update)
    state = TRANSFORMATIONS[name].init(PARAMS)
    stored = WAYS[way](state, tmp_path)
    assert_same(stored, state)
    assert_same(update(PARAMS, stored, PARAMS), update(PARAMS, state, PARAMS))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NODES)
def test_stored_weights_and_adapters_come_back(name, way, tmp_path):
    assert_same(WAYS[way](NODES[name], tmp_path), NODES[name])


def test_flax_refuses_to_read_codes_into_other_codes_and_adapters_into_other_scales():
    four, eight = quantize_nf4(WEIGHT, block=16), quantize_nf4(WEIGHT, block=8)
    with pytest.raises(ValueError, match=r"target: .*'block': '8'.*'block': '16'"):
        serialization.from_bytes(eight, serialization.to_bytes(four))
    lora = LoRA.create(WEIGHT, KEY, 4, alpha=8)
    with pytest.raises(ValueError, match=r"'scale': '1.0'.*'scale': '2.0'"):
        serialization.from_bytes(dataclasses.replace(lora, scale=1.0), serialization.to_bytes(lora))
    state = serialization.to_state_dict(lora)
    with pytest.raises(ValueError, match=r"state: .* a DoRA .*'magnitude'"):
        serialization.from_state_dict(DoRA.create(WEIGHT, KEY, 4), state)


def test_the_classes_are_registered_where_flax_is_imported_later():
    spec = WhenImported().find_spec("flax.serialization", flax.__path__)
    later = importlib.util.module_from_spec(spec)
    assert not hasattr(later, "is_serializable")
    spec.loader.exec_module(later)
    assert len(REGISTERED) == 5
    assert all(map(later.is_serializable, REGISTERED))
