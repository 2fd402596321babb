"""`--compress-gradients`: data-parallel devices sum their gradients projected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small_run import ADAMW, BAD, break_at_bad_tokens, small, train, trained

from galore_optax import (
    GaLoreDimensionNumbers,
    galore_adafactor,
    galore_adamw,
    subspace_parts,
    unstacked,
)
from train.config.resolve import resolve
from train.memory.cards import can_compile, find_card
from train.memory.plan import stored
from train.memory.program import count
from train.plan import programs_of
from train.step import programs
from train.step.eight_bits import errors_of, of_same_bases, sum_in_8_bits
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
    if "compress_bits" not in changes:
        assert sent_of_matrices(text, programs.abstract.params) <= 1.1


def sent_of_matrices(text: str, params) -> float:
    """Bytes sent in a step without a refresh, relative to rank / min(in, out) of the matrices'.

    What is not projected is sent whole, and left out.
    """
    (_, sent) = count(text, 1.0, 1.0).collectives["all-reduce"]
    matrices = [x for x in jax.tree.leaves(params["layers"]) if x.ndim == 3]
    others = 4 * (sum(x.size for x in jax.tree.leaves(params)) - sum(x.size for x in matrices))
    return (sent - others) / sum(4 * x.size * 4 / min(x.shape[1:]) for x in matrices)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="the extra gpu-target is not installed")
@pytest.mark.parametrize("layerwise", [False, True])
def test_eight_gpus_send_the_share_of_the_gradient_that_is_projected(layerwise):
    config = resolve(small("unused", **COMPRESSED | {"layerwise": layerwise, "clip_norm": None}))
    programs = programs_of(config, find_card("h100"))
    step = programs.step_without_refresh.lower(programs.abstract, programs.batch)
    assert sent_of_matrices(step.compile().as_text(), programs.abstract.params) <= 1.1


def test_what_sums_in_8_bits_leave_out_of_a_step_is_in_a_later_one_and_bytes_are_what_is_sent():
    mesh = make_mesh("data=8")
    values = jax.random.normal(jax.random.key(0), (8, 70, 90)) * jnp.arange(1, 9)[:, None, None]
    tree = {"large": values, "small": values[:, 0]}
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def own(tree, errors):
        return sum_in_8_bits(jax.tree.map(lambda x: x[0], tree), errors, ("data",))

    specs = {"mesh": mesh, "in_specs": (rows, rows), "out_specs": (whole, rows)}
    sums = jax.jit(jax.shard_map(own, **specs, check_vma=False))
    (shape,) = errors_of(jax.tree.map(lambda x: x[0], tree), 8)
    assert shape.shape == (8, 70, 90)
    errors, sent = (jnp.zeros(shape.shape),), 0
    exact = jax.tree.map(lambda x: np.sum(x, axis=0), tree)
    for step in range(1, 4):
        got, errors = sums(tree, errors)
        np.testing.assert_allclose(got["small"], exact["small"], rtol=1e-5)
        assert 0 < np.std(got["large"] - exact["large"]) < 0.02 * np.std(exact["large"])
        sent += got["large"]
        unsent = np.sum(errors[0], axis=0)
        np.testing.assert_allclose(sent + unsent, step * exact["large"], atol=2e-3)
        assert np.std(unsent) < 0.02 * np.std(exact["large"])
    text = sums.lower(tree, errors).compile().as_text()
    for collective in ("all-to-all", "all-gather"):
        assert re.search(rf"s8\[.* {collective}\(", text)
    assert "70,90" not in "".join(re.findall(r"= (.*?) all-reduce", text))
    bad = {**tree, "large": values.at[5, 3, 3].set(jnp.nan)}
    assert not np.isfinite(sums(bad, errors)[0]["large"]).all()


@pytest.mark.parametrize(
    ("recipe", "zeros"),
    [(galore_adamw, [0, 0, 4800, 0, 4800]), (galore_adafactor, [0, 0, 0, 4800, 0, 0, 4800])],
)
def test_what_is_unsent_starts_anew_for_a_matrix_with_a_new_basis_and_for_no_other(recipe, zeros):
    shapes = {"bias": (2, 4096), "stack": (3, 16, 600), "table": (2, 4096), "w": (16, 600)}
    params = {"model": {name: jnp.ones(shape) for name, shape in shapes.items()}}
    matrix, axes = GaLoreDimensionNumbers(-2, -1), dict.fromkeys(shapes)
    numbers = {"model": {**axes, "stack": matrix, "w": matrix}}
    tx = recipe(0.1, rank=8, weight_dimension_numbers=numbers)
    tx = unstacked(tx, lambda _: {"model": {**axes, "bias": 1}})
    state = tx.init(params)
    summed = subspace_parts(tx).project(params, state)
    errors = tuple(jnp.ones(x.shape) for x in errors_of(summed, 1))
    after = state._replace(refreshes=state.refreshes + jnp.array([0, 1, 0, 1]))
    kept = of_same_bases(errors, summed, state, after)
    assert [int(np.sum(x == 0)) for x in kept] == zeros
    assert sum(np.sum(x[:, 1] == 0) for x in kept if x.ndim == 4) in (0, 4800)


@pytest.mark.slow
def test_a_row_of_one_device_that_is_not_finite_makes_all_skip_the_step(monkeypatch):
    make = programs.make_forward
    monkeypatch.setattr(programs, "make_forward", lambda *a: break_at_bad_tokens(make(*a)))
    parts, _, state, losses = trained(2, **COMPRESSED, compress_bits=8)
    assert losses[1] < losses[0] < 6
    before = jax.device_get((state.params, state.unsent))
    assert stored(parts)[1]["unsent"] == sum(x[0].nbytes for x in state.unsent) > 0
    batch, _ = next(parts.data.batches())
    batch["inputs"][-1] = BAD
    state, told = parts.train_step(state, put_batch(parts.mesh, batch))
    assert int(told["skipped"]) == 1
    after = state.params, state.unsent
    for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        for copy in y.addressable_shards:
            np.testing.assert_array_equal(copy.data, x[copy.index])


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
