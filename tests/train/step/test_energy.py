"""What bases keep of a gradient's energy, and how far they turn, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small

from train.config.resolve import resolve
from train.run.assemble import assemble
from train.step.energy import bases_of, make_energies, turned
from train.step.mesh import put_batch


def test_the_energy_is_that_of_the_projected_gradient_of_each_layer():
    how = {"optimizer": "galore-adamw8bit", "projection_bits": 8, "side": "both"}
    config = resolve(small("unused", energy_every=1, **how))
    parts = assemble(config, lambda _: None)
    state = parts.init(jax.random.key(0))
    batch = put_batch(parts.mesh, next(parts.data.batches())[0])
    found = make_energies(config, parts)(state, batch)
    gradient = jax.jit(jax.grad(parts.loss))(state.params, batch)["layers"]
    bases = bases_of(state.optimizer.inner_state)
    assert found.keys() == bases.keys()
    assert len(found) == 7
    for name, expected in (("attention/query", 2), ("mlp/down", 2)):
        share = found[f"layers/{name}"]
        room, weight = name.split("/")
        for layer in range(expected):
            g = r = np.asarray(gradient[room][weight][layer], np.float64)
            for basis in bases[f"layers/{name}"]:
                p = np.asarray(basis.dequantize()[layer], np.float64)
                r = p.T @ r if p.shape[0] == r.shape[0] else r @ p
            assert share[layer] == pytest.approx((r**2).sum() / (g**2).sum(), rel=1e-3)


def test_a_layerwise_step_is_measured_by_layers():
    def energies(**how):
        config = resolve(small("unused", energy_every=1, accumulate=2, clip_norm=None, **how))
        parts = assemble(config, lambda _: None)
        batch = put_batch(parts.mesh, next(parts.data.batches())[0])
        state = parts.init(jax.random.key(0))
        return make_energies(config, parts)(state, batch), bases_of(state.optimizer.inner_state)

    at_once, _ = energies()
    by_layers, bases = energies(layerwise=True)
    assert at_once.keys() == by_layers.keys() == bases.keys()
    for name, share in at_once.items():
        assert share.shape == (2,)
        np.testing.assert_allclose(share, by_layers[name], rtol=1e-4)


def test_a_basis_has_turned_by_what_is_not_in_the_one_before():
    eye = jnp.eye(8)
    old = jnp.stack([eye[:, :2], eye[:, 2:4], eye[:, :2]])
    new = jnp.stack([eye[:, 1::-1], eye[:, 3:5], eye[:, 4:6]])
    assert turned((old,), (new,), "layers/x").tolist() == [0, 0.5, 1]
    assert turned((old, old), (new, old), "embedding").tolist() == pytest.approx([0.25])
