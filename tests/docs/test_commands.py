"""Every command that a page or a message shows is parsed by the program that it is for."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from paths import ROOT

from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.data.text import C4Text
from train.run import cli
from train.run.assemble import plan_command
from train.run.directory import resume_command

TEXTS = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *(ROOT / "docs").glob("*.md")]


def parse(command: str) -> object:
    """What a command's program makes of its flags."""
    words = shlex.split(command, comments=True)
    at = words.index("-m")
    program = importlib.import_module(words[at + 1])
    kind = next(iter(inspect.signature(program.main).parameters.values())).annotation
    seen = []
    with pytest.raises(SystemExit) as stop:
        cli.run(seen.append, kind, words[at + 1], args=words[at + 2 :])
    assert not stop.value.code, command
    return seen[0]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [
        part for line in lines for part in line.split("&&") if re.search(r"python -m train\.", part)
    ]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_the_pages_commands_are_parsed(page):
    for command in commands(page):
        parse(command)


def test_the_commands_of_messages_are_parsed(tmp_path):
    config = resolve(Pretrain(out=str(tmp_path / "a b")))
    assert parse(resume_command(config)).resume
    assert parse(plan_command(config, 12 * 2**30)).card == 12
    with pytest.raises(ValueError, match="make it with") as error:
        C4Text(tmp_path / "c d", "train")
    (command,) = re.findall("`(.*)`", str(error.value))
    assert parse(command).data_dir == tmp_path / "c d"
