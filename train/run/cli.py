"""A command: flags become a frozen dataclass; wrong use ends with one line and exit code 2."""

import contextlib
import gc
import io
import logging
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import absl.logging

from train.config.settings import flag

Config = TypeVar("Config")


def run(
    main: Callable[[Config], int | None],
    config_type: type[Config],
    prog: str,
    *,
    load: Callable[[str], Config] | None = None,
    args: Sequence[str] | None = None,
) -> NoReturn:
    """Parses the command line, calls `main`, and ends the process with its exit code.

    `config_type` is a frozen dataclass; its attributes' docstrings are the help. `prog` is the
    command as typed; `load` reads the file of the field `config`, which flags override. The exit
    code is 2 for wrong use, unreadable files and full disks, after one line that says what was
    wrong (a traceback with `python -X dev`), and 130 after Ctrl-C.
    """
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # '?' for what the terminal's encoding lacks
    try:
        config = _parse(config_type, prog, args)
        file = getattr(config, "config", None)
        if load is not None and file:
            config = _parse(config_type, prog, args, default=load(file))
        code = main(config)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    # The error's frames may refer to Grain's shared memory, of which Python would warn at its end.
    gc.collect()
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _quiet_libraries() -> None:
    """Keeps libraries from printing more about an error than its message."""
    # Orbax logs pages about an error before it raises it.
    absl.logging.set_verbosity(absl.logging.FATAL)
    # If several writes fail, asyncio logs those that are not awaited any more, and Python warns of
    # those that had not started.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # After an error TensorStore calls back into an event loop that has ended.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _parse(
    config_type: type[Config], prog: str, args: Sequence[str] | None, default: Config | None = None
) -> Config:
    import tyro

    # tyro chooses the characters of its boxes by its output's encoding.
    words, help_text = (
        io.TextIOWrapper(io.BytesIO(), encoding=e, errors="replace", write_through=True)
        for e in ("utf-8", sys.stdout.encoding or "utf-8")
    )
    try:
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(help_text):
            known = {} if default is None else {"default": default}
            options = (tyro.conf.FlagConversionOff,)
            args = _with_values(config_type, sys.argv[1:] if args is None else args)
            return tyro.cli(config_type, prog=prog, args=args, config=options, **known)  # pyrefly: ignore[no-matching-overload]
    except SystemExit as stop:
        if not stop.code:  # --help
            help_text.seek(0)
            print(_without_none(help_text.read()), end="")
            raise
        # tyro prints a box of several lines with a title; its text fits into one line.
        words.seek(0)
        lines = [line.strip("│ ") for line in words.read().splitlines()]
        lines = [line for line in lines if line[:1] not in "╭╰─" and line.strip("- ")]
        text = " ".join(" ".join(lines).split())
        text = re.sub(r" For full helptext, run:? (.*)", r" (help: \1)", text)
        raise ValueError(text) from None


def _with_values(config_type: type, args: Sequence[str]) -> list[str]:
    """The arguments with a value for each flag of a bool: `--x` is `--x True`, `--no-x` False.

    An integer may be a number such as 1e3.
    """
    kinds = {flag(k): get_args(t) or (t,) for k, t in get_type_hints(config_type).items()}
    args, result = list(args), []
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        name = name.replace("_", "-") if arg.startswith("--") else ""
        positive = name.replace("--no-", "--", 1)
        if bool in kinds.get(name, ()) and not equals:
            alone = args[i + 1 : i + 2] not in (["True"], ["False"], ["None"])
            result += [name, "True"] if alone else [name]
        elif name not in kinds and bool in kinds.get(positive, ()) and not equals:
            result += [positive, "False"]
        elif int in kinds.get(name, ()) and equals:
            result.append(f"{name}={_as_integer(value)}")
        elif i and int in (before := kinds.get(args[i - 1].replace("_", "-"), ())):
            result.append(_as_integer(arg))
        elif arg == "none" and i and type(None) in before and str not in before:
            result.append("None")
        else:
            result.append(arg)
    return result


def _as_integer(text: str) -> str:
    """A number such as 1e3 as an integer, 1000; any other text as it is."""
    try:
        return str(int(float(text))) if not text.isdecimal() and float(text).is_integer() else text
    except ValueError:
        return text


def _without_none(help_text: str) -> str:
    """Help in which an optional flag is `INT`, not `{None}|INT (default: None)`."""
    # tyro's box keeps its width: spaces replace what is removed.
    text = re.sub(r"(?m)^([│ ].*)\{None\}\|(\w+)", r"\1\2       ", help_text)
    text = re.sub(r"\{None,([^}]*)\}", r"{\1}     ", text)
    text = re.sub(r"\(default:([\s│]*)None\)", r"         \1     ", text)
    return re.sub(r"(?m)^[│ ] +[│ ]\n", "", text)
