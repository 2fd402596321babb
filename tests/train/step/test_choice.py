"""Steps run by two programs are those of one, and the one without a refresh runs when it can."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Adaptive, Staggered, galore, without_refresh
from train.step.choice import Steps

PARAMS = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 8)), "c": jnp.ones(4)}


def gradient(step):
    key = jax.random.key(step)
    return jax.tree.map(lambda x: jax.random.normal(key, x.shape), PARAMS)


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (3, "RNNRNNRNN"),
        (lambda step: 1 + step, "RRNRNNNRN"),
        (Staggered(4), None),
        (Adaptive(2), None),
    ],
)
def test_two_programs_make_the_steps_of_one(gap, expected):
    tx = galore(2, optax.adam(0.1), update_proj_gap=gap)
    ran = []

    def program(name, tx):
        update = jax.jit(tx.update)

        def run(state, batch):
            ran.append(name)
            updates, new = update(batch, state.optimizer, PARAMS)
            return SimpleNamespace(optimizer=new), updates

        return run

    steps = Steps(program("R", tx), program("N", without_refresh(tx)))
    one = program("one", tx)
    state = reference = SimpleNamespace(optimizer=tx.init(PARAMS))
    for step in range(9):
        batch = gradient(step)
        state, updates = steps(state, batch)
        reference, wanted = one(reference, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, wanted)
    names = "".join(name for name in ran if name != "one")
    assert expected is None or names == expected
    assert "N" in names
