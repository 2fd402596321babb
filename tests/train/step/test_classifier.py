"""The loss of a classifier and of a regression."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.step.classifier import summed


def test_the_loss_sums_the_cross_entropy_or_the_squared_error_of_rows_that_count():
    outputs = np.array([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]], np.float32)
    weights = jnp.array([1.0, 1.0, 0.0])
    batch = {"targets": jnp.array([0, 0, 1]), "weights": weights}
    expected = np.log1p(np.exp(-2)) + np.log1p(np.exp(1))
    assert float(summed(jnp.asarray(outputs), batch)) == pytest.approx(expected)
    numbers = {"targets": jnp.array([1.5, 0.0, jnp.nan]), "weights": weights}
    assert float(summed(jnp.asarray(outputs[:, :1]), numbers)) == pytest.approx(0.25)
