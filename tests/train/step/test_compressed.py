"""`--compress-gradients`: data-parallel devices sum their gradients projected."""

import re

import jax
import numpy as np
import pytest
from small_run import ADAMW, BAD, break_at_bad_tokens, small, train, trained

from train.config.resolve import resolve
from train.plan import programs_of
from train.step import programs
from train.step.mesh import put_batch

COMPRESSED = {"compress_gradients": True, "mesh": "data=8", "clip_norm": 0.5, "batch_size": 16}


@pytest.mark.parametrize(
    "changes", [{}, {"layerwise": True, "clip_norm": None}], ids=["ordinary", "layerwise"]
)
def test_losses_are_those_of_gradients_summed_whole_and_no_gradient_of_a_matrix_is_sent(changes):
    # Clipped by the projected gradient's norm, too.
    whole = {"accumulate_in_subspace": True, "compress_gradients": False, "mesh": None}
    programs, _, _, losses = trained(6, **COMPRESSED | changes)
    np.testing.assert_allclose(losses, train(**COMPRESSED | changes | whole), rtol=2e-5)
    text = programs.train_step.lower(programs.abstract, programs.batch).compile().as_text()
    sent = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    numbers = [
        np.prod([int(n) for n in shape.split(",") if n])
        for line in sent
        for shape in re.findall(r"f32\[([\d,]*)\]", line)
    ]
    # Embedding and head are sent as they are; of matrices at most a sketch of both layers.
    assert set(numbers) - {257 * 32} <= set(range(2 * 4 * 48 + 1))


def test_a_row_of_one_device_that_is_not_finite_makes_all_skip_the_step(monkeypatch):
    make = programs.make_forward
    monkeypatch.setattr(programs, "make_forward", lambda *a: break_at_bad_tokens(make(*a)))
    parts, _, state, _ = trained(2, **COMPRESSED)
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
