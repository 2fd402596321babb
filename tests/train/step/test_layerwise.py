"""`--layerwise`: the ordinary run's losses, on a mesh and after resuming too."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import ADAMW, LOW_BIT, MICRO, NO_SUBSPACE, losses, small, train, trained, unfinished

from galore_optax.quantization.array import is_quantized
from models.llama.config import SIZES
from train.config.resolve import resolve
from train.plan import programs_of
from train.pretrain import main
from train.run.assemble import assemble
from train.step.mesh import put_batch

PREVIOUS = {"clip": "previous", "clip_norm": 0.5, **ADAMW}
RUN = dict(layerwise=True, clip="previous", steps=8, save_every=3)


@functools.cache
def one_device(which):
    """Losses of the ordinary step; those of what it cannot do, of the layer-wise one."""
    changes = {"adamw": ADAMW, "previous": {"layerwise": True, **PREVIOUS}}
    return train(**changes.get(which, {}))


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        pytest.param("galore-adamw", {}, marks=pytest.mark.slow),
        pytest.param("adamw", ADAMW, marks=pytest.mark.slow),
        ("galore-adamw", {"accumulate": 2, "rematerialize": True}),
        ("galore-adamw", {"mesh": "data=2,fsdp=2,tensor=2"}),
        pytest.param("previous", {"mesh": "data=4,fsdp=2", **PREVIOUS}, marks=pytest.mark.slow),
    ],
    ids=["galore-adamw", "adamw", "accumulated", "mesh", "mesh, clip previous"],
)
def test_losses_are_those_of_one_device_and_the_ordinary_step(which, changes):
    # Six updates, GaLore with two subspaces; float32 sums in another order.
    np.testing.assert_allclose(
        train(**{**changes, "layerwise": True}), one_device(which), rtol=2e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(LOW_BIT | {"mesh": "fsdp=2,data=4"}, id="quantized", marks=pytest.mark.slow),
        pytest.param({"mesh": "data=2,fsdp=2,tensor=2", **ADAMW}, id="float32"),
    ],
)
def test_a_tied_head_and_biases_train_on_a_mesh_as_in_the_ordinary_step(monkeypatch, changes):
    tied = dict(tied=True, attention_bias=True, mlp_bias=True, head_dim=12)
    monkeypatch.setitem(SIZES, "tied", dataclasses.replace(MICRO, **tied))
    settings = {**changes, "model": "tied", "layerwise": True}
    parts, _, state, by_layers = trained(4, **settings)
    assert "head" not in parts.abstract.params
    moments = [p for p, _ in jax.tree.leaves_with_path(state.optimizer) if "embedding" in str(p)]
    assert moments
    assert not any("head" in str(p) for p in moments)
    biases = state.params["layers"]["attention_bias"], state.params["layers"]["mlp_bias"]
    assert all(jnp.any(x != 0) for x in jax.tree.leaves(biases))
    ordinary = {**settings, "layerwise": False, "mesh": None}
    # By another order of sums a number between two codes becomes one or the other.
    rtol = 1e-3 if "embedding_bits" in changes else 2e-5
    np.testing.assert_allclose(by_layers, train(4, **ordinary), rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "galore-adafactor"])
def test_what_optimizers_do_by_leaf_they_do_by_layer_in_the_ordinary_step_too(optimizer):
    settings = dict(optimizer=optimizer, learning_rate=0.02)  # fast enough for Adafactor to clip
    settings |= {} if "galore" in optimizer else NO_SUBSPACE
    np.testing.assert_allclose(train(**settings, layerwise=True), train(**settings), rtol=2e-5)


@pytest.mark.slow
def test_a_way_back_with_moments_in_few_bits_does_the_same_layer_by_layer():
    settings = dict(optimizer="alice", tracking=0.0, moment_bits=8)
    # By another order of sums a number between two codes becomes one or the other.
    np.testing.assert_allclose(train(**settings, layerwise=True), train(**settings), rtol=1e-3)


@pytest.mark.parametrize(
    "optimizer", ["adamw8bit", "galore-adamw8bit", "q-galore-adamw8bit", "alice"]
)
@pytest.mark.parametrize(
    "layerwise",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["ordinary", "layerwise"],
)
def test_vectors_of_a_layer_are_quantized_by_their_own_size(monkeypatch, optimizer, layerwise):
    # Arrays of 4,096 numbers are quantized: a norm of both layers has as many, one layer's half.
    monkeypatch.setitem(SIZES, "wide", dataclasses.replace(MICRO, width=2048))
    settings = dict(model="wide", optimizer=optimizer, layerwise=layerwise, moment_bits=8)
    settings |= NO_SUBSPACE if optimizer == "adamw8bit" else {}
    state = programs_of(resolve(small("unused", **settings))).abstract.optimizer
    paths = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(state)]
    norms = [x.dtype for path, x in paths if "_norm" in path]
    assert {*norms} == {jnp.dtype("float32")}, "moments of the layers' norms"
    assert any(x.dtype == jnp.uint8 for path, x in paths if "mlp" in path)


@pytest.mark.slow
def test_quantized_weights_are_rounded_at_random():
    # An update is a hundredth of a step between two codes: to the nearest, none would change.
    settings = LOW_BIT | {"layerwise": True, "stochastic_rounding": True, "learning_rate": 1e-5}
    _, first, last, _ = trained(1, **settings, warmup_steps=0)
    before, after = (
        [
            x.codes
            for x in jax.tree.leaves(s.params["layers"], is_leaf=is_quantized)
            if is_quantized(x)
        ]
        for s in (first, last)
    )
    assert len(before) == 7
    for old, new in zip(before, after, strict=True):
        assert 0 < np.mean(np.asarray(old) != np.asarray(new)) < 0.02


@pytest.mark.parametrize("layerwise", [False, True], ids=["ordinary", "layerwise"])
def test_small_updates_of_bfloat16_weights_are_kept_on_average_or_lost_as_published(layerwise):
    # An update of 1e-5 is at most a sixth of the distance between two weights above 0.008.
    settings = dict(dtype="bfloat16", layerwise=layerwise, learning_rate=1e-5, warmup_steps=0)

    def changed(**rounding):
        _, first, last, _ = trained(1, **settings, **rounding, **ADAMW)
        pairs = zip(jax.tree.leaves(first.params), jax.tree.leaves(last.params), strict=True)
        large = [(x, y, np.abs(np.asarray(x, np.float32)) > 0.008) for x, y in pairs]
        return np.mean(np.concatenate([np.asarray(x != y)[where] for x, y, where in large]))

    assert changed(stochastic_rounding=False) == 0
    assert 0.02 < changed() < 1 / 6


@pytest.mark.slow
def test_microbatches_summed_in_the_subspace_give_the_ordinary_steps_losses_on_a_mesh_too():
    # The bases come from the first of two microbatches; nothing is clipped, since by layers that
    # would be by another norm.
    settings = dict(accumulate=2, accumulate_in_subspace=True, clip_norm=1e6)
    ordinary = train(**settings)
    by_layers = train(**settings, layerwise=True, clip="previous", mesh="data=2,fsdp=2,tensor=2")
    np.testing.assert_allclose(by_layers, ordinary, rtol=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(optimizer="adamw", rank=None, update_proj_gap=None), "--optimizer adamw has no"),
        (dict(layerwise=True, clip="exact"), "--clip exact with --layerwise"),
    ],
)
def test_sums_in_the_subspace_need_one_and_a_norm_that_is_known(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve(small("unused", accumulate_in_subspace=True, **settings))
    assert resolve(small("unused", accumulate_in_subspace=True, layerwise=True)).clip == "previous"


def test_adapters_need_no_layers():
    with pytest.raises(ValueError, match="--layerwise has no effect with --adapter lora"):
        resolve(small("unused", layerwise=True, optimizer="lora-adamw", update_proj_gap=None))


@pytest.mark.slow
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = tmp_path / "whole"
    assert main(small(whole, **RUN)) == 0
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["optimizer_state_bytes"] < summary["adamw_state_bytes"]
    again = unfinished(whole, tmp_path, "8")
    assert main(small(again, resume=True, **RUN)) == 0
    assert losses(again) == losses(whole)
    with pytest.raises(ValueError, match=r"has another run: .* --layerwise True \(now False\)"):
        main(small(whole, resume=True, **RUN | {"layerwise": False, "clip": "exact"}))


def test_a_loss_that_is_not_finite_is_skipped_and_counted():
    parts = assemble(resolve(small("unused", **RUN)), lambda line: None)
    state = parts.init(jax.random.key(0))
    state.params["norm"] = state.params["norm"].at[0].set(jnp.nan)
    before = jax.device_get(state)
    batch, _ = next(iter(parts.data.batches()))
    after, metrics = parts.train_step(state, put_batch(parts.mesh, batch))
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), before.params)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(after.optimizer.inner_state.layers),
        before.optimizer.inner_state.layers,
    )
    after.params["norm"] = after.params["norm"].at[0].set(1.0)
    _, metrics = parts.train_step(after, put_batch(parts.mesh, batch))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)
    # The skipped step has used up no learning rate: it is the warm-up's first of two.
    assert float(metrics["learning_rate"]) == pytest.approx(0.01 / 3)


def test_clipping_by_the_previous_norm_is_of_use_by_layers_only():
    with pytest.raises(ValueError, match="--clip previous has an effect with --layerwise only"):
        resolve(small("unused", clip="previous"))
