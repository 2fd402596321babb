"""Trajectories of galore-torch, followed by `galore` around optax's own optimizers.

`test_galore.py` compares the recipes and AdamW up to the first refresh; here are Adafactor composed
from optax, and several refreshes. Which sign a singular vector has is the library's choice: SGD and
second moments do not see it, a first moment that is kept over a refresh does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from paths import FIXTURES

from galore_optax import galore

PUBLISHED = np.load(FIXTURES / "galore_torch.npz")
REFRESHES = np.load(FIXTURES / "galore_torch_refreshes.npz")
SHAPES = ("wide", "tall", "square", "odd")
RANK, GAP, SCALE, LEARNING_RATE = 3, 2, 0.25, 0.01  # of galore_torch_refreshes.npz


def run(tx, shape):
    """Weights and bases after each of the recorded gradients."""
    weight = jnp.asarray(PUBLISHED[f"{shape}/weight"])
    state, update = tx.init(weight), jax.jit(tx.update)
    weights, bases = [], []
    for grad in jnp.asarray(PUBLISHED[f"{shape}/grads"]):
        updates, state = update(grad, state, weight)
        weight = optax.apply_updates(weight, updates)
        weights.append(weight)
        bases.append(state.bases)
    return np.stack(weights), np.stack(bases)


def refreshed(inner, **options):
    return galore(RANK, inner, update_proj_gap=GAP, scale=SCALE, subspace="svd", **options)


@pytest.mark.parametrize("optimizer", ["adafactor", "adafactor_momentum"])
@pytest.mark.parametrize("rank", ["1", "4", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_of_optax_follows_the_published_one(shape, rank, optimizer):
    rank = min(PUBLISHED[f"{shape}/weight"].shape) if rank == "full" else int(rank)
    # optax's decay is not multiplied by the learning rate.
    rates = dict(momentum=0.9, weight_decay_rate=0.01 * 0.1) if "momentum" in optimizer else {}
    inner = optax.adafactor(
        0.01, min_dim_size_to_factor=1, multiply_by_parameter_scale=False, **rates
    )
    weights, _ = run(galore(rank, inner, subspace="svd"), shape)
    first, last = PUBLISHED[f"{shape}/{optimizer}/{rank}"]
    # float32, and five steps of it
    np.testing.assert_allclose(weights[0], first, atol=2e-6)
    np.testing.assert_allclose(weights[-1], last, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "proj_type"),
    [("smaller", "std"), ("larger", "reverse_std"), ("left", "right"), ("right", "left")],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_sgd_follows_the_published_projector_over_refreshes(shape, side, proj_type):
    # Its matrices are (out, in), so that its right is our left. Ties of the larger side, which it
    # gives to the output, go to the input here, as in optax.contrib.
    if (shape, side) == ("square", "larger"):
        side = "right"
    weights, _ = run(refreshed(optax.sgd(LEARNING_RATE), side=side), shape)
    # The subspace of float32's singular vectors, at their least gap.
    np.testing.assert_allclose(weights, REFRESHES[f"{shape}/sgd/{proj_type}"], atol=2e-6)


# Published: the moments stay as they are when the basis changes.


@pytest.mark.parametrize("shape", SHAPES)
def test_second_moments_that_are_kept_follow_the_published_ones_over_refreshes(shape):
    inner = optax.adafactor(
        LEARNING_RATE, min_dim_size_to_factor=1, multiply_by_parameter_scale=False
    )
    weights, _ = run(refreshed(inner, moments="keep"), shape)
    np.testing.assert_allclose(weights, REFRESHES[f"{shape}/adafactor"], atol=1e-5)


def adam_in(bases, shape):
    """GaLore's Adam with its moments kept, in float64, given the basis of every step."""
    weight = PUBLISHED[f"{shape}/weight"].astype(np.float64)
    left = bases.shape[1] == weight.shape[0] and weight.shape[0] <= weight.shape[1]
    first = second = 0.0
    weights = []
    for t, grad in enumerate(PUBLISHED[f"{shape}/grads"].astype(np.float64), start=1):
        basis = bases[t - 1].astype(np.float64)
        small = basis.T @ grad if left else grad @ basis
        first = 0.9 * first + 0.1 * small
        second = 0.999 * second + 0.001 * small**2
        step = first / (1 - 0.9**t) / np.sqrt(second / (1 - 0.999**t))
        weight = weight - LEARNING_RATE * SCALE * (basis @ step if left else step @ basis.T)
        weights.append(weight)
    return np.stack(weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_adam_differs_from_the_published_one_by_the_signs_of_singular_vectors_alone(shape):
    weights, bases = run(refreshed(optax.adam(LEARNING_RATE, eps=1e-12), moments="keep"), shape)
    published, their_bases = REFRESHES[f"{shape}/adamw"], REFRESHES[f"{shape}/adamw/bases"]
    signs = np.sign(np.sum(bases * their_bases, axis=1, keepdims=True))
    np.testing.assert_allclose(bases, signs * their_bases, atol=1e-5)
    # The same steps, each in its own bases, to the rounding of float32 weights near 1.
    np.testing.assert_allclose(weights, adam_in(bases, shape), atol=2e-6)
    np.testing.assert_allclose(published, adam_in(their_bases, shape), atol=2e-6)
