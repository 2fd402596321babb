"""GLUE's tasks as examples, from TFDS' data sets and from the official files."""

import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from train.data.glue import TASKS, load_examples, predictions_text, splits

# The first lines of the official files; CoLA's have no header.
FILES = {
    "cola": ("gj04\t1\t\tOur friends.\n", "index\tsentence\n0\tBill.\n"),
    "sst2": ('sentence\tlabel\na "quoted text \t1\n', "index\tsentence\n0\tit\n"),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n",
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\ta\tb\n",
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\t0\n9\tbroken\n",
        "id\tquestion1\tquestion2\n0\ta\tb\n",
    ),
    "stsb": ("index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.25\n", None),
    "mnli": ("index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tx\tneutral\n", None),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\ta\tb\tnot_entailment\n", None),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", None),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", None),
}
LABELS = dict(cola=1, sst2=1, mrpc=1, qqp=0, stsb=3.25, mnli=1, qnli=1, rte=0, wnli=1)


@pytest.mark.parametrize("name", TASKS)
def test_official_files_are_read_for_each_task(tmp_path, name):
    task, (train, test) = TASKS[name], FILES[name]
    (tmp_path / task.folder).mkdir()
    (tmp_path / task.folder / "train.tsv").write_text(train, encoding="utf-8")
    found = load_examples(name, "train", tmp_path)
    assert len(found) == 1
    assert found.labels.tolist() == [LABELS[name]]
    assert len(found.texts[0]) == len(task.texts)
    split = splits(name)["test"][0]
    assert load_examples(name, split, tmp_path) is None
    if test is not None:
        (tmp_path / task.folder / f"{split}.tsv").write_text(test)
        assert load_examples(name, split, tmp_path).labels.tolist() == [-1]
    dev = splits(name)["validation"][0]
    with pytest.raises(ValueError, match=r"dev.*\.tsv is missing"):
        load_examples(name, dev, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Quality\t#1 String\t#2 String\n2\ta\tb\n", "line 2 .* has the label '2': expected 0, 1"),
        ("Quality\t#1 String\n1\ta\n", "lacks a column: expected #1 String, #2 String, Quality"),
        ("Quality\t#1 String\t#2 String\n", "has no example"),
        ("Quality\t#1 String\t#2 String\n1\ta\tb\tc\n", "line 2 has more columns than the 3"),
        ("Quality\t#1 String\t#2 String\tQuality\n1\ta\tb\t0\n", "column Quality twice"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_its_line(tmp_path, text, message):
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "MRPC" / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_examples("mrpc", "train", tmp_path)


@pytest.mark.parametrize("name", ["cola", "sst2", "qnli"])
def test_a_tab_in_a_text_is_no_column_and_empty_columns_hold_nothing(tmp_path, name):
    folder, (train, _) = tmp_path / TASKS[name].folder, FILES[name]
    folder.mkdir()
    (folder / "train.tsv").write_text(train.rstrip("\n") + "\t\n", encoding="utf-8")
    assert load_examples(name, "train", tmp_path).labels.tolist() == [LABELS[name]]
    (folder / "train.tsv").write_text(train.rstrip("\n") + "\tmore\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.tsv .*more columns"):
        load_examples(name, "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "header"),
    [("rte", "index\tsentence1\tsentence2"), ("qqp", "id\tquestion1\tquestion2")],
)
def test_a_test_whose_own_numbers_are_others_than_the_predictions_is_refused(
    tmp_path, name, header
):
    folder = tmp_path / TASKS[name].folder
    folder.mkdir()
    (folder / "test.tsv").write_text(f"{header}\n0\ta\tb\n7\ta\tc\n")
    with pytest.raises(ValueError, match=r"line 3 of .*test\.tsv has the index 7: expected 1"):
        load_examples(name, "test", tmp_path)


def test_a_task_in_both_forms_is_refused(tmp_path):
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "glue" / "mrpc").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"MRPC and .*glue/mrpc both have the task mrpc: move one"):
        load_examples("mrpc", "train", tmp_path)


@pytest.mark.parametrize("name", ["rte", "mrpc"])
def test_the_test_set_of_tfds_has_the_order_of_glues_file(shared_data, tmp_path, name):
    # The validation set of a sample as its test set: RTE's `idx` are 0 to 276, MRPC's are not.
    source = shared_data / "glue" / name / "2.0.0"
    folder = tmp_path / "glue" / name / "2.0.0"
    shutil.copytree(source, folder)
    (folder / "glue-validation.array_record-00000-of-00001").rename(
        folder / "glue-test.array_record-00000-of-00001"
    )
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"validation"', '"test"'))
    if name == "mrpc":
        with pytest.raises(ValueError, match=r"the `idx` of its examples are not 0 to 407"):
            load_examples(name, "test", tmp_path)
        return
    stored = load_examples(name, "validation", shared_data)
    records = tfds.builder(f"glue/{name}", data_dir=shared_data).as_data_source("validation")
    order = np.argsort([records[i]["idx"] for i in range(len(stored))])
    assert load_examples(name, "test", tmp_path).texts == [stored.texts[i] for i in order]


@pytest.mark.parametrize("score", ["nan", "1e39", "50", "-1", "3,2"])
def test_a_score_that_is_no_number_of_the_task_is_refused(tmp_path, score):
    (tmp_path / "STS-B").mkdir()
    file = tmp_path / "STS-B" / "train.tsv"
    file.write_text(f"sentence1\tsentence2\tscore\na\tb\t{score}\n")
    with pytest.raises(ValueError, match=r"line 2 of .* has the score .*: expected a number"):
        load_examples("stsb", "train", tmp_path)


def test_a_file_of_qqp_whose_header_lacks_a_column_is_refused(tmp_path):
    (tmp_path / "QQP").mkdir()
    text = FILES["qqp"][0].replace("is_duplicate", "label")
    (tmp_path / "QQP" / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match="lacks a column: expected question1, question2, is_dup"):
        load_examples("qqp", "train", tmp_path)


def test_a_data_set_of_tfds_with_the_labels_in_another_order_is_refused(shared_data, tmp_path):
    folder = tmp_path / "glue" / "rte"
    shutil.copytree(shared_data / "glue" / "rte", folder)
    (folder / "2.0.0" / "label.labels.txt").write_text("not_entailment\nentailment\n")
    said = "its labels are not_entailment, entailment: expected entailment, not_entailment"
    with pytest.raises(ValueError, match=said):
        load_examples("rte", "train", tmp_path)
    folder.rename(tmp_path / "glue" / "wnli")  # whose labels and texts are these
    assert len(load_examples("wnli", "train", tmp_path)) == 2490


def test_a_label_of_tfds_that_is_no_class_is_refused(shared_data, tmp_path):
    # As those of a test, which has none: -1 would count as the last class.
    folder = tmp_path / "glue" / "rte" / "2.0.0"
    shutil.copytree(shared_data / "glue" / "rte" / "2.0.0", folder)
    features = tfds.builder("glue/rte", data_dir=shared_data).info.features
    example = {"sentence1": "a", "sentence2": "b", "label": -1, "idx": 0}
    (file,) = folder.glob("glue-validation*")
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for _ in range(277):
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    with pytest.raises(ValueError, match=r"example 0 .*'validation' .*label -1: expected 0 to 1"):
        load_examples("rte", "validation", tmp_path)


@pytest.mark.parametrize(
    ("name", "labels", "positive"), [("mrpc", 408, 279), ("rte", 277, 131), ("cola", 1043, 721)]
)
def test_the_real_data_have_the_official_counts(shared_data, name, labels, positive):
    found = load_examples(name, "validation", shared_data)
    assert (len(found), int(found.labels.sum())) == (labels, positive)
    assert load_examples(name, "test", shared_data) is None  # these have none
    assert len(load_examples("stsb", "validation", shared_data)) == 1500


def test_a_damaged_data_set_of_tfds_is_named(tmp_path):
    (tmp_path / "glue" / "rte").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot read split 'train' of .*glue/rte"):
        load_examples("rte", "train", tmp_path)


def test_the_second_test_of_mnli_without_the_first_is_refused(tmp_path):
    (tmp_path / "MNLI").mkdir()
    assert load_examples("mnli", "test_matched", tmp_path) is None
    (tmp_path / "MNLI" / "test_mismatched.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    with pytest.raises(ValueError, match=r"MNLI/test_matched.tsv is missing: copy GLUE's"):
        load_examples("mnli", "test_matched", tmp_path)


def test_a_file_of_tfds_that_was_cut_short_at_a_block_is_named(shared_data, tmp_path):
    shutil.copytree(shared_data / "glue" / "rte", tmp_path / "glue" / "rte")
    (file,) = tmp_path.rglob("glue-train.array_record*")
    os.truncate(file, 2**16)
    with pytest.raises(ValueError, match=r"cannot read split 'train' of .*glue/rte"):
        load_examples("rte", "train", tmp_path)


def test_predictions_have_the_format_of_the_submissions():
    assert predictions_text(TASKS["qnli"], [0, 1]) == (
        "index\tprediction\n0\tentailment\n1\tnot_entailment\n"
    )
    scores = np.array([2.5, 5.4, -0.1])
    assert predictions_text(TASKS["stsb"], scores).split() == [
        "index", "prediction", "0", "2.500", "1", "5.000", "2", "0.000",
    ]  # fmt: skip
