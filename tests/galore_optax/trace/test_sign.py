"""Which arrays of a state are never below zero: what is claimed holds as optimizers run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import INNERS, arguments

from galore_optax.trace.roles import state_roles
from galore_optax.trace.traced import trace

PARAMS = {"w": jax.random.normal(jax.random.key(0), (6, 8))}
WITH_LOOPS = {"lbfgs", "scale_by_lbfgs", "galore", "scale_by_galore", "muon", "sophia"}


def grads(i):
    """Of either sign, some large, some zero."""
    x = jax.random.normal(jax.random.key(i), (6, 8))
    return {"w": jnp.where(jnp.abs(x) < 0.3, 0, x * 10.0 ** (i - 2))}


@pytest.mark.parametrize("name", INNERS)
def test_what_is_marked_stays_at_zero_or_above(name):
    tx = INNERS[name]
    marks = nonnegative_state(tx, PARAMS)
    update = jax.jit(tx.update) if name in WITH_LOOPS - {"sophia"} else tx.update
    state = tx.init(PARAMS)
    assert len(marks) == len(jax.tree.leaves(state))
    for i in range(4):
        for leaf, mark in zip(jax.tree.leaves(state), marks, strict=True):
            assert not mark or bool(jnp.all(leaf >= 0))
        # Values of a loss that falls below zero too.
        options = arguments(name, jnp.float32(1 - i))
        _, state = update(grads(i), state, PARAMS, **options)


def nonnegative_state(tx, params):
    traced = trace(optax.with_extra_args_support(tx), params)
    return [role.nonnegative for role in state_roles(traced)]


def marked(tx, params=PARAMS):
    """Paths of the marked arrays."""
    state = jax.eval_shape(tx.init, params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    marks = nonnegative_state(tx, params)
    arrays = [np.ndim(leaf) > 0 for leaf in jax.tree.leaves(state)]
    rows = zip(paths, marks, arrays, strict=True)
    return {path for path, mark, array in rows if mark and array}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adamw(0.1), {"[0].nu['w']"}),
        (optax.adamw(optax.linear_schedule(0.1, 0, 9)), {"[0].nu['w']"}),
        (optax.adamw(0.1, nesterov=True), {"[0].nu['w']"}),
        (optax.amsgrad(0.1), {"[0].nu['w']", "[0].nu_max['w']"}),
        (optax.lion(0.1), set()),
        (optax.sgd(0.1, momentum=0.9), set()),
        (optax.rmsprop(0.1), {"[0].nu['w']"}),
        (optax.adagrad(0.1), {"[0].sum_of_squares['w']"}),
        (optax.chain(optax.clip(1.0), optax.adam(0.1)), {"[1][0].nu['w']"}),
        (optax.contrib.schedule_free_adamw(0.1), {".base_optimizer_state[0].nu['w']"}),
    ],
)
def test_second_moments_are_found(tx, expected, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    assert marked(tx, params) == expected


def test_names_do_not_decide():
    # Adan's v is an average of differences, its n one of squares; a belief's square is one.
    assert marked(optax.adan(0.1)) == {"[0].n['w']"}
    assert marked(optax.adabelief(0.1)) == {"[0].nu['w']"}
    factored = marked(optax.adafactor(0.1, min_dim_size_to_factor=4))
    assert {"[0].v_row['w']", "[0].v_col['w']"} <= factored


def test_a_centered_average_of_squares_may_fall_below_zero_and_is_not_marked():
    """Yogi's grows or shrinks by a sign: its update is a difference."""
    assert marked(optax.yogi(0.1)) == set()


def test_wrappers_are_looked_through():
    tx = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    assert {path for path in marked(tx) if "nu" in path} == marked(tx)
    tx = optax.inject_hyperparams(optax.adam)(0.1)
    assert ".inner_state[0].nu['w']" in marked(tx)
    tx = optax.apply_if_finite(optax.masked(optax.adam(0.1), {"w": True}), 3)
    assert any("nu" in path for path in marked(tx))


def test_one_that_cannot_be_traced_has_no_marks():
    def update(updates, state, params=None, *, temperature):
        return jax.tree.map(lambda u: u * temperature, updates), jax.tree.map(jnp.square, updates)

    tx = optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.zeros_like, p), update)
    assert nonnegative_state(tx, PARAMS) == [False]


def once(init, update):
    return optax.GradientTransformation(
        lambda params: jax.tree.map(init, params),
        lambda updates, state, params=None: (updates, jax.tree.map(update, updates, state)),
    )


@pytest.mark.parametrize(
    ("init", "update", "expected"),
    [
        (jnp.zeros_like, lambda g, s: s + g * g, True),
        (jnp.ones_like, lambda g, s: s + g * s, False),  # a product of two that differ
        (jnp.zeros_like, lambda g, s: s - g**2, False),
        (jnp.zeros_like, lambda g, s: s + g**3, False),
        (jnp.zeros_like, lambda g, s: 0.9 * s + 0.1 * jnp.abs(g), True),
        (jnp.zeros_like, lambda g, s: -0.9 * s + g**2, False),
        (lambda x: x, lambda g, s: s + g**2, False),  # starts as anything
        (lambda x: -jnp.ones_like(x), lambda g, s: s, False),
        (jnp.ones_like, lambda g, s: jnp.where(g > 0, s, 2 * s), True),
        (jnp.ones_like, lambda g, s: jnp.where(g > 0, s, g), False),
        (jnp.ones_like, lambda g, s: jax.lax.cond(g[0, 0] > 0, lambda: s, lambda: s + g), False),
        (jnp.ones_like, lambda g, s: jax.lax.cond(g[0, 0] > 0, lambda: s, lambda: 2 * s), True),
        (jnp.zeros_like, lambda g, s: jax.jit(lambda a, b: a + b**2)(s, g), True),
        (jnp.zeros_like, lambda g, s: jax.lax.fori_loop(0, 2, lambda i, x: x + 1, s), True),
        (jnp.zeros_like, lambda g, s: jax.lax.fori_loop(0, 2, lambda i, x: x + g, s), False),
    ],
)
def test_each_rule(init, update, expected):
    assert nonnegative_state(once(init, update), PARAMS) == [expected]


def test_one_array_that_enters_another_is_followed_over_the_steps():
    """The first becomes the second, which becomes anything: neither holds after two steps."""
    tx = optax.GradientTransformation(
        lambda params: {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3), "d": jnp.ones(3)},
        lambda updates, state, params=None: (
            updates,
            {"a": state["b"], "b": state["c"], "c": updates["w"][0, :3], "d": state["d"]},
        ),
    )
    assert nonnegative_state(tx, PARAMS) == [False, False, False, True]
