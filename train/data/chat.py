"""Chat templates: from messages to the text that a model reads, as transformers renders it.

A template is Jinja, run in a sandbox. It does not get the date (`strftime_now`), so that a run can
be repeated; templates that use it where it is defined have a fixed one. `train.data.examples` makes
tokens of the text, and says which of them are predicted.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.data.agreement import own_settings, token_names
from train.data.tokenizer import FileTokenizer, Tokenizer

FILE = "chat_template.jinja"


def load_template(tokenizer: Tokenizer, named: str | None) -> "ChatTemplate":
    """The template in the file `named`, or else that beside a tokenizer.json.

    Its `eos_token` is the tokenizer's separator. ValueError if there is none, or it cannot be read.
    """
    beside, settings, names, place = None, {}, {}, "chat_template"
    if isinstance(tokenizer, FileTokenizer):
        settings = own_settings(tokenizer.path)
        names = token_names(settings) | {"eos_token": tokenizer.name_of(tokenizer.separator)}
        # Other files belong to one of that name.
        beside = tokenizer.path.parent if tokenizer.path.name == "tokenizer.json" else None
        place = f"chat_template beside {tokenizer.path}"
    try:
        source = _default(settings.get("chat_template"))
        if named is not None:
            place = f"--chat-template {named}"
            source = Path(named).read_text("utf-8")
        elif beside is not None and (beside / FILE).is_file():
            place, other = str(beside / FILE), source
            source = (beside / FILE).read_text("utf-8")
            if other is not None and other.strip() != source.strip():
                said = "tokenizer_config.json beside it has another chat_template"
                raise ValueError(f"{said}: delete the wrong one, or give one by --chat-template")
        if source is not None:
            return ChatTemplate(source, names)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{place} cannot be used: {said}") from None
    where = "the tokenizer has none" if beside is None else f"{beside} has none"
    raise ValueError(
        f"`messages` need a chat template, and {where}: give a file with one in Jinja by "
        "--chat-template"
    )


def _default(templates: Any) -> str | None:
    """The template of a tokenizer_config.json, which may have several by name."""
    match templates:
        case None | str():
            return templates
        case [*entries] if all(isinstance(x, dict) for x in entries):
            named = (x for x in entries if x.get("name") == "default")
            return _default(next(named, {}).get("template"))
    raise ValueError("neither a text nor a list of objects with `name` and `template`")


class ChatTemplate:
    """A template, and the names of the tokenizer's special tokens, which it may write.

    ValueError if it is not Jinja.
    """

    def __init__(self, source: str, names: dict[str, str]):
        self.source, self._names = source, names
        self._template = self._compiled()

    def render(self, messages: Sequence[dict[str, str]], *, answer: bool = False) -> str:
        """The text of messages; with `answer` up to where the assistant's answer begins.

        ValueError if the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=answer,
                tools=None,
                documents=None,
                **self._names,
            )
        except Exception as error:  # a template may compute anything
            said = f"the chat template cannot write the messages ({_said(error)})"
            raise ValueError(said) from None

    def _compiled(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # Transformers' settings.
        environment: Any = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_generation(), "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self.source)
        except Exception as error:  # also those of Python's compiler
            raise ValueError(f"the chat template is not valid Jinja: {_said(error)}") from None


def _said(error: Exception) -> str:
    import jinja2

    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    own = isinstance(error, jinja2.TemplateError)
    return str(error) if own else f"{type(error).__name__}: {error}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _generation() -> type:
    """The tag {% generation %} of transformers, which marks answers and writes nothing."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
