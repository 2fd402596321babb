"""Imports go one way: from `train` to `models` to `galore_optax`, and from room to room."""

import re

import pytest
from paths import ROOT

from docs.rooms import violations


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)


def test_the_rooms_of_this_tree_import_each_other_one_way():
    assert violations() == []


def test_rooms_that_import_downwards_are_right(tmp_path):
    write(
        tmp_path,
        {
            "train/pretrain.py": "from train.step import ordinary\nfrom galore_optax import galore",
            "train/step/ordinary.py": "import models.llama.model",
            "models/llama/model.py": "import flax",
            "galore_optax/recipes.py": "from galore_optax.galore import galore",
            "galore_optax/galore.py": "from galore_optax.stages import refresh\nimport optax",
            "galore_optax/stages.py": "from galore_optax.projection.leaf import f",
            "galore_optax/projection/leaf.py": "from galore_optax import checks",
            "galore_optax/checks.py": "def check():\n    from galore_optax import sharding",
            "galore_optax/sharding.py": "import jax",
        },
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        (
            "galore_optax/trace/roles.py",
            "from galore_optax.projection.leaf import f",
            "galore_optax.trace must not import galore_optax.projection: "
            "galore_optax.trace.roles imports galore_optax.projection.leaf",
        ),
        (
            "galore_optax/projection/leaf.py",
            "def f():\n    import galore_optax.projection.view",
            "modules import each other in a circle: galore_optax.projection.leaf -> "
            "galore_optax.projection.view -> galore_optax.projection.leaf",
        ),
        ("galore_optax/galore.py", "import flax", "galore_optax.galore imports flax"),
        (
            "models/llama.py",
            "from train.step import loss",
            "models.llama imports train.step.loss",
        ),
        ("train/cellar/wine.py", "", "train.cellar has no row"),
    ],
    ids=["upwards", "circle", "flax", "package", "new-room"],
)
def test_a_wrong_import_is_named(tmp_path, file, text, named):
    files = {
        "galore_optax/projection/leaf.py": "",
        "galore_optax/projection/view.py": "from galore_optax.projection import leaf",
    }
    write(tmp_path, {**files, file: text})
    assert any(line.startswith(named) for line in violations(tmp_path))


def test_no_module_asks_the_process_for_its_devices():
    """How to compute is decided by a mesh's devices; only `train.step.mesh` lists the process'."""
    asks = re.compile(r"jax\.(devices|device_count|default_backend|local_devices)\(|ContextVar")
    files = [
        path
        for room in ("galore_optax", "models", "train")
        for path in ROOT.glob(f"{room}/**/*.py")
    ]
    found = {str(p.relative_to(ROOT)) for p in files if asks.search(p.read_text())}
    # The variables there are for reading a transformation: `explain` is told what was decided, and
    # a state is traced as floats.
    variables = {"galore_optax/transformation.py", "galore_optax/trace/traced.py"}
    assert found == {"train/step/mesh.py", *variables}
