"""Runs of two processes, over Gloo: as one process's, and nothing lost when one is killed."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from paths import ROOT
from small_pair import SETTINGS, end, ended, pair
from small_run import ADAMW, killed_command, losses, small

from train.config.resolve import resolve
from train.data.sequences import START, Position
from train.pretrain import main
from train.run import assemble, hosts
from train.run import directory as run_directory
from train.run.directory import resume_command
from train.run.meeting import Place

IN_SUBSPACE = {"rank": 4, "update_proj_gap": 3, "accumulate": 2, "batch_size": 16, "steps": 7}
OTHERS = {"coordinator": "127.0.0.1:1", "processes": 2, "process": 0}


@pytest.mark.slow
def test_a_pair_killed_and_stopped_goes_on_with_one_process_and_repeats_its_losses(tmp_path):
    # One of two dies in mid-step: the other ends within a minute, saying why.
    out = tmp_path / "pair"
    codes, errors = end(pair(out), out, 5, which=1, signum=signal.SIGKILL)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert "another one has ended" in errors[0] or "another process of the run" in errors[0]
    # SIGTERM to the first stops both after the same step, which both save.
    codes, errors = end(pair(out, resume=True), out, 8, which=0, signum=signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM] * 2, errors
    # One process resumes on its eight devices, and gives what it would have given alone.
    assert main(small(out, **SETTINGS, resume=True)) == 0
    assert main(small(tmp_path / "alone", **SETTINGS)) == 0
    found, wanted = losses(out), losses(tmp_path / "alone")
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(list(found.values()), [wanted[k] for k in found], rtol=1e-5)


def slurm(process: int) -> dict[str, str]:
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    own = {"SLURM_NTASKS": 2, "SLURM_PROCID": process, "SLURM_LOCALID": process}
    return job | {name: str(number) for name, number in own.items()}


def open_mpi(process: int) -> dict[str, str]:
    uri = {"OMPI_MCA_orte_hnp_uri": f"{os.getpid() * 2**12}.0;tcp://127.0.0.1:34911"}
    own = {"SIZE": 2, "RANK": process, "LOCAL_RANK": process}
    return uri | {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in own.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "launcher"),
    [("galore-adamw", slurm), ("galore-adamw8bit", open_mpi), ("q-galore-adamw8bit", None)],
)
def test_two_processes_have_the_losses_of_one_device(tmp_path, optimizer, launcher, layerwise):
    settings = {**IN_SUBSPACE, "optimizer": optimizer, "layerwise": layerwise}
    processes = pair(tmp_path / "pair", launcher=launcher, **settings)
    codes, errors = ended(processes, 240)
    assert codes == [0, 0], errors
    assert main(small(tmp_path / "one", **settings)) == 0
    found, wanted = losses(tmp_path / "pair"), losses(tmp_path / "one")
    assert found.keys() == wanted.keys()
    # Where sums differ in their last bits, a number may get the code beside.
    within = 1e-3 if optimizer.startswith("q-") else 1e-5
    np.testing.assert_allclose(list(found.values()), [wanted[k] for k in found], rtol=within)


@pytest.mark.slow
def test_a_pair_that_sends_8_bits_and_is_killed_repeats_its_losses_and_goes_on_elsewhere(tmp_path):
    compressed = {"compress_gradients": True, "compress_bits": 8, "mesh": "data=8"}
    settings = {**IN_SUBSPACE, "optimizer": "galore-adamw", "save_every": 3, **compressed}
    assert ended(pair(tmp_path / "whole", **settings), 240)[0] == [0, 0]
    out, other = tmp_path / "run", tmp_path / "other"
    codes, _ = ended(pair(out, ("metrics", "7", "SIGKILL"), **settings), 240)
    assert codes == [-signal.SIGKILL, 2]
    shutil.copytree(out, other)
    assert ended(pair(out, resume=True, **settings), 240)[0] == [0, 0]
    wanted = losses(tmp_path / "whole")
    assert losses(out) == wanted
    # Half the devices share what eight had not sent, and round sums of other rows to 8 bits.
    settings |= {"mesh": "data=4", "out": str(other), "resume": True}
    command = killed_command(settings, "metrics", -1, "SIGTERM")
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    subprocess.run(command["args"], env={**command["env"], "XLA_FLAGS": flags}, check=True)
    found = losses(other)
    np.testing.assert_allclose(list(found.values()), [wanted[k] for k in found], rtol=1e-3)


@pytest.mark.parametrize("left_out", list(OTHERS))
def test_a_process_of_several_must_say_where_it_is(left_out):
    given = {k: v for k, v in OTHERS.items() if k != left_out}
    with pytest.raises(ValueError, match=r"without the others: .* --launcher"):
        hosts.join(small("unused", **given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**OTHERS, "launcher": True}, "--launcher says what --coordinator, --processes, --proc"),
        ({**OTHERS, "process": 2}, "--process 2: expected 0 to 1, below --processes"),
        ({**OTHERS, "coordinator": "host"}, "--coordinator host: expected HOST:PORT"),
    ],
)
def test_what_names_no_processes_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hosts.join(small("unused", **settings))


def test_the_coordinator_listens_at_its_address_alone(monkeypatch):
    given: dict = {}
    monkeypatch.setattr(hosts, "meet", lambda *_: None)
    monkeypatch.setattr(hosts, "say_if_aborted", lambda: None)
    monkeypatch.setattr(hosts, "MET", [])
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.update(options))
    hosts.join(small("unused", **OTHERS))
    assert given["coordinator_bind_address"] == OTHERS["coordinator"]


def test_a_launcher_that_is_not_there_is_an_error_of_one_line():
    command = [sys.executable, "-m", "train.pretrain", "--launcher"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --launcher: the environment has no launcher's variables")
    assert done.stderr.count("\n") == 1


def test_torchruns_variables_say_where_a_process_is(monkeypatch):
    known = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "3"}
    for name, value in {**known, "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    given: list = []
    monkeypatch.setattr(hosts, "initialize", given.append)
    hosts.join(small("unused", launcher=True))
    assert given == [Place("10.0.0.1:29500", 8, 3, 1)]
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match=r"--launcher: .*RANK in the environment: .*'first'"):
        hosts.join(small("unused", launcher=True))


def test_a_process_reads_the_parts_of_the_text_that_fill_its_rows(monkeypatch):
    config = resolve(small("unused", **ADAMW, batch_size=32))
    for own, read in (({*range(16)}, [0, 1, 2, 3]), ({5, 31}, [1, 7])):
        monkeypatch.setattr(assemble, "own_rows", lambda *_, own=own: own)
        data = assemble.assemble(config, lambda _: None).data
        assert (data.parts, data.read) == (8, read)


def test_a_position_has_of_each_part_that_of_the_process_which_reads_it(monkeypatch):
    far = 2**40
    own = (Position(far, 7, 3, 2), START, Position(5, 0, 3, 2), START)
    other = (START, Position(far, 2, 3, 2), Position(5, 0, 3, 2), Position(0, 0, 0, 1))
    numbers = np.array(other, np.int64).view(np.int32)
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.stack([x, numbers]))
    assert hosts.furthest(own) == (own[0], other[1], own[2], other[3])
    assert hosts.furthest(None) is None


def test_processes_compare_where_they_write_and_what_they_see_there(tmp_path, monkeypatch):
    """One would resume a run that the others begin."""
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "config.json").touch()
    seen = {"--out": str(tmp_path), "--resume": True}
    seen["files in --out"] = ["checkpoints/4", "config.json"]

    def compare(values):
        assert values == seen
        raise ValueError("compared")

    monkeypatch.setattr(hosts, "check_same", compare)
    monkeypatch.setattr(run_directory, "check", lambda config: None)
    with pytest.raises(ValueError, match="compared"):
        main(small(tmp_path, resume=True))


def test_the_command_that_resumes_is_that_process_s():
    config = resolve(small("unused", **OTHERS))
    assert resume_command(config).endswith("--coordinator 127.0.0.1:1 --processes 2 --process 0")
