"""Every example runs as a script and prints a loss that falls."""

import re
import runpy

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["nnx_optimizer", "linen_train_state", "equinox_module"])
def test_prints_the_loss_falling(name, capsys):
    if name == "equinox_module":
        pytest.importorskip("equinox", reason="the example needs equinox, of the extra 'test'")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    losses = [float(x) for x in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert len(losses) > 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 10
