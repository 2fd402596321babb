"""What depends on what in a traced function, through calls, branches and loops."""

import jax
import jax.numpy as jnp
import pytest

from galore_optax.trace.dependence import dependences


def marks(function, *inputs, **options):
    """Which outputs depend on each input."""
    found = dependences(jax.make_jaxpr(function)(*inputs), range(len(inputs)), **options)
    return [[i in names for names in found] for i in range(len(inputs))]


def test_loops_are_followed_turn_by_turn():
    def shift(a, b, c):  # after three turns, a comes from c
        return jax.lax.fori_loop(0, 3, lambda i, x: (x[1], x[2], x[2]), (a, b, c))

    assert marks(shift, 1.0, 2.0, 3.0) == [[True] + [False] * 2, [True, True, False], [True] * 3]

    def scanned(carry, xs):
        return jax.lax.scan(lambda c, x: (c + 1.0, x * 2.0), carry, xs)

    assert marks(scanned, 1.0, jnp.ones(3)) == [[True, False], [False, True]]


def test_the_end_of_a_loop_is_a_choice():
    def until(limit, x):
        return jax.lax.while_loop(
            lambda s: s[0] < limit, lambda s: (s[0] + 1.0, 2.0 * s[1]), (0.0, x)
        )

    assert marks(until, 3.0, 1.0) == [[True, True], [False, True]]
    assert marks(until, 3.0, 1.0, through_choices=False) == [[False, False], [False, True]]


@pytest.mark.parametrize(
    "choose", [jnp.where, lambda p, a, b: jax.lax.cond(p, lambda: a, lambda: b)]
)
def test_a_choice_is_no_value(choose):
    assert marks(choose, True, 1.0, 2.0) == [[True], [True], [True]]
    assert marks(choose, True, 1.0, 2.0, through_choices=False) == [[False], [True], [True]]


def test_an_element_in_a_loop_is_no_scalar():
    def doubled(xs):
        return jax.lax.map(lambda x: 2.0 * x, xs)

    assert marks(doubled, jnp.ones(3), through_scalars=False) == [[True]]
    assert marks(lambda x: x.sum() * jnp.ones(3), jnp.ones(3), through_scalars=False) == [[False]]
