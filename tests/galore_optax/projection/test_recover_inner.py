"""Inner transformations that a way back cannot follow are refused."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from galore_optax import Alice, Apollo, Fira, galore, quantize_state


@pytest.mark.parametrize("way", ["fira", "apollo", Alice(0.1)])
def test_an_inner_that_sums_gradients_or_skips_steps_is_refused(way):
    several = {
        "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        "ApplyEvery": optax.chain(optax.apply_every(2), optax.sgd(0.1)),
        "ConditionallyMask": optax.conditionally_mask(optax.sgd(0.1), lambda step: step % 2 == 0),
        "ApplyIfFinite": quantize_state(optax.apply_if_finite(optax.adam(0.1), 3), min_size=1),
    }
    for name, inner in several.items():
        with pytest.raises(ValueError, match=rf"inner: {name}\w* .*recover=.*around galore"):
            galore(3, inner, recover=way).init(jnp.ones((8, 12)))
        galore(3, inner).init(jnp.ones((8, 12)))


@pytest.mark.parametrize("way", [Fira, Apollo, functools.partial(Apollo, per="matrix"), Alice])
def test_an_inner_without_its_learning_rate_is_refused(way):
    def init(inner, recover):
        jax.eval_shape(galore(3, inner, recover=recover).init, jnp.ones((8, 12)))

    adam, rate = optax.scale_by_adam(), optax.scale_by_learning_rate(0.1)
    decayed = optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1))
    for inner in (adam, decayed, quantize_state(adam, min_size=1)):
        with pytest.raises(ValueError, match=r"inner: its steps go along the gradient"):
            init(inner, way(0.1))
        init(inner, "project")
        init(optax.chain(inner, rate), way(0.1))
    rising = optax.linear_schedule(0.0, 0.1, 9)  # zero at the first step
    init(optax.adamw(rising), way(rising))
    init(optax.inject_hyperparams(optax.sgd)(0.0), way(0.1))
