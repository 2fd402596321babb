"""A run's folder: one process at a time, also where two start in the same moment."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from small_run import small

from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.run import directory as run_directory


def test_of_two_that_found_the_folder_free_one_gets_it(tmp_path):
    config = resolve(small(tmp_path / "run"))
    for _ in range(2):
        run_directory.check(config)
    with run_directory.hold(config):
        with pytest.raises(ValueError, match=r"--out .*/run is in use"), run_directory.hold(config):
            pass
        with pytest.raises(ValueError, match=r"--out .*/run is in use"):
            run_directory.check(config)
    with run_directory.hold(config):  # left, so free again
        pass


@pytest.mark.parametrize("third", [False, True])
def test_a_lock_deleted_between_its_opening_and_its_locking_is_none(tmp_path, monkeypatch, third):
    flock = run_directory.fcntl.flock

    def late(file, how):
        """Another process ends meanwhile, and a third begins."""
        Path(file.name).unlink()
        if third:
            Path(file.name).touch()
        flock(file, how)

    monkeypatch.setattr(run_directory.fcntl, "flock", late)
    with pytest.raises(ValueError, match="is in use"), run_directory.claim(tmp_path / "out"):
        pass


def test_a_folder_that_another_process_has_used_since_it_was_checked_is_refused(tmp_path):
    config = resolve(small(tmp_path / "run"))
    run_directory.check(config)
    with run_directory.hold(config):  # the other process
        run_directory.write_config(config, {})
    with pytest.raises(ValueError, match="has a run: add --resume"), run_directory.hold(config):
        pass


def test_a_run_killed_before_its_config_json_leaves_a_folder_that_counts_as_empty(tmp_path):
    config = resolve(small(tmp_path / "run"))
    with run_directory.hold(config):
        (tmp_path / "run" / ".config.json.draft").write_text("{")
    assert run_directory.check(config) is None


def test_files_of_a_run_that_was_killed_before_its_first_checkpoint_may_be_others(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    config, copy = resolve(small(tmp_path / "run")), tmp_path / "run" / "chat_template" / "t.jinja"
    with run_directory.hold(config):
        for name, step, kept in (("a", 0, "a"), ("b", 0, "b"), ("a", 4, "b")):
            files = {"chat_template": {"t.jinja": tmp_path / name}}
            run_directory.write_config(config, files, step)
            assert copy.read_text() == kept
        # A resumed run has its own copy.
        run_directory.write_config(config, {"chat_template": {"t.jinja": copy}})
        assert copy.read_text() == "b"


def test_a_config_json_that_holds_no_object_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json is not a config.json of train.pretrain"):
        run_directory.check(resolve(small(tmp_path, resume=True)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_by_the_folder(tmp_path, number):
    config = resolve(small(tmp_path / "run"))
    with (
        pytest.raises(OSError, match=r"--out .*/run: cannot write into it: (No space|Disk quota)"),
        run_directory.hold(config),
    ):
        raise OSError(number, os.strerror(number))  # of a file that is open, as Python raises it
    with pytest.raises(OSError, match="'/dev/full'"), run_directory.hold(config):
        raise OSError(number, os.strerror(number), "/dev/full")


def test_a_run_is_finished_when_its_summary_is_there(tmp_path):
    config = resolve(small(tmp_path / "run"))
    assert not run_directory.finished(config)
    with run_directory.hold(config):
        assert not run_directory.finished(config)
        run_directory.write_config(config, {})
        run_directory.write_json(tmp_path / "run" / "summary.json", {})
    assert run_directory.finished(config)
    for content, says in (("[]", "holds no object"), ('{"steps": "x"}', "steps='x', not an int")):
        (tmp_path / "run" / "summary.json").write_text(content)
        with pytest.raises(ValueError, match=rf"summary\.json .*{says}"):
            run_directory.finished(config)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_that_cannot_be_made_is_named_before_the_data_are_read():
    config = resolve(Pretrain(out="/proc/self/a/b"))
    with pytest.raises(OSError, match="--out /proc/self/a/b: cannot write into /proc/"):
        run_directory.check(config)


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket"])
def test_a_url_is_refused_and_no_folder_of_its_name_is_made(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--out {url} is no folder: mount the object store"):
        run_directory.check(resolve(small(url)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["[a]/run", "run*", "run?"])
def test_a_folder_in_which_orbax_would_not_find_its_own_files_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"--out .*run.*: checkpoints cannot be written into"):
        run_directory.check(resolve(small(tmp_path / name)))
    assert not [*tmp_path.iterdir()]


def test_the_check_of_a_folder_leaves_nothing(tmp_path):
    assert run_directory.check(resolve(Pretrain(out=str(tmp_path / "a" / "b")))) is None
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named_and_nothing_changes(tmp_path):
    with pytest.raises(OSError, match=r"--dump .*none/x cannot be written \(No such file"):
        run_directory.check_can_be_written(tmp_path / "none" / "x", "--dump")
    (tmp_path / "there").write_text("a")
    for name in ("there", "x"):
        run_directory.check_can_be_written(tmp_path / name, "--dump")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("there", "a")]


def test_files_are_in_utf_8_whatever_the_locale(tmp_path):
    # A chat template has such names of tokens: read in another encoding, they are ordinary text.
    script = (
        "import pathlib\n"
        "from models.hugging_face.files import read_json\n"
        "from train.config.settings import read_fields\n"
        "from train.run.directory import write_at_once\n"
        "path = pathlib.Path('settings.json')\n"
        'write_at_once(path, \'{"user": "<\uff5cUser\uff5c>"}\')\n'
        "assert read_json(path) == read_fields(path) == {'user': '<\uff5cUser\uff5c>'}\n"
    )
    (tmp_path / "script.py").write_text(script, "utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **ascii_only}
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "settings.json").read_bytes().count("\uff5c".encode()) == 2
