"""A command: flags become a frozen dataclass; wrong use ends with one line and exit code 2."""

import contextlib
import dataclasses
import gc
import io
import itertools
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import absl.logging
import jax

import galore_optax
from train.config.reopen import reopened, without_own_adapter
from train.config.settings import expand_home, flag
from train.run import hosts
from train.run.help import short_help

Config = TypeVar("Config")


def run(
    main: Callable[[Config], int | None],
    config_type: type[Config],
    prog: str,
    *,
    load: Callable[[str], Config] | None = None,
    settings_file: Callable[[Config], str | None] | None = None,
    args: Sequence[str] | None = None,
) -> NoReturn:
    """Parses the command line, calls `main`, and ends the process with its exit code.

    `config_type` is a frozen dataclass; its attributes' docstrings are the help. `prog` is the
    command as typed; `load` reads a file of settings, which flags override: that of the field
    `config`, or the one that `settings_file` names from the flags. The exit code is 2 for wrong
    use, unreadable files and full disks, after one line that says what was wrong (a traceback with
    `python -X dev`), and 130 after Ctrl-C.
    """
    _quiet_libraries()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by a shell's >&- or a service
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # '?' for what the terminal's encoding lacks
    args = sys.argv[1:] if args is None else args
    try:
        if "--version" in args:
            print(f"galore-optax {galore_optax.__version__}, jax {jax.__version__}")
            sys.exit(0)
        if "--help" in args or "-h" in args:
            print(short_help(config_type, prog), end="")
            sys.exit(0)
        config = expand_home(_parse(config_type, prog, args))
        file = settings_file(config) if settings_file else getattr(config, "config", None)
        if load is not None and file:
            base = without_own_adapter(load(file))  # pyrefly: ignore[bad-specialization]
            config = _parse(config_type, prog, args, default=base)
            opened = reopened(base, config)  # pyrefly: ignore[bad-specialization]
            if opened != base:
                config = _parse(config_type, prog, args, default=opened)
            config = expand_home(config)
            config = dataclasses.replace(config, config=file)  # pyrefly: ignore[bad-argument-type]
        code = main(config)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {_with_flags(one_line(error), config_type)}", file=sys.stderr)
        code = 2
        hosts.tell_others(args)
        hosts.end_alone(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
        hosts.end_alone(code)
    # The error's frames may refer to Grain's shared memory, of which Python would warn at its end.
    gc.collect()
    sys.exit(code)


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _with_flags(text: str, config_type: type) -> str:
    """An error of a function of the library, in the words of the command: `top_k=0` is `--top-k 0`.

    Without the advice to give None, which on the command line is to leave the flag out.
    """
    for field in dataclasses.fields(config_type):  # pyrefly: ignore[bad-argument-type]
        if field.name != "data":  # in --mesh it is an axis
            text = re.sub(rf"(?<![\w.-]){field.name}=(?=\S)", f"{flag(field.name)} ", text)
    return re.sub(r",? or None\b", ", or leave it out", text)


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
        # After an error TensorStore calls back into an event loop that has ended, and Orbax's other
        # reads end late.
        late = ("Event loop is closed", "Encountered error while reading array index")
        if not str(unraisable.exc_value).startswith(late):
            before(unraisable)

    sys.unraisablehook = hook


def _parse(
    config_type: type[Config], prog: str, args: Sequence[str], default: Config | None = None
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
            args = _with_values(config_type, args)
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

    A number such as 1e3 is an integer, and `none` is None. Raises ValueError for other numbers.
    """
    kinds = {flag(k): get_args(t) or (t,) for k, t in get_type_hints(config_type).items()}
    result: list[str] = []
    before = ""  # the flag whose value is next
    for arg, after in itertools.zip_longest(args, args[1:], fillvalue=""):
        name, equals, value = arg.partition("=")
        name = name.replace("_", "-") if arg.startswith("--") else ""
        positive = name.replace("--no-", "--", 1)
        if name == "--help-all":
            result.append("--help")
        elif bool in kinds.get(name, ()) and not equals:
            result += [name] if after in ("True", "False", "None") else [name, "True"]
        elif name not in kinds and bool in kinds.get(positive, ()) and not equals:
            result += [positive, "False"]
        elif name in kinds and equals:
            result.append(f"{name}={_number(name, value, kinds[name])}")
        elif not name and before in kinds:
            result.append(_number(before, arg, kinds[before]))
        else:
            result.append(arg)
        before = "" if equals else name
    return result


def _number(name: str, text: str, kinds: tuple[Any, ...]) -> str:
    """A flag's value as tyro reads it; text that is not for an integer or a number stays."""
    if str in kinds or not {int, float} & {*kinds}:
        return text
    if type(None) in kinds and text in ("none", "None"):
        return "None"
    try:
        if float in kinds or text.lstrip("+-").isdecimal():
            return str(float(text)) if float in kinds else text
        if float(text).is_integer():
            return str(int(float(text)))
    except (ValueError, OverflowError):
        pass
    kind = "a number" if float in kinds else "an integer, such as 1000 or 1e3"
    raise ValueError(f"{name} {text}: expected {kind}")


def _without_none(help_text: str) -> str:
    """Help in which an optional flag is `INT`, not `{None}|INT (default: None)`."""
    # tyro's box keeps its width: spaces replace what is removed.
    text = re.sub(r"(?m)^([│ ].*)\{None\}\|(\w+)", r"\1\2       ", help_text)
    text = re.sub(r"\{None,([^}]*)\}", r"{\1}     ", text)
    text = re.sub(r"\(default:([\s│]*)None\)", r"         \1     ", text)
    return re.sub(r"(?m)^[│ ] +[│ ]\n", "", text)
