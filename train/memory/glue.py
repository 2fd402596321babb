"""The fine-tuning of an encoder on GLUE as `train.plan` plans it: without weights and data."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from models.encoder.config import SIZES, EncoderConfig
from models.hugging_face.files import read_json
from models.hugging_face.roberta_config import from_theirs
from train.config.glue import Finetune, ResolvedFinetune, resolve_for
from train.config.settings import Pretrain, expand_home, flag
from train.data.glue import TASKS
from train.step.classifier import make_programs, model_config
from train.step.programs import Programs

_DEFAULT = "roberta-base"


def encoder(init: str | None) -> tuple[EncoderConfig, str]:
    """The sizes and the name of the encoder in a folder of transformers; None: RoBERTa-base."""
    if init is None:
        return SIZES[_DEFAULT], _DEFAULT
    folder = Path(init)
    return from_theirs(read_json(folder / "config.json"), {}), folder.absolute().name


def settings(values: Mapping[str, Any]) -> ResolvedFinetune:
    """The settings of a fine-tuning, from those of a pre-training and the task.

    ValueError if one has no effect on a fine-tuning.
    """
    own = {f.name for f in dataclasses.fields(Finetune)}
    # What `Finetune` has another default for is as if not given where it is as in `Pretrain`.
    given = {k: v for k, v in values.items() if k == "task" or v != getattr(Pretrain, k)}
    for name in given.keys() - own:
        raise ValueError(f"{flag(name)} {given[name]} has no effect with --task: leave it out")
    config = expand_home(Finetune(**given))
    return resolve_for(config, TASKS[str(config.task)].examples, encoder(config.init)[0])


def programs_of(config: ResolvedFinetune, mesh: Mesh) -> Programs:
    """What a run computes with, for batches of --seq-len tokens."""
    sizes, _ = encoder(config.init)
    whole = model_config(config, sizes, TASKS[config.task].classes)
    return make_programs(config, whole, mesh, config.seq_len)
