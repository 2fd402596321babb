"""The measurements of a run's bases: their file, and their picture."""

import json

import jax.numpy as jnp
import numpy as np

from train.run import subspaces
from train.run.plots import plot_subspaces
from train.run.subspaces import Subspaces, read_subspaces


def test_measurements_are_kept_up_to_the_step_a_run_resumes_from_and_drawn(tmp_path, monkeypatch):
    energies = iter([jnp.array([0.25, 0.75]), jnp.array([1.0, jnp.nan])])
    eye = jnp.eye(4)[None].repeat(2, 0)
    bases = iter([(eye[..., :2],), (eye[..., 1:3],)])
    monkeypatch.setattr(
        subspaces, "make_energies", lambda *_: lambda *_: {"layers/x": next(energies)}
    )
    monkeypatch.setattr(subspaces, "bases_of", lambda _: {"layers/x": next(bases)})
    (tmp_path / "subspace.jsonl").write_text('{"step": 0}\n{"step": 4}\n{"step": 6}\n{"st')
    log: list[str] = []
    measured = Subspaces(None, None, tmp_path, 5, log.append)  # pyrefly: ignore
    state = type("", (), {"optimizer": type("", (), {"inner_state": None})})
    for step in (5, 10):
        measured.measure(step, state, {})  # pyrefly: ignore
    lines = read_subspaces(tmp_path)
    assert [line["step"] for line in lines] == [0, 4, 5, 10]
    assert lines[2] == {"step": 5, "energy": {"layers/x": [0.25, 0.75]}, "turned": {}}
    assert lines[3]["energy"] == {"layers/x": [1, None]}
    np.testing.assert_allclose(lines[3]["turned"]["layers/x"], 0.5)
    assert log == [
        "subspaces before step 6: 50.0% of the gradient's energy kept",
        "subspaces before step 11: 100.0% of the gradient's energy kept, turned by 50.0%",
    ]
    plot_subspaces(lines[2:], tmp_path / "subspace.png", "title")
    assert (tmp_path / "subspace.png").stat().st_size > 5000
    assert json.loads((tmp_path / "subspace.jsonl").read_text().splitlines()[0]) == {"step": 0}
