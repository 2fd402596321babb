"""Chat templates: from messages to the text that a model reads, as transformers renders it.

A template is Jinja, run in a sandbox. It does not get the date (`strftime_now`), so that a run can
be repeated; templates that use it where it is defined have a fixed one. `train.data.examples` makes
tokens of the text, and says which of them are predicted.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.hugging_face.files import read_json

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
FILE = "chat_template.jinja"


def load_template(tokenizer: Path | None, named: str | None) -> "ChatTemplate":
    """The template in the file `named`, or else that beside a tokenizer.json.

    ValueError if there is none, or it cannot be read.
    """
    beside = None if tokenizer is None else tokenizer.parent
    settings: dict[str, Any] = {}
    if beside is not None and (beside / "tokenizer_config.json").is_file():
        settings = read_json(beside / "tokenizer_config.json")
    names = {name: _text(settings[name]) for name in _NAMES if settings.get(name) is not None}
    source, place = _default(settings.get("chat_template")), f"chat_template beside {tokenizer}"
    try:
        if named is not None:
            place = f"--chat-template {named}"
            source = Path(named).read_text("utf-8")
        elif beside is not None and (beside / FILE).is_file():
            place = str(beside / FILE)
            source = (beside / FILE).read_text("utf-8")
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


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _default(templates: Any) -> str | None:
    """The template of a tokenizer_config.json, which may have several by name."""
    if isinstance(templates, list):
        by_name = {entry["name"]: entry["template"] for entry in templates}
        return by_name.get("default")
    return templates


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
        import jinja2

        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=answer,
                tools=None,
                documents=None,
                **self._names,
            )
        # The sandbox refuses long ranges; nothing else keeps a template from asking for memory.
        except (jinja2.TemplateError, TypeError, OverflowError, MemoryError) as error:
            said = str(error) or "it needs more memory than there is"
            raise ValueError(f"the chat template cannot write the messages ({said})") from None

    def _compiled(self) -> Any:
        import jinja2
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
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


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
