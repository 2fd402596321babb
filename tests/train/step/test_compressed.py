"""`--compress-gradients`: data-parallel devices sum their gradients projected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small_run import ADAMW, BAD, break_at_bad_tokens, small, train, trained

from train.config.resolve import resolve
from train.plan import programs_of
from train.step import programs
from train.step.eight_bits import sum_in_8_bits
from train.step.mesh import make_mesh, put_batch

COMPRESSED = {"compress_gradients": True, "mesh": "data=8", "clip_norm": 0.5, "batch_size": 16}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="ordinary"),
        pytest.param(
            {"layerwise": True, "clip_norm": None}, id="layerwise", marks=pytest.mark.slow
        ),
        pytest.param({"compress_bits": 8}, id="8 bits", marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_gradients_summed_whole_and_no_gradient_of_a_matrix_is_sent(changes):
    # Clipped by the projected gradient's norm, too.
    whole = {"accumulate_in_subspace": True, "compress_gradients": False, "mesh": None}
    programs, _, _, losses = trained(6, **COMPRESSED | changes)
    exact = train(**COMPRESSED | changes | whole | {"compress_bits": None})
    tolerance = 2e-3 if "compress_bits" in changes else 2e-5
    np.testing.assert_allclose(losses, exact, rtol=tolerance)
    text = programs.train_step.lower(programs.abstract, programs.batch).compile().as_text()
    sent = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    numbers = [
        np.prod([int(n) for n in shape.split(",") if n])
        for line in sent
        for shape in re.findall(r"f32\[([\d,]*)\]", line)
    ]
    # Embedding and head are sent as they are; of matrices at most a sketch of both layers.
    assert set(numbers) - {257 * 32} <= set(range(2 * 4 * 48 + 1))


def test_sums_in_8_bits_are_right_on_average_and_bytes_are_what_is_sent():
    mesh = make_mesh("data=8")
    values = jax.random.normal(jax.random.key(0), (8, 70, 90)) * jnp.arange(1, 9)[:, None, None]
    tree = {"large": values, "small": values[:, 0]}
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def own(tree, key):
        return sum_in_8_bits(jax.tree.map(lambda x: x[0], tree), ("data",), key)

    specs = {"mesh": mesh, "in_specs": (rows, whole), "out_specs": whole}
    sums = jax.jit(jax.shard_map(own, **specs, check_vma=False))
    got = [sums(tree, jax.random.key(i)) for i in range(30)]
    exact = jax.tree.map(lambda x: np.sum(x, axis=0), tree)
    np.testing.assert_allclose(got[0]["small"], exact["small"], rtol=1e-5)
    size = np.std(exact["large"])
    errors = np.stack([x["large"] - exact["large"] for x in got]) / size
    assert np.std(errors) < 0.02
    assert np.std(errors.mean(0)) < 1.3 * np.std(errors) / 30**0.5
    text = sums.lower(tree, jax.random.key(0)).compile().as_text()
    for collective in ("all-to-all", "all-gather"):
        assert re.search(rf"s8\[.* {collective}\(", text)
    assert "70,90" not in "".join(re.findall(r"= (.*?) all-reduce", text))
    bad = {**tree, "large": values.at[5, 3, 3].set(jnp.nan)}
    assert not np.isfinite(sums(bad, jax.random.key(0))["large"]).all()


def test_a_row_of_one_device_that_is_not_finite_makes_all_skip_the_step(monkeypatch):
    make = programs.make_forward
    monkeypatch.setattr(programs, "make_forward", lambda *a: break_at_bad_tokens(make(*a)))
    parts, _, state, losses = trained(2, **COMPRESSED, compress_bits=8)
    assert losses[1] < losses[0] < 6
    before = jax.device_get(state.params)
    batch, _ = next(parts.data.batches())
    batch["inputs"][-1] = BAD
    state, told = parts.train_step(state, put_batch(parts.mesh, batch))
    assert int(told["skipped"]) == 1
    for x, y in zip(*map(jax.tree.leaves, (before, state.params)), strict=True):
        for copy in y.addressable_shards:
            np.testing.assert_array_equal(copy.data, x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": None}, "--compress-gradients without --mesh: there is nothing to all-reduce"),
        ({"mesh": "data=2,fsdp=4"}, "weights must not be split; give --mesh data=N"),
        (ADAMW, "--compress-gradients: --optimizer adamw has no subspace"),
        ({"compress_bits": 4}, "--compress-bits 4: choose 8, or leave it out"),
        ({"compress_bits": 8, "layerwise": True}, "--compress-bits 8 with --layerwise: a layer"),
        (
            {"compress_bits": 8, "compress_gradients": False},
            "--compress-bits 8 has no effect: give --compress-gradients, too",
        ),
        ({"subspace": "svd"}, "--subspace svd needs the gradient itself"),
        (
            {"layerwise": True, "clip": "exact"},
            "--clip exact with --layerwise --compress-gradients: the norm of the projected sum",
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        programs_of(resolve(small("unused", **COMPRESSED | changes)))
