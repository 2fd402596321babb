"""Sample text from a run: `python -m train.generate --run DIR --prompt TEXT`."""

import dataclasses

from flax import nnx

from galore_optax.adapters.base import merge
from train.config.settings import flag
from train.data.examples import chat_prompt
from train.run.cli import run
from train.run.trained import answer, chat_template, load_trained, sample_text

_NOT_SAMPLING = ("run", "prompt", "chat", "chat_template")


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample text from the best checkpoint of a run, or the newest if none was evaluated."""

    run: str
    """Folder of the run."""
    prompt: str = ""
    """Beginning of the text."""
    chat: bool = False
    """The prompt is a user's message, written by the chat template; the answer is printed."""
    chat_template: str | None = None
    """File with the chat template, in Jinja. Default: that of the run, or of its tokenizer."""
    max_new_tokens: int = 200
    """Tokens to add; fewer if the model ends the document."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int | None = None
    """Sample among this many most likely tokens only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Equal seeds give equal text; from 0 to 2**32 - 1."""


def main(config: Generate) -> int:
    """Prints the prompt and its continuation; raises ValueError for a value out of range."""
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"--seed {config.seed}: expected 0 to 2**32 - 1")
    for name in ("top_k", "top_p"):
        if config.temperature == 0 and getattr(config, name) is not None:
            reason = "--temperature 0 takes the most likely token each time"
            raise ValueError(f"{flag(name)} has no effect: {reason}; leave one of them out")
    if config.chat_template is not None and not config.chat:
        raise ValueError(
            "--chat-template has no effect without --chat: add --chat, or leave it out"
        )
    trained = load_trained(config.run)
    model = nnx.merge(trained.graph, merge(trained.params))
    how = {k: v for k, v in vars(config).items() if k not in _NOT_SAMPLING}
    if config.chat:
        messages = [{"role": "user", "content": config.prompt}]
        prompt = chat_prompt(
            messages, trained.tokenizer, chat_template(trained, config.chat_template)
        )
        print(answer(model, trained.tokenizer, prompt, **how))
        return 0
    print(sample_text(model, trained.tokenizer, config.prompt, stop=True, **how))
    return 0


if __name__ == "__main__":
    run(main, Generate, "python -m train.generate")
