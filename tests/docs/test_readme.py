"""The README's code runs as it stands, and its loss falls."""

import re

from paths import ROOT

README = ROOT / "README.md"


def test_the_readmes_python_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = code.replace("for step", "untrained = loss(params)\nfor step")
    names = {}
    exec(code, names)
    assert names["loss"](names["params"]) < 0.5 * names["untrained"]
