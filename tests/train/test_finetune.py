"""A fine-tuning on GLUE: trained, resumed, predicted, refused."""

import dataclasses
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_glue import small_glue, write_encoder, write_mrpc
from small_run import losses, unfinished

from galore_optax.adapters.base import is_adapter
from models.encoder.config import weight_table
from models.hugging_face.roberta import load_roberta, read_config
from train.config.glue import Finetune, resolve
from train.config.optimizers import OPTIMIZERS
from train.config.resolve import load
from train.config.settings import to_json
from train.config.weights import split_params
from train.data.glue import TASKS, load_examples
from train.data.pairs import PairTokenizer, pair_data
from train.export import Export
from train.export import main as export
from train.finetune import main
from train.run import cli, glue
from train.run.exported_classifier import outputs_of
from train.run.glue import assemble, label_order
from train.run.metrics import read_metrics
from train.step.classifier import make_programs, model_config
from train.step.mesh import make_mesh


def load_fields(resolved):
    return Finetune(**to_json(resolved), out=resolved.out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("glue")


@pytest.fixture(scope="module")
def finished(folder):
    """A run that nothing interrupted, with all of its checkpoints."""
    assert main(small_glue(folder, out=str(folder / "whole"))) == 0
    return folder / "whole"


def test_a_run_leaves_metrics_the_best_checkpoints_summary_and_predictions(finished):
    lines = [line for line in read_metrics(finished) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 4, 8, 12]
    assert all(line["eval_metric"] == line["eval_f1"] for line in lines)
    summary = json.loads((finished / "summary.json").read_text())
    best = max(lines[1:], key=lambda line: line["eval_metric"])  # step 0 has no checkpoint
    assert summary["metric"] == "f1"
    assert summary["eval_metric"] == best["eval_metric"]
    assert summary["eval_accuracy"] == best["eval_accuracy"]
    assert summary["best_step"] == next(
        line["step"] for line in reversed(lines) if line["eval_metric"] == best["eval_metric"]
    )
    assert summary["last_eval_metric"] == lines[-1]["eval_metric"]
    assert summary["optimizer_state_bytes"] < summary["adamw_state_bytes"]
    trained = [line for line in read_metrics(finished) if "loss" in line]
    # Tokens without padding, not examples.
    tokens = [line["tokens"] for line in trained]
    assert all(8 * 9 < b - a < 8 * 26 for a, b in itertools.pairwise(tokens))
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert trained[-1]["learning_rate"] < 0.2 * 0.01
    text = (finished / "predictions.tsv").read_text().splitlines()
    assert text[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in text[1:]] == [str(i) for i in range(20)]
    assert {line.split("\t")[1] for line in text[1:]} <= {"0", "1"}
    assert (finished / "loss.png").is_file()


def test_predictions_have_the_metric_of_the_summary(finished, folder):
    dev = load_examples("mrpc", "validation", folder / "data")
    lines = (finished / "predictions.tsv").read_text().splitlines()[1:]
    said = [int(line.split("\t")[1]) for line in lines]
    accuracy = json.loads((finished / "summary.json").read_text())["eval_accuracy"]
    assert np.mean(np.array(said) == dev.labels) == pytest.approx(accuracy)


def test_outputs_that_are_not_finite_have_no_metric_and_are_no_predictions(
    finished, folder, tmp_path
):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "predictions.tsv").unlink()
    config, said = resolve(small_glue(folder, out=str(copy), resume=True), 40), []
    examples = load_examples("mrpc", "train", folder / "data")
    parts = assemble(examples, config, lambda _: None)
    outputs = np.full((8, 2), np.nan, np.float32)
    parts = dataclasses.replace(parts, eval_step=lambda *_: (np.float32(np.nan), outputs))
    found = parts.evaluate(parts.abstract.params, lambda: False)
    assert np.isnan([found.values["eval_metric"], found.values["eval_accuracy"]]).all()
    parts.leave(parts.abstract, said.append)
    assert "the model's outputs are not finite" in said[-1]
    assert not (copy / "predictions.tsv").exists()


def test_the_exported_classifier_gives_the_predictions_of_the_run(finished, folder, tmp_path):
    out = tmp_path / "exported"
    assert export(Export(run=str(finished), out=str(out))) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1"}
    assert config["problem_type"] == "single_label_classification"
    # As transformers makes the rows of training: with types, and small and large letters as here.
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "pad_token": "<s>",
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    before = json.loads((folder / "encoder" / "tokenizer.json").read_text())
    after = json.loads((out / "tokenizer.json").read_text())
    assert before.pop("truncation")
    assert after.pop("truncation") is None
    assert before == after
    model = load_roberta(out)
    dev = load_examples("mrpc", "validation", folder / "data")
    tokenizer = PairTokenizer(out / "tokenizer.json", 40, 24, 2)
    (batch, numbers), *_ = pair_data(dev, tokenizer, batch_size=20, pad_id=0).evaluation(20)
    hidden = model(batch["inputs"], mask=batch["mask"], token_types=batch["token_types"])
    found = model.logits(hidden).argmax(-1)
    lines = (finished / "predictions.tsv").read_text().splitlines()[1:]
    assert [int(lines[i].split("\t")[1]) for i in numbers] == found.tolist()
    with pytest.raises(ValueError, match=r"already has config\.json in it"):
        export(Export(run=str(finished), out=str(out)))


def test_an_exported_score_is_not_shown_as_a_probability():
    # transformers' pipeline("text-classification") shows the sigmoid of a single output without it.
    assert outputs_of("stsb") == {"finetuning_task": "stsb", "problem_type": "regression"}


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(finished, folder, tmp_path):
    copy = unfinished(finished, tmp_path, "8", "12")
    assert main(small_glue(folder, out=str(copy), resume=True)) == 0
    assert losses(copy) == losses(finished)
    for name in ("predictions.tsv", "config.json"):
        assert (copy / name).read_text() == (finished / name).read_text()


def test_a_summary_has_the_best_evaluation_though_its_line_was_lost(finished, folder, tmp_path):
    copy = unfinished(finished, tmp_path)
    (copy / "metrics.jsonl").write_text("")
    assert main(small_glue(folder, out=str(copy), resume=True)) == 0
    before, after = (json.loads((x / "summary.json").read_text()) for x in (finished, copy))
    for name in ("eval_metric", "eval_loss", "best_step", "last_eval_metric"):
        assert after[name] == before[name]


def test_a_run_goes_on_and_is_exported_without_the_folder_it_began_with(
    finished, folder, tmp_path, capsys
):
    copy, config = unfinished(finished, tmp_path, "12"), small_glue(folder)
    config, init = dataclasses.replace(config, out=str(copy), resume=True), Path(str(config.init))
    init.rename(tmp_path / "moved")
    try:
        assert main(config) == 0
        assert losses(copy) == losses(finished)
        assert export(Export(run=str(copy), out=str(tmp_path / "out"))) == 0
        assert (tmp_path / "out" / "tokenizer.json").is_file()
        with (copy / "model" / "tokenizer.json").open("a") as own:
            own.write("\n")
        with pytest.raises(ValueError, match="another run: content of the tokenizer is"):
            export(Export(run=str(copy), out=str(tmp_path / "other")))
        shutil.rmtree(copy / "model")
        with pytest.raises(ValueError, match=r"--init .*: there is no such folder"):
            main(config)
    finally:
        (tmp_path / "moved").rename(init)


def test_a_run_does_not_go_on_with_other_examples(finished, folder, tmp_path):
    copy = unfinished(finished, tmp_path, "12")
    shutil.copytree(folder / "data", tmp_path / "data")
    file = tmp_path / "data" / "MRPC" / "train.tsv"
    file.write_text(file.read_text().replace("w1 ", "w2 "))
    config = small_glue(folder, out=str(copy), resume=True, data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="content of the examples"):
        main(config)


def test_mnli_is_measured_and_predicted_on_both_of_its_splits(tmp_path, capsys):
    data = tmp_path / "data" / "MNLI"
    data.mkdir(parents=True)
    for name in ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"):
        label = [] if name.startswith("test") else ["gold_label"]
        lines = ["\t".join(("index", "sentence1", "sentence2", *label))]
        for i, kind in enumerate(("entailment", "neutral", "contradiction") * 3):
            lines.append("\t".join((str(i), f"w{i}", "w1 w2", *([kind] if label else []))))
        (data / f"{name}.tsv").write_text("\n".join(lines))
    write_encoder(tmp_path / "encoder", "roberta")
    config = small_glue(
        tmp_path, task="mnli", out=str(tmp_path / "run"), optimizer="lora-adamw",
        update_proj_gap=None, steps=1, warmup_steps=0, eval_every=1,
    )  # fmt: skip
    assert main(config) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"eval_accuracy", "eval_mismatched_accuracy", "eval_mismatched_loss"} <= {*summary}
    for name in ("predictions.tsv", "predictions-mismatched.tsv"):
        lines = (tmp_path / "run" / name).read_text().splitlines()
        assert len(lines) == 10
        assert lines[1].split("\t")[1] in ("entailment", "neutral", "contradiction")
    said = capsys.readouterr().out
    assert "new weights" in said
    assert "pooler, pooler_bias, classifier, classifier_bias" in said
    assert "predictions of the test" in said


# One of each way in which an optimizer treats leaves; all of the table have passed.
@pytest.mark.parametrize(
    "optimizer",
    ["adafactor", "q-galore-adamw8bit", "apollo-adamw", "gradnorm-lorp-adamw", "qlora-adamw"],
)
def test_optimizers_are_traced_and_adapters_leave_only_the_head_beside_them(folder, optimizer):
    changes = {"rank": None} if "rank" not in OPTIMIZERS[optimizer].options else {}
    if OPTIMIZERS[optimizer].adapter:
        changes = {"rank": 4}
    if "update_proj_gap" not in OPTIMIZERS[optimizer].options:
        changes["update_proj_gap"] = None
    config = resolve(small_glue(folder, optimizer=optimizer, **changes), 40)
    model = model_config(config, read_config(folder / "encoder"), 2)
    programs = make_programs(config, model, make_mesh(None), 32)
    after, metrics = jax.eval_shape(programs.train_step, programs.abstract, programs.batch)
    assert jax.tree.structure(after) == jax.tree.structure(programs.abstract)
    assert {"loss", "grad_norm", "tokens"} <= {*metrics}
    trained, frozen = split_params(config, programs.abstract.params)
    if config.adapter is None:
        assert not frozen
        return
    beside = {name for name, x in trained.items() if name != "layers" and jax.tree.leaves(x)}
    assert beside == {"pooler", "pooler_bias", "classifier", "classifier_bias"}
    layers = jax.tree.leaves(trained["layers"], is_leaf=lambda x: x is None or is_adapter(x))
    assert all(is_adapter(x) for x in layers if x is not None)


def test_the_published_settings_are_the_defaults(tmp_path):
    small = Finetune(
        init=str(write_encoder(tmp_path / "a")), data_dir=str(write_mrpc(tmp_path / "b"))
    )

    def settings(examples=3668, **changes):
        fields = {**vars(small), "task": "mrpc", **changes}
        return resolve(Finetune(**fields), examples)

    mrpc = settings(rank=4)
    assert (mrpc.learning_rate, mrpc.scale, mrpc.batch_size) == (3e-5, 4, 16)
    assert (mrpc.steps, mrpc.eval_every, mrpc.floor) == (30 * 230, 230, 0)
    assert mrpc.update_proj_gap == 500
    cola = settings(task="cola", examples=8551)
    assert (cola.rank, cola.learning_rate, cola.scale, cola.batch_size) == (8, 1e-5, 2, 32)
    assert settings(task="stsb").learning_rate == 3e-5
    assert settings(task="rte", epochs=2, examples=100).steps == 14
    assert settings(optimizer="adamw").learning_rate == 2e-5
    lorp = settings(optimizer="gradnorm-lorp-adamw")
    assert lorp.gradient_rank == 2
    assert lorp.restart_warmup is None
    more = dataclasses.replace(lorp, steps=10 * lorp.steps)  # of a run that is resumed with these
    assert more.restart_every >= more.steps


def test_a_folder_called_model_beside_the_command_is_not_read(folder, tmp_path, monkeypatch):
    write_encoder(tmp_path / "model", positions=17)  # --init's takes 40 tokens
    monkeypatch.chdir(tmp_path)
    assert resolve(small_glue(folder), 40).seq_len == 40


def test_the_flags_of_several_processes_which_it_cannot_use_are_not_there():
    names = {field.name for field in dataclasses.fields(Finetune)}
    assert not {"processes", "process", "coordinator", "launcher"} & names


def test_the_settings_of_a_config_json_are_read_back(finished):
    again = load(finished / "config.json", Finetune)
    assert again.task == "mrpc"
    by_epochs = resolve(dataclasses.replace(again, steps=None, epochs=2), 40)
    assert by_epochs.steps == 10
    # As config.json has it: resumed by --config, too.
    assert resolve(load_fields(by_epochs), 40) == by_epochs
    with pytest.raises(ValueError, match=r"is of a run of train.finetune, not of train.pretrain"):
        load(finished / "config.json")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--task is missing: choose one of cola, sst2"),
        (["--task", "xnli"], "xnli"),
        (["--task", "rte"], "has no task rte: expected TFDS' folder glue/rte"),
        (["--init", "nowhere"], "--init nowhere: there is no such folder"),
        (["--epochs", "2"], "--epochs 2 has no effect"),
        (["--rank", "32"], "a rank of 32 or more compresses no matrix"),
        (["--seq-len", "41"], "takes at most 40 tokens"),
        (["--seq-len", "3"], "adds 3 special tokens, and no text would be left"),
        (["--patience", "0"], "--patience 0: expected 1 or more"),
        (["--batch-size", "9", "--accumulate", "2"], "choose a multiple of 2"),
        (["--layerwise"], "--layerwise"),
        (["--optimizer", "racs"], "--learning-rate is missing: --optimizer racs has"),
    ],
)
def test_wrong_use_ends_with_one_line_and_writes_nothing(folder, tmp_path, capsys, args, message):
    config, out = small_glue(folder), tmp_path / "run"
    words = ["--out", str(out), "--steps", "2", "--task", "mrpc"][: 6 if args else 4]
    words += ["--data-dir", str(config.data_dir), "--init", str(config.init)]
    with pytest.raises(SystemExit) as stop:
        cli.run(main, Finetune, "train.finetune", args=[*words, *args])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["CONTRADICTION", "neutral", "entailment"], [2, 1, 0]),
        (["entailment", "neutral", "contradiction"], [0, 1, 2]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], slice(None)),
        (["entailment", "neutral"], slice(None)),
        (["Equivalent", "not equivalent"], [1, 0]),
    ],
)
def test_the_labels_of_a_classifier_are_found_by_their_names(names, order):
    said = {"id2label": {str(i): name for i, name in enumerate(names)}}
    task = "mrpc" if "Equivalent" in names else "mnli"
    assert label_order(said, TASKS[task]) == order
    assert label_order({}, TASKS["stsb"]) == slice(None)


def test_a_classifier_with_labels_in_another_order_begins_in_that_of_the_task(folder, tmp_path):
    init = write_encoder(tmp_path / "a", classes=2)
    config = resolve(small_glue(folder, init=str(init)), 40)
    file = init / "config.json"
    labels = {"id2label": {"0": "1", "1": "0"}, "label2id": {"1": 0, "0": 1}}
    content = json.loads(file.read_text()) | labels
    file.write_text(json.dumps(content))
    parts = assemble(load_examples("mrpc", "train", folder / "data"), config, lambda _: None)
    found, theirs = parts.initial().params, load_roberta(init)
    np.testing.assert_array_equal(found["classifier"], theirs.classifier[...][:, ::-1])
    np.testing.assert_array_equal(found["classifier_bias"], theirs.classifier_bias[...][::-1])
    np.testing.assert_array_equal(found["pooler"], theirs.pooler[...])


def test_a_new_classifier_is_the_same_with_64_bit_numbers(folder):
    model = read_config(write_encoder(folder / "none"), pooler=True, classes=2)
    drawn = partial(glue._drawn, jax.random.key(0), weight_table(model)["classifier"], model)
    found = drawn()
    with jax.enable_x64(True):  # as by JAX_ENABLE_X64
        np.testing.assert_array_equal(drawn(), found)


def test_a_run_as_the_model_to_begin_with_is_refused_with_the_command_that_exports_it(
    folder, tmp_path
):
    (tmp_path / "config.json").write_text(json.dumps({"optimizer": "adamw", "task": "mrpc"}))
    said = r"is a run: write its model with `python -m train\.export`"
    with pytest.raises(ValueError, match=said):
        resolve(small_glue(folder, init=str(tmp_path)), 40)


def test_an_encoder_without_its_tokenizer_or_with_anothers_is_refused(folder, tmp_path):
    config = resolve(small_glue(folder, init=str(write_encoder(tmp_path / "a"))), 40)
    examples = load_examples("mrpc", "train", folder / "data")
    start = partial(assemble, examples, config, print)
    file = tmp_path / "a" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["w1"] = 24
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gives token id 24"):
        start()
    file.write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(ValueError, match="adds no special tokens"):
        start()
    file.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        start()


def test_weights_that_do_not_fit_are_refused_before_a_step_is_compiled(folder, tmp_path, capsys):
    init = write_encoder(tmp_path / "init")
    tensors = load_file(init / "model.safetensors")
    name, *_ = (x for x in tensors if x.endswith("query.weight"))
    wrong = {
        "1 tensors are missing": {k: v for k, v in tensors.items() if k != name},
        rf"{name} has shape \(32, 3\)": {**tensors, name: tensors[name][:3]},
    }
    for said, changed in wrong.items():
        save_file(changed, init / "model.safetensors")
        with pytest.raises(ValueError, match=said):
            main(small_glue(folder, init=str(init), out=str(tmp_path / "run")))
    assert "compiling" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
