"""What a run shows besides its lines: samples, a profile, TensorBoard's settings, a service."""

import gzip
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_run import ADAMW, small
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from train.pretrain import main
from train.run.tracking import start_tracker


class Wandb(SimpleNamespace):
    """A package that notes what it is told."""

    def init(self, **how):
        self.how, self.lines = how, []
        self.finish = lambda: self.lines.append("end")
        return SimpleNamespace(log=lambda x, step: self.lines.append((step, x)), finish=self.finish)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out, wandb = tmp_path_factory.mktemp("runs") / "run", Wandb()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        more = {"steps": 4, "profile": 1, "sample_every": 2, "track": "wandb", "eval_every": 4}
        assert main(small(out, **ADAMW | more)) == 0
    return out, wandb


def events(out: Path) -> list[Event]:
    (path,) = (out / "tensorboard").iterdir()
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return found


def test_samples_are_kept_in_the_runs_folder(run):
    texts = {path.name: path.read_text() for path in (run[0] / "samples").iterdir()}
    assert texts.keys() == {"2.txt", "4.txt"}
    assert all(text.startswith("sample: The ") for text in texts.values())


def test_a_profile_is_a_trace_that_perfetto_and_tensorboard_read(run):
    (folder,) = (run[0] / "profile" / "plugins" / "profile").iterdir()
    assert list(folder.glob("*.xplane.pb"))
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert "profile" not in json.loads((run[0] / "config.json").read_text())


def test_tensorboard_has_the_settings_and_what_metrics_mean(run):
    values = [value for event in events(run[0]) for value in event.summary.value]
    start = next(x for x in values if x.tag == "_hparams_/session_start_info")
    content = HParamsPluginData.FromString(start.metadata.plugin_data.content)
    settings = content.session_start_info.hparams
    assert settings["learning_rate"].number_value == 0.01
    assert settings["optimizer"].string_value == "adamw"
    plugins = {x.metadata.plugin_data.plugin_name for x in values if x.metadata.ByteSize()}
    assert plugins == {"hparams", "scalars"}  # without a name, a reader of TensorBoard's warns
    told = [x.metadata.summary_description for x in values if x.tag == "training/skipped"]
    assert (
        told
        == ["Steps so far whose loss or gradient was not finite: no weight changed."] + [""] * 3
    )


def test_a_service_gets_metrics_and_settings_and_goes_on_with_its_run(run, monkeypatch):
    out, wandb = run
    assert wandb.how["config"]["optimizer"] == "adamw"
    assert wandb.how["name"] == "run"
    steps = [line[0] for line in wandb.lines[:-1]]
    assert steps == [0, 1, 2, 3, 4, 4]
    assert wandb.lines[1][1]["training/learning_rate"] == pytest.approx(0.01 / 3)
    assert set(wandb.lines[0][1]) == {"evaluation/eval_loss", "evaluation/eval_perplexity"}
    assert wandb.lines[-1] == "end"
    again = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", again)
    start_tracker("wandb", out, {})
    assert again.how["id"] == wandb.how["id"]
    monkeypatch.setattr(again, "init", lambda **how: 1 / 0)
    with pytest.raises(OSError, match="--track wandb: division by zero"):
        start_tracker("wandb", out, {})


def test_mlflow_gets_the_settings_once_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    said: list[tuple] = []

    def noted(name):
        return lambda *given, **how: said.append((name, given, how))

    names = ("set_experiment", "log_params", "log_metrics", "end_run")
    mlflow = SimpleNamespace(**{name: noted(name) for name in names})

    def start_run(**how):
        said.append(("start_run", (), how))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    mlflow.start_run = start_run
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    (tmp_path / "run").mkdir()
    for _ in range(2):
        tracker = start_tracker("mlflow", tmp_path / "run", {"steps": 3})
        assert tracker is not None
        tracker.log({"training/loss": 1.0}, 2)
        tracker.close()
    assert [name for name, *_ in said] == [
        "set_experiment", "start_run", "log_params", "log_metrics", "end_run",
        "start_run", "log_metrics", "end_run",
    ]  # fmt: skip
    assert said[1][2] == {"run_id": None, "run_name": "run"}
    assert said[3][1:] == (({"training/loss": 1.0},), {"step": 2})
    assert said[5][2]["run_id"] == "abc"


def test_a_service_whose_package_is_absent_is_named_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--track wandb: install it \(pip install wandb\)"):
        main(small(tmp_path / "run", track="wandb"))
    assert not list(tmp_path.iterdir())
