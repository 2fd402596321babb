"""A run that fine-tunes an encoder on a task of GLUE: its parts, its evaluation, what it leaves."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from models.encoder.config import EncoderConfig, flops_per_token, weight_table
from models.hugging_face.files import read_json
from models.hugging_face.roberta import check_weights, read_weights
from models.hugging_face.roberta_config import to_theirs
from train.config.glue import FILES, TOKENIZER, ResolvedFinetune, model_folder, read_model
from train.config.resume import lasting
from train.data.glue import (
    TASKS,
    TEST,
    VALIDATION,
    Examples,
    Task,
    load_examples,
    predictions_text,
    splits,
)
from train.data.pairs import PairData, PairTokenizer, pair_data
from train.run import directory as run_directory
from train.run.checkpoint import Checkpoints
from train.run.initial import state_from
from train.run.metrics import evaluation_losses, read_metrics
from train.run.parts import Evaluation, Log, Parts, log_devices, log_programs
from train.run.scores import scores
from train.step.classifier import make_programs, model_config
from train.step.mesh import make_mesh
from train.step.microbatches import check_batch
from train.step.programs import weight_keys
from train.step.state import Params, TrainState

_NAMES = ("predictions.tsv", "predictions-mismatched.tsv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlueParts(Parts):
    """What a run that trains a classifier computes with."""

    unit: ClassVar[str] = "per example"
    metric: ClassVar[str | None] = "eval_metric"

    config: ResolvedFinetune
    evaluation: list[PairData]  # of each split of the validation
    test: list[PairData]  # to predict; empty if the data have no test
    length: int  # of the longest batch

    @property
    def task(self) -> Task:
        """The task."""
        return TASKS[self.config.task]

    def evaluate(self, params: Params, stopped: Callable[[], bool]) -> Evaluation | None:
        """The mean loss and the task's metrics; of MNLI's mismatched split, too."""
        values: dict[str, float] = {}
        for data, prefix in zip(self.evaluation, ("eval_", "eval_mismatched_"), strict=False):
            found = self._outputs(params, data, stopped)
            if found is None:
                return None
            loss, outputs = found
            values[f"{prefix}loss"] = loss
            measured = scores(self.task.metrics, self._predicted(outputs), data.labels)
            whole = np.all(np.isfinite(outputs))  # the largest of NaNs would be the first class
            values |= {f"{prefix}{k}": x if whole else math.nan for k, x in measured.items()}
        values = {"eval_metric": values[f"eval_{self.task.metrics[0]}"], **values}
        named = {k.removeprefix("eval_"): v for k, v in values.items() if k != "eval_metric"}
        return Evaluation(values, ", ".join(f"{k} {v:.4f}" for k, v in named.items()))

    def leave(self, state: TrainState, log: Log) -> dict[str, Any]:
        """Writes the predictions of the best checkpoint, whose evaluation the summary has."""
        directory = run_directory.directory(self.config)
        there, how = directory / "checkpoints", {"run": self.made_with, "read_only": True}
        with Checkpoints(there, 1, log, self._by_metric(directory), **how) as checkpoints:
            step, params = checkpoints.restore_params(self.abstract.params)
        predicted = self.test or self.evaluation
        for data, name in zip(predicted, _NAMES, strict=False):
            found = self._outputs(params, data, lambda: False)
            assert found is not None
            of = "the test" if self.test else "the validation, since the data have no test"
            said = f"predictions of {of}, by the weights after step {step}: {directory / name}"
            if not np.all(np.isfinite(found[1])):
                log(f"no {said}: the model's outputs are not finite")
                continue
            text = predictions_text(self.task, self._predicted(found[1]).tolist())
            run_directory.write_at_once(directory / name, text)
            log(said)
        lines = [line for line in read_metrics(directory) if "eval_loss" in line]
        best = next((line for line in lines if line["step"] == step), None)
        if best is None:  # the line was lost
            found = self.evaluate(params, lambda: False)
            assert found is not None
            best = found.values
        values = {name: value for name, value in best.items() if name != "step"}
        last = {"best_step": step, "last_eval_metric": lines[-1]["eval_metric"]}
        return {"task": self.config.task, "metric": self.task.metrics[0], **values, **last}

    def flops_per_token(self) -> float:
        """The operations to train on one token of the longest batch."""
        return flops_per_token(self.model, self.length)

    def less_memory(self, available: int) -> str:
        """What to do if a step takes more than the bytes of a device."""
        return self.config.less_memory

    def _by_metric(self, directory: Path) -> dict[int, float]:
        return evaluation_losses(directory, self.metric)

    def _outputs(
        self, params: Params, data: PairData, stopped: Callable[[], bool]
    ) -> tuple[float, Float[np.ndarray, "N C"]] | None:
        """The mean loss and all outputs of a split, in its order; None if stopped meanwhile."""
        batches, numbers = zip(
            *data.evaluation(self.config.batch_size // self.config.accumulate), strict=True
        )
        results = self.run_evaluation(params, [*batches], stopped)
        if results is None:
            return None
        outputs = np.empty((len(data.rows), self.task.classes), np.float32)
        for (_, logits), own in zip(results, numbers, strict=True):
            outputs[own] = logits[: len(own)]
        loss = float(np.sum([loss for loss, _ in results], dtype=np.float64) / len(data.rows))
        return loss, outputs

    def _predicted(self, outputs: Float[np.ndarray, "N C"]) -> np.ndarray:
        return outputs.argmax(-1) if self.task.labels else outputs[:, 0]


def assemble(examples: Examples, config: ResolvedFinetune, log: Log) -> GlueParts:
    """Builds a run from its settings and the training examples, and writes nothing."""
    mesh, init, own = make_mesh(config.mesh), Path(config.init), model_folder(config)
    check_batch(config.batch_size, config.accumulate, mesh)
    log_devices(config, mesh, log)
    encoder = read_model(config)
    model = model_config(config, encoder, TASKS[config.task].classes)
    path = own / TOKENIZER
    if not path.is_file():
        raise ValueError(f"--init {init} has no tokenizer.json: save the fast tokenizer there")
    tokenizer = PairTokenizer(
        path, config.seq_len, model.vocab_size, types_read(model), model.pad_id
    )
    # BERT's padding has no id of its own: the mask alone says what it is.
    how = {"batch_size": config.batch_size, "pad_id": model.pad_id or 0, "seed": config.seed}
    data = pair_data(examples, tokenizer, **how)
    named = splits(config.task)
    found = {name: load_examples(config.task, name, config.data_dir) for kind in (VALIDATION, TEST)
             for name in named[kind]}  # fmt: skip
    evaluation, test = (
        [pair_data(x, tokenizer, **how) for name in named[kind] if (x := found[name]) is not None]
        for kind in (VALIDATION, TEST)
    )
    length = max(part.longest() for part in (data, *evaluation))
    count = sum(len(part.rows) for part in evaluation)
    log(
        f"data: {config.task} in {config.data_dir}, {len(examples):,} examples to train on, "
        f"{count:,} to evaluate on; batches of {config.batch_size}, up to {length} tokens long"
    )
    programs = make_programs(config, model, mesh, length)
    if not run_directory.has_checkpoint(config):  # before the step is compiled
        check_weights(init, model)
    initial = partial(_initial, config, model, programs, log)
    said = f"{init.name}, dropout {model.dropout}"
    log_programs(config, programs, said, f"weights of {init}", log)
    made_with = {
        **lasting(config),
        "sizes of the model": to_theirs(model),
        "content of the tokenizer": content_of_tokenizer(path),
        "content of the examples": _content_of(examples),
        "content of the evaluation": {
            name: _content_of(x) for name in named[VALIDATION] if (x := found[name]) is not None
        },
    }
    return GlueParts(
        **vars(programs),
        name=f"{config.task}, {init.name}",
        initial=initial,
        data=data,
        made_with=made_with,
        kept={"model": {name: own / name for name in FILES if (own / name).is_file()}},
        config=config,
        evaluation=evaluation,
        test=test,
        length=length,
    )


def types_read(model: EncoderConfig) -> int:
    """How many types of tokens a model is given."""
    # RoBERTa's tokenizers number the texts of a pair for other models; it never learnt them.
    return 1 if model.pad_id is not None else model.token_types


def content_of_tokenizer(path: Path) -> str:
    """What a checkpoint must agree with of its tokenizer.json."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _content_of(examples: Examples) -> str:
    digest = hashlib.sha256(repr(examples.texts).encode())
    digest.update(examples.labels.tobytes())
    return digest.hexdigest()[:16]


def _initial(config: ResolvedFinetune, model: EncoderConfig, programs: Any, log: Log) -> TrainState:
    """The weights of --init, with random ones for what the task needs besides."""
    return state_from(config, programs, _weights(config, model, log))


def _weights(
    config: ResolvedFinetune, model: EncoderConfig, log: Log
) -> Iterator[tuple[tuple[str, ...], Float[np.ndarray, "..."]]]:
    table: dict[Any, Any] = flatten_dict(weight_table(model))
    order = label_order(read_json(Path(config.init) / FILES[0]), TASKS[config.task])
    for path, array in read_weights(Path(config.init), model):
        del table[path]
        yield path, array[..., order] if path[0].startswith("classifier") else array
    if table:
        log(f"new weights, not in {config.init}: {', '.join('/'.join(path) for path in table)}")
    _, key = weight_keys(jax.random.key(config.seed))
    for i, (path, weight) in enumerate(table.items()):
        yield path, _drawn(jax.random.fold_in(key, i), weight, model)


def label_order(config: Mapping[str, Any], task: Task) -> Any:
    """Where a classifier of transformers, which has a `config`, has each label of a task.

    All as they are, unless its id2label has the same names in another order.
    """
    said = config.get("id2label")
    names = [str(said.get(str(i))) for i in range(len(said))] if isinstance(said, dict) else []
    names = [re.sub("[- ]", "_", name.lower()) for name in names]
    for own in task.spellings:
        if names and sorted(names) == sorted(own):
            return [names.index(label) for label in own]
    return slice(None)


def _drawn(key: Array, weight: Any, model: EncoderConfig) -> np.ndarray:
    if weight.fill is not None:
        return np.full(weight.shape, weight.fill, model.param_dtype)
    drawn = jax.random.normal(key, weight.shape, np.float32)  # with JAX_ENABLE_X64, too
    return np.asarray(0.02 * drawn).astype(model.param_dtype)
