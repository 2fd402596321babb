"""Pre-training with states, bases and weights of few bits."""

import json

import numpy as np
import pytest
from small_run import LOW_BIT, losses, run_killed, small, train, unfinished

from train.config.resolve import resolve
from train.generate import Generate
from train.generate import main as generate
from train.pretrain import main
from train.run.metrics import read_metrics

Q_GALORE = {"optimizer": "q-galore-adamw8bit", "update_proj_gap": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("low-bit") / "run"
    assert main(small(out, **Q_GALORE)) == 0
    return out


def test_q_galore_learns_with_weights_of_a_byte_and_counts_its_refreshes(finished):
    lines = [line for line in read_metrics(finished) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    # Two layers of seven matrices, at steps 0, 2, 4, ... 12: fewer where a gap has doubled.
    assert lines[0]["refreshes"] == 14
    assert 14 * 6 <= lines[-1]["refreshes"] <= 14 * 7
    summary = json.loads((finished / "summary.json").read_text())
    # The matrices of the layers in a byte each, with 8 bytes for each row or column of a group.
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    others = summary["params"] - matrices
    assert 4 * others + matrices < summary["weight_bytes"] < 4 * others + 1.3 * matrices


@pytest.mark.slow
def test_a_killed_run_with_everything_in_few_bits_repeats_itself_bit_for_bit(finished, tmp_path):
    out = tmp_path / "run"
    assert run_killed({"out": str(out), **Q_GALORE}, "metrics", 11, "SIGKILL").returncode == -9
    assert main(small(out, resume=True, **Q_GALORE)) == 0
    assert losses(out) == losses(finished)


def test_a_resumed_run_in_bfloat16_repeats_the_uninterrupted_one_bit_for_bit(tmp_path):
    settings = {"dtype": "bfloat16", "steps": 6, "save_every": 3, "eval_every": 6}
    assert main(small(tmp_path / "whole", **settings)) == 0
    again = unfinished(tmp_path / "whole", tmp_path, "6")
    assert main(small(again, resume=True, **settings)) == 0
    assert losses(again) == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"another run: --state-dtype float32 \(now bfloat16\)"):
        main(small(again, resume=True, **settings, state_dtype="bfloat16"))


def test_text_is_sampled_from_quantized_weights(finished, capsys):
    assert generate(Generate(run=str(finished), prompt="The ", max_new_tokens=5)) == 0
    assert capsys.readouterr().out.startswith("The ")


@pytest.mark.slow
def test_weights_in_codes_are_split_over_devices_and_train_alike():
    # A sum in another order may fall to the other side of a code's middle: a step of one weight,
    # half a hundredth of its group's range.
    np.testing.assert_allclose(
        train(mesh="fsdp=4,tensor=2", **LOW_BIT), train(**LOW_BIT), rtol=2e-3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moment_bits": 5, "optimizer": "galore-adamw8bit"}, "--moment-bits 5: choose 4 or 8"),
        ({"moment_bits": 8}, "--moment-bits 8 has no effect .* galore-adamw: .*8bit"),
        ({"weight_bits": 8}, "--weight-bits 8 has no effect .* choose one of q-galore-adamw8bit"),
        ({"projection_bits": 2}, "--projection-bits 2: choose 4 or 8"),
        ({"stochastic_rounding": True}, "--stochastic-rounding: float32 weights need no rounding"),
        (
            {"optimizer": "adamw8bit", "rank": None, "update_proj_gap": None,
             "adaptive_refresh": True},
            "--adaptive-refresh True has no effect",
        ),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(small("unused", **changes))
