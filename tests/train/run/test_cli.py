"""A command: its exit codes, and how errors are printed."""

import asyncio
import dataclasses
import io
import sys
import threading
import weakref

import pytest

from train.config.settings import Pretrain
from train.run import cli


def test_a_full_disk_is_one_line_and_exit_code_2(capsys):
    def fail(config: Pretrain) -> int:
        raise OSError(28, "No space left on device", "runs/x/metrics.jsonl")

    with pytest.raises(SystemExit) as stop:
        cli.run(fail, Pretrain, "train", args=[])
    assert stop.value.code == 2
    assert "No space left on device: 'runs/x/metrics.jsonl'" in capsys.readouterr().err


def test_what_fails_beside_an_error_is_not_logged(caplog):
    async def write():
        pass

    async def leave_writes():
        asyncio.get_running_loop().create_future().set_exception(OSError("full"))
        write()  # and one that has not begun

    def fail(config: Pretrain) -> int:
        asyncio.run(leave_writes())
        raise OSError("full")

    with pytest.raises(SystemExit):
        cli.run(fail, Pretrain, "train", args=[])
    assert not caplog.records


def test_an_errors_frames_are_gone_when_a_command_ends():
    held = []

    def fail(config: Pretrain) -> int:
        shared_memory = threading.Thread()
        held.append(weakref.ref(shared_memory))
        error = ValueError("a cycle: the error's frame has the error")
        raise error

    with pytest.raises(SystemExit):
        cli.run(fail, Pretrain, "train", args=[])
    assert held[0]() is None


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_an_encoding_lacks_is_replaced(monkeypatch, name):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda _: print("Höhe", file=stream), Pretrain, "train", args=[])
    assert not stop.value.code
    assert stream.buffer.getvalue() == b"H?he\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_command_runs_with_a_closed_output(monkeypatch, name):
    def main(config: Pretrain) -> int:
        print(config.steps)
        print(config.steps, file=sys.stderr)
        return 5

    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop:
        cli.run(main, Pretrain, "train", args=["--steps", "3"])
    assert stop.value.code == 5
    getattr(sys, name).close()


def test_ctrl_c_is_one_line(capsys):
    def stop(config: Pretrain) -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(stop, Pretrain, "train", args=[])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_exit_code_is_mains(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda _: 143, Pretrain, "train", args=[])
    assert stop.value.code == 143


def test_errors_of_the_library_name_flags(capsys):
    def fail(config: Pretrain) -> int:
        raise ValueError("seq_len=0 or None: give 1 or more; tokenizer='x', not max_seq_len=3")

    with pytest.raises(SystemExit):
        cli.run(fail, Pretrain, "train", args=[])
    said = "--seq-len 0, or leave it out: give 1 or more; --tokenizer 'x', not max_seq_len=3"
    assert capsys.readouterr().err == f"error: {said}\n"


def test_an_axis_of_the_mesh_is_not_taken_for_a_flag(capsys):
    @dataclasses.dataclass(frozen=True)
    class WithData:
        data: str = "builtin"
        """Text."""

    def fail(config):
        raise ValueError("--mesh 'data=x': such as data=2,fsdp=4")

    with pytest.raises(SystemExit):
        cli.run(fail, WithData, "command", args=[])
    assert capsys.readouterr().err == "error: --mesh 'data=x': such as data=2,fsdp=4\n"
