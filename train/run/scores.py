"""The metrics of GLUE's tasks, by scikit-learn and SciPy."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Num


def scores(
    metrics: Sequence[str], predicted: Num[np.ndarray, " N"], labels: Num[np.ndarray, " N"]
) -> dict[str, float]:
    """Each metric by its name, of predicted classes or numbers; NaN where it is not defined.

    Metrics: accuracy, f1 (of class 1), matthews_correlation, pearson, spearman.
    """
    from scipy import stats
    from sklearn import metrics as sk

    functions = {
        "accuracy": sk.accuracy_score,
        "f1": lambda labels, predicted: sk.f1_score(labels, predicted, zero_division=0),
        "matthews_correlation": sk.matthews_corrcoef,
        "pearson": lambda labels, predicted: stats.pearsonr(predicted, labels).statistic,
        "spearman": lambda labels, predicted: stats.spearmanr(predicted, labels).statistic,
    }
    correlation = {"pearson", "spearman"} & {*metrics}
    if not np.all(np.isfinite(predicted)) or (correlation and len(labels) < 2):
        return dict.fromkeys(metrics, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant prediction has no correlation: NaN
        return {name: float(functions[name](labels, predicted)) for name in metrics}
