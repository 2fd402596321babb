"""What transformers needs beside a model's weights: tokenizer, ids, and a model card."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from models.hugging_face.files import read_json, write_json
from models.llama.config import TokenIds
from train.config.resume import FROM_HERE
from train.config.settings import HISTORY, FinetuneLM, Pretrain, flag, read_fields
from train.data.agreement import own_settings, token_names
from train.data.chat import FILE as CHAT_TEMPLATE
from train.data.separator import first_and_last
from train.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from train.run.metrics import read_metrics
from train.run.trained import Trained

# The name that the token which separates documents of bytes gets.
_END = "<|endoftext|>"
# Settings by which transformers changes the post-processor of a tokenizer.json, or runs other code.
_OTHER = ("add_bos_token", "add_eos_token", "auto_map")
# The class that takes tokenizer.json as it is.
_AS_IT_IS = {"tokenizer_class": "PreTrainedTokenizerFast"}
# Settings that say nothing of what is trained.
_NOT_SHOWN = ("out", "resume", "config", "workers", "keep", "log_every", "max_skipped", "prompt")


def token_ids(trained: Trained, before: TokenIds) -> TokenIds:
    """The ids for a model's config.json: generation stops at the token that ends a text."""
    return TokenIds(trained.tokenizer.begin, trained.tokenizer.separator, before.pad)


def write_beside(trained: Trained, ids: TokenIds, run: Path, out: Path) -> None:
    """Writes into a model's folder what transformers needs besides, and a model card.

    AutoTokenizer then gives the ids that the model was trained with: a text begins with the token
    that began the documents. A chat template is kept, and a padding token that the model, whose
    config.json is there, has an embedding of.
    """
    known = {f"{name}_token_id": x for name, x in ids._asdict().items() if x is not None}
    write_json(out / "generation_config.json", known)
    content, settings = _tokenizer_files(trained)
    vocabulary = read_json(out / "config.json").get("vocab_size", 0)
    if _padding_id(trained.tokenizer, settings) >= vocabulary:
        settings.pop("pad_token", None)  # transformers says so where one is needed
    write_json(out / "tokenizer.json", content)
    template = _chat_template(trained)
    if template is not None:
        settings.pop("chat_template", None)
        shutil.copyfile(template, out / CHAT_TEMPLATE)
    write_json(out / "tokenizer_config.json", settings)
    (out / "README.md").write_text(_card(trained, run), "utf-8")


def kept_settings(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json has of the files beside a tokenizer.json, which is used as it is.

    Other classes of transformers make another tokenizer of it: BERT's one with small letters,
    unless the settings say otherwise.
    """
    settings = own_settings(path)
    settings |= {k: x for k, x in token_names(settings).items() if k in settings}
    return {name: x for name, x in settings.items() if name not in _OTHER} | _AS_IT_IS


def _tokenizer_files(trained: Trained) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of tokenizer.json and of tokenizer_config.json."""
    tokenizer, settings = trained.tokenizer, {}
    if isinstance(tokenizer, FileTokenizer):
        # Whole, without what training leaves out: truncation, padding, merges dropped at random.
        content = json.loads(tokenizer.as_written.to_str())
        settings = kept_settings(tokenizer.path)
        begin, end = tokenizer.name_of(tokenizer.begin), tokenizer.name_of(tokenizer.separator)
        for name, token in ((begin, tokenizer.begin), (end, tokenizer.separator)):
            _mark_special(content, name, token)
    else:
        content, begin, end = _of_bytes(tokenizer), _END, _END
    if first_and_last(content["post_processor"]) != ([tokenizer.begin], None):
        content["post_processor"] = _beginning(content["post_processor"], begin, tokenizer.begin)
    settings |= {**_AS_IT_IS, "eos_token": end}
    # In a chat template, a name that the files do not give was nothing.
    first = {} if "chat_template" in settings or _chat_template(trained) else {"bos_token": begin}
    return content, {**first, "clean_up_tokenization_spaces": False, **settings}


def _padding_id(tokenizer: Tokenizer, settings: dict[str, Any]) -> int:
    """The id that transformers gives a padding token; -1 if there is none."""
    name = token_names(settings).get("pad_token")
    if name is None or not isinstance(tokenizer, FileTokenizer):
        return -1
    found = tokenizer.as_written.token_to_id(name)
    # transformers adds one that is not in the file.
    return tokenizer.as_written.get_vocab_size() if found is None else found


def _chat_template(trained: Trained) -> Path | None:
    """The file of a chat template, if it is not in tokenizer_config.json."""
    if (named := getattr(trained.config, "chat_template", None)) is not None:
        return Path(named)
    tokenizer = trained.tokenizer
    if isinstance(tokenizer, FileTokenizer) and tokenizer.path.name == "tokenizer.json":
        path = tokenizer.path.parent / CHAT_TEMPLATE
        return path if path.is_file() else None
    return None


def _mark_special(content: dict[str, Any], name: str, token: int) -> None:
    """Has a token's name in a text be the token, which a decoded text leaves out."""
    plain: dict[str, Any] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {x["id"]: x for x in content["added_tokens"]}
    added[token] = plain | added.get(token, {}) | {"id": token, "content": name, "special": True}
    content["added_tokens"] = [added[i] for i in sorted(added)]


def _beginning(before: dict[str, Any] | None, name: str, token: int) -> dict[str, Any]:
    """A post-processor that puts a token before a text, and none after it."""
    parts = before["processors"] if before and before["type"] == "Sequence" else [before]
    kept = [part for part in parts if part and part["type"] == "ByteLevel"]
    first, *texts = (
        {kind: {"id": i, "type_id": 0}}
        for kind, i in (("SpecialToken", name), ("Sequence", "A"), ("Sequence", "B"))
    )
    template = {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
    return {"type": "Sequence", "processors": [*kept, template]}


def _of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """A tokenizer.json with the ids of bytes; its characters for them are GPT-2's."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in seen)
    names = {byte: chr(byte) for byte in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {"type": "BPE", "vocab": {names[byte]: byte for byte in range(256)}, "merges": []},
    }
    _mark_special(content, _END, tokenizer.separator)
    return content


def _card(trained: Trained, run: Path) -> str:
    """A model card: what the model was made of, by which command, and how good it is."""
    config, history = trained.config, read_fields(run / "config.json").get(HISTORY, [])
    lines = [x for x in read_metrics(run) if x["step"] == trained.step and "eval_loss" in x]
    found = lines[-1].get("eval_perplexity") if lines else None
    data = config.data
    if isinstance(config, FinetuneLM):
        data = " ".join(config.data)
    elif data == "builtin":
        data = "the documentation of Python's standard library"
    else:
        data = f"{data} in {config.data_dir}"
    said = (
        "not evaluated"
        if found is None
        else f"{found:,.2f} per token that is predicted, on text that is not trained on"
    )
    begun = "random weights" if config.init is None else f"the weights of {config.init}"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {run.absolute().name}\n\n"
        f"Trained by galore-optax (`{config.optimizer}`), from {begun}. This is step "
        f"{trained.step:,}.\n\n- Data: {data}\n- Perplexity: {said}\n\n"
        f"```bash\n{_commands(config, history, run)}\n```\n"
    )


def _commands(config: Any, history: list[dict[str, Any]], run: Path) -> str:
    """The command that began a run, and those that changed what followed."""
    lines: list[str] = []
    for entry in reversed(history):
        changed = {name: pair for name, pair in entry["changed"].items() if name in FROM_HERE}
        words = ["python", "-m", config.command, "--resume", "--out", str(run)]
        for name, (_, new) in changed.items():
            words += [] if new is None else [flag(name), str(new)]
        if changed:
            lines = [f"# after step {entry['step']}:", shlex.join(words), *lines]
        config = dataclasses.replace(config, **{name: old for name, (old, _) in changed.items()})
    return "\n".join([_command(config), *lines])


def _command(config: Any) -> str:
    """The command that repeats a run, with all flags that matter and have no fixed default."""
    words = ["python", "-m", config.command]
    kind = FinetuneLM if isinstance(config, FinetuneLM) else Pretrain
    for field in dataclasses.fields(kind):
        value = getattr(config, field.name)
        if field.name in _NOT_SHOWN or value == field.default:
            continue
        value = "none" if value is None else value  # where that is not the default
        values = [] if value is True else value if isinstance(value, tuple) else [value]
        negated = value is False
        words += [flag(("no_" if negated else "") + field.name)]
        words += [] if negated else map(str, values)
    return shlex.join(words)
