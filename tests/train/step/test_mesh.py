"""The mesh: what may be asked for, and that every layout trains alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_run import ADAMW, MICRO, small, train

from models.llama.axes import logical_axes
from models.llama.config import SIZES, LlamaConfig, Weight, weight_table
from train.config.resolve import resolve
from train.run.assemble import assemble
from train.step.mesh import make_mesh, own_rows, param_shardings, parse_mesh, put_batch
from train.step.microbatches import check_batch


def test_axes_that_are_not_named_have_size_one():
    assert parse_mesh("fsdp=4, data=2") == {"data": 2, "fsdp": 4, "tensor": 1}


def test_one_device_is_the_default_and_a_mesh_takes_all():
    assert make_mesh(None).size == 1
    assert make_mesh("data=2,fsdp=2,tensor=2").devices.shape == (2, 2, 2)


@pytest.mark.parametrize(
    "text",
    ["", "data", "data=", "data=0", "data=-1", "data=x", "pipe=8", "data=2,data=4"],
)
def test_another_spelling_is_refused_and_the_right_one_shown(text):
    with pytest.raises(ValueError, match="such as data=2,fsdp=4"):
        make_mesh(text)


@pytest.mark.parametrize("text", ["data=4", "data=16", "data=3,fsdp=2"])
def test_a_mesh_that_is_not_all_devices_is_refused_and_their_number_said(text):
    with pytest.raises(ValueError, match="there are 8"):
        make_mesh(text)


@pytest.mark.parametrize(("batch", "accumulate"), [(12, 1), (16, 3), (24, 2)])
def test_a_batch_that_the_devices_cannot_split_is_refused(batch, accumulate):
    with pytest.raises(ValueError, match=f"multiple of {8 * accumulate}"):
        check_batch(batch, accumulate, make_mesh("data=4,fsdp=2"))
    check_batch(8 * accumulate, accumulate, make_mesh("data=4,fsdp=2"))


def shardings_of(config: LlamaConfig, mesh: str):
    shapes = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32),
        weight_table(config),
        is_leaf=lambda x: isinstance(x, Weight),
    )
    return param_shardings(make_mesh(mesh), shapes, logical_axes(shapes))


def test_every_matrix_of_the_papers_sizes_is_split_over_the_whole_mesh():
    for name, config in SIZES.items():
        for mesh in ("fsdp=8", "tensor=8", "fsdp=4,tensor=2", "fsdp=2,tensor=4"):
            shardings, _ = shardings_of(config, mesh)
            for path, sharding in jax.tree.leaves_with_path(shardings):
                if "norm" not in jax.tree_util.keystr(path):
                    assert sharding.num_devices == 8
                    assert not sharding.is_fully_replicated, (name, mesh, path)


def test_where_an_axis_does_not_divide_the_other_one_is_split_and_it_is_said():
    shardings, notes = shardings_of(SIZES["llama-1b"], "fsdp=4,tensor=2")
    mlp = shardings["layers"]["mlp"]
    assert mlp["gate"].spec == P(None, ("fsdp", "tensor"), None)  # (24, 2048, 5461)
    assert mlp["down"].spec == P(None, None, ("fsdp", "tensor"))
    assert shardings["layers"]["attention"]["query"].spec == P(None, "fsdp", "tensor")
    assert sorted(note.split()[0] for note in notes) == [
        f"layers/mlp/{name}" for name in ("down", "gate", "up")
    ]
    assert all("tensor=2 does not divide" in note and "5461" in note for note in notes)


def test_what_cannot_be_split_at_all_is_whole_and_it_is_said():
    odd = dataclasses.replace(MICRO, width=30, heads=3, kv_heads=3, mlp_width=45, vocab_size=257)
    shardings, notes = shardings_of(odd, "fsdp=8")
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))
    assert len(notes) == 9
    assert all("a copy on each device" in note for note in notes)


def test_a_batch_is_split_over_data_and_fsdp():
    batch = {"inputs": np.arange(32).reshape(8, 4)}
    placed = put_batch(make_mesh("data=2,fsdp=2,tensor=2"), batch)["inputs"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(placed, batch["inputs"])
    assert own_rows(make_mesh("data=2,fsdp=2,tensor=2"), 8) == {*range(8)}
    assert own_rows(make_mesh(None), 3) == {0, 1, 2}


@pytest.fixture(scope="module")
def one_device():
    """Losses of one device, by optimizer."""
    return {"galore-adamw": train(), "adamw": train(**ADAMW)}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mesh": "fsdp=8"}, marks=pytest.mark.slow),
        {"mesh": "data=2,fsdp=2,tensor=2"},
        pytest.param({"mesh": "data=8", **ADAMW}, marks=pytest.mark.slow),
        {"mesh": "data=2,fsdp=4", **ADAMW},
        pytest.param({"mesh": "tensor=2,data=4", **ADAMW}, marks=pytest.mark.slow),
        {"mesh": "fsdp=4,tensor=2", "rematerialize": True, **ADAMW},
    ],
    ids=lambda changes: f"{changes['mesh']}-{changes.get('optimizer', 'galore-adamw')}",
)
def test_every_layout_gives_one_devices_losses(one_device, changes):
    expected = one_device[changes.get("optimizer", "galore-adamw")]
    # Six updates, GaLore with two subspaces (one every 3 steps); float32 sums in another order.
    np.testing.assert_allclose(train(**changes), expected, rtol=2e-5)


def test_weights_and_moments_are_spread_over_the_devices():
    parts = assemble(resolve(small("unused", mesh="fsdp=8")), print)
    state = parts.init(jax.random.key(0))
    whole = sum(x.nbytes for x in jax.tree.leaves((state.params, state.optimizer)))
    here = sum(
        x.addressable_shards[0].data.nbytes
        for x in jax.tree.leaves((state.params, state.optimizer))
    )
    # The norms, and what belongs to a rank of 4, are whole on each device.
    assert here < whole / 4


@pytest.mark.parametrize("error", [RuntimeError("Unable to\ninitialize"), AssertionError()])
def test_a_platform_that_is_not_there_is_named(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ValueError, match=r"JAX has no device of cuda \([^\n]*\): set the env"):
        make_mesh(None)
