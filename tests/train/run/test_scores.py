"""The metrics of GLUE against values worked out by hand."""

import math

import numpy as np
import pytest

from train.run.scores import scores


def test_the_metrics_of_classes():
    predicted, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    found = scores(("accuracy", "f1", "matthews_correlation"), predicted, labels)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 / 3)  # precision and recall are 2/3
    assert found["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / 6)


def test_the_metrics_of_numbers():
    labels = np.array([1.0, 2.0, 3.0, 4.0])
    found = scores(("pearson", "spearman"), np.array([1.0, 2.0, 3.0, 10.0]), labels)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(14 / math.sqrt(5 * 50))


def test_what_is_not_defined_is_not_a_number():
    labels = np.array([0.0, 1.0])
    assert math.isnan(scores(("pearson",), np.array([1.0, 1.0]), labels)["pearson"])
    assert math.isnan(scores(("pearson",), np.array([math.nan, 1.0]), labels)["pearson"])
    assert scores(("f1",), np.array([0, 0]), np.array([1, 0])) == {"f1": 0}
    one = scores(("pearson", "spearman"), np.array([1.0]), np.array([2.0]))
    assert all(map(math.isnan, one.values()))
