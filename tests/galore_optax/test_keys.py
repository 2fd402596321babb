"""The keys of matrices: each has its own, whatever generator a key is for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax.keys import for_matrix


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_every_side_of_every_matrix_has_a_key_of_its_own(impl):
    seeds = [jax.random.key(seed, impl=impl) for seed in (0, 1)]
    cases = [*itertools.product((0, 1, 2**32 - 1), (0, 1, 2, 4095), (0, 1))]
    made = [for_matrix(seed, *case) for seed in seeds for case in cases]
    assert {str(jax.random.key_impl(key)) for key in made} == {impl}
    data = np.stack([jax.random.key_data(key) for key in made])
    for word in (data, data[:, :1], data[:, -1:]):
        assert len(np.unique(word, axis=0)) == len(made)
    drawn = np.stack([jax.random.normal(key, (64,)) for key in made])
    assert np.abs(np.corrcoef(drawn) - np.eye(len(made))).max() < 0.6


def test_a_key_is_the_same_within_a_program_and_for_numbers_that_are_arrays():
    key = jax.random.key(7)
    traced = jax.jit(lambda *numbers: for_matrix(key, *numbers, 1))
    made = traced(jnp.uint32(2**32 - 1), jnp.int32(3))
    assert made == for_matrix(key, 2**32 - 1, 3, 1)
