"""The encoder of a run of train.finetune, as transformers reads it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from galore_optax.adapters.base import merge
from galore_optax.quantization.array import dequantized
from models.encoder.config import EncoderConfig
from models.hugging_face.files import read_json, write_json
from models.hugging_face.roberta import save_roberta
from train.config.glue import TOKENIZER, Finetune, ResolvedFinetune, model_folder, read_model
from train.config.resolve import load
from train.config.resume import lasting
from train.data.agreement import OF_TOKENIZER
from train.data.glue import TASKS
from train.data.tokenizer import read_tokenizer
from train.run.checkpoint import Checkpoints
from train.run.exported import kept_settings
from train.run.glue import GlueParts, content_of_tokenizer, types_read
from train.run.metrics import evaluation_losses
from train.step.classifier import abstract_params, model_config
from train.step.mesh import make_mesh, replicated


def is_classifier(run: Path) -> bool:
    """Whether a folder is a run of train.finetune."""
    try:
        return "task" in json.loads((run / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # the reader of other runs says what is wrong


def export_classifier(run: Path, out: Path) -> None:
    """Writes the weights of the run's best checkpoint, and the tokenizer.

    Adapters are merged. ValueError if there is no checkpoint, or a model in `out`.
    """
    settings = dataclasses.replace(load(run / "config.json", Finetune), out=str(run))
    config = ResolvedFinetune(**vars(settings))
    if config.task is None:
        raise ValueError(f"{run / 'config.json'} has no task")
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"--run {run} has no checkpoint yet")
    own, task = model_folder(config), TASKS[config.task]
    path = own / TOKENIZER
    model = model_config(config, read_model(config), task.classes)
    graph, _, shapes = abstract_params(config, model)
    place = replicated(make_mesh(None))
    shapes = jax.tree.map(lambda x: x.update(sharding=place), shapes)
    made_with = {**lasting(config), "content of the tokenizer": content_of_tokenizer(path)}
    found, how = evaluation_losses(run, GlueParts.metric), {"run": made_with}
    with Checkpoints(run / "checkpoints", 1, print, found, read_only=True, **how) as checkpoints:
        step, params = checkpoints.restore_params(shapes)
    save_roberta(nnx.merge(graph, dequantized(merge(params))), out)
    content = read_json(out / "config.json") | outputs_of(config.task)
    write_json(out / "config.json", content)
    # Without what training leaves out: truncation, padding, merges dropped at random.
    write_json(out / TOKENIZER, json.loads(read_tokenizer(path).to_str()))
    write_json(out / OF_TOKENIZER[0], _settings(path, model))
    print(f"wrote the classifier after step {step} to {out}, with its tokenizer")


def outputs_of(name: str) -> dict[str, Any]:
    """What a config.json says of a task's outputs, by which transformers' pipelines show them."""
    labels = TASKS[name].labels
    if not labels:  # a pipeline would take a single output for a logit
        return {"finetuning_task": name, "problem_type": "regression"}
    return {
        "finetuning_task": name,
        "problem_type": "single_label_classification",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _settings(path: Path, model: EncoderConfig) -> dict[str, Any]:
    """The content of tokenizer_config.json, by which transformers makes the rows of training."""
    tokenizer, types = read_tokenizer(path), ["token_type_ids"] * (types_read(model) > 1)
    pad = tokenizer.get_added_tokens_decoder().get(model.pad_id or 0)
    padding = {} if pad is None else {"pad_token": pad.content}
    names = ["input_ids", *types, "attention_mask"]
    rows = {"model_input_names": names, "padding_side": "right"}
    return padding | kept_settings(path) | rows
