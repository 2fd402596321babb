"""Exports a run's model for Hugging Face's libraries: `python -m train.export`."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from galore_optax.adapters.base import is_adapter, merge
from galore_optax.quantization.array import dequantized
from models.hugging_face.llama import save_llama
from models.hugging_face.peft import save_adapters
from train.run.cli import run
from train.run.directory import check_can_be_made, claim
from train.run.exported import token_ids, write_beside
from train.run.exported_classifier import export_classifier, is_classifier
from train.run.trained import load_trained


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the model of a run's best checkpoint, or of the newest if none was evaluated."""

    run: str
    """Folder of the run."""
    out: str
    """New or empty folder to write to, in the format of transformers, with the tokenizer; adapters
    are merged."""
    adapters: bool = False
    """Write LoRA, DoRA or GradNormLoRP adapters alone, in PEFT's format, into adapters/ of the
    folder, and the model without them into base/."""


def main(config: Export) -> int:
    """Writes the model; ValueError if it is there already, or PEFT cannot store the adapters."""
    out = Path(config.out).absolute()
    check_can_be_made(out, "--out")
    with claim(out):
        _check_empty(out)
        _export(config, out)
    return 0


def _export(config: Export, out: Path) -> None:
    if is_classifier(Path(config.run)):
        if config.adapters:
            raise ValueError("--adapters: a classifier is written whole; leave it out")
        export_classifier(Path(config.run), out)
        return
    trained = load_trained(config.run)

    def save(params: Any, out: Path) -> None:
        model: Any = nnx.merge(trained.graph, dequantized(params))
        ids = token_ids(trained, model.config.token_ids)
        model.config = dataclasses.replace(model.config, token_ids=ids)
        save_llama(model, out)
        write_beside(trained, ids, Path(config.run), out)
        print(f"wrote the model to {out}, with its tokenizer")

    if not config.adapters:
        save(merge(trained.params), out)
        return
    save_adapters(trained.params, out / "adapters", base_model=str(out / "base"))
    print(f"wrote the adapters to {out / 'adapters'}")
    params = trained.params
    bases = jax.tree.map(lambda x: x.base if is_adapter(x) else x, params, is_leaf=is_adapter)
    save(bases, out / "base")


def _check_empty(out: Path) -> None:
    """Raises ValueError if a folder has files that would be overwritten, or read with the model.

    Hidden ones, such as Git's, may be there.
    """
    found = sorted(path.name for path in out.glob("*") if not path.name.startswith("."))
    if found:
        raise ValueError(f"--out {out} already has {found[0]} in it: name an empty or a new folder")


if __name__ == "__main__":
    run(main, Export, "python -m train.export")
