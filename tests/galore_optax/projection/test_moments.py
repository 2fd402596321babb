"""Moments follow the basis: rotated, kept, reset, or as the user says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import normal, run

from galore_optax import GaLoreDimensionNumbers, TuckerDimensionNumbers, galore
from galore_optax.projection.leaf import projections
from galore_optax.projection.moments import CarryOver, Moment, transition
from galore_optax.trace.roles import FACTOR, FIRST, OTHER, SECOND, Role

LEAVES = {
    "left": ((8, 12), GaLoreDimensionNumbers(), "smaller"),
    "right": ((12, 8), GaLoreDimensionNumbers(), "smaller"),
    "both": ((8, 8), GaLoreDimensionNumbers(), "both"),
    "stack": ((3, 8, 12), GaLoreDimensionNumbers(1, 2), "smaller"),
    "stack on both sides": ((2, 6, 6), GaLoreDimensionNumbers(1, 2), "both"),
}


@pytest.mark.parametrize("leaf", LEAVES)
def test_at_full_rank_rotated_momentum_is_plain_momentum(leaf):
    """P is square then, and turns at every refresh: only moments that turn with it agree."""
    shape, numbers, side = LEAVES[leaf]
    grads = [normal(i, *shape) for i in range(6)]
    inner = optax.sgd(0.1, momentum=0.9)

    def last(moments):
        tx = galore(
            8, inner, update_proj_gap=2, scale=1.0, side=side, moments=moments, subspace="svd",
            weight_dimension_numbers=numbers,
        )  # fmt: skip
        return run(tx, normal(9, *shape), grads)[-1]

    plain = run(inner, normal(9, *shape), grads)[-1]
    np.testing.assert_allclose(last("rotate"), plain, atol=2e-5)  # six steps of float32 products
    assert not np.allclose(last("keep"), plain, atol=1e-2)


def bases(seed, n, rank):
    return jnp.linalg.qr(normal(seed, n, rank))[0]


BOTH = (0, 1)  # the axes of a whole moment
MU, NU = Moment("mu", Role(FIRST, 0, BOTH)), Moment("nu", Role(SECOND, 0, BOTH), first=0)
ALONE = Moment("nu", Role(SECOND, 0, BOTH))
STALE = Moment("nu", Role(SECOND, 0, BOTH, stale=True))


def carry(described, moments, *, shape=(8, 12), rank=4, old=None, new=None):
    plan = projections(jnp.ones(shape), None, rank, "smaller")[0]
    old = bases(0, 8, rank) if old is None else old
    new = bases(1, 8, rank) if new is None else new
    carried = CarryOver(plan, "rotate", described)((transition(old, new),), moments)
    q = np.asarray(new, np.float64).T @ np.asarray(old, np.float64)
    return [np.asarray(x) for x in carried], q


def outside(q, moment, stale=False):
    """What the old basis did not cover counts as directions beyond its weakest, or as the mean."""
    moment = np.asarray(moment, np.float64)
    strength = moment.reshape(len(moment), -1).sum(axis=1)
    falls = np.sqrt(strength.min() / strength.max())
    factor = 1 if stale else falls * strength.min() / strength.mean()
    share = (1 - (q * q).sum(axis=1)).reshape(-1, *[1] * (moment.ndim - 1))
    return share * moment.mean(axis=0) * factor


def test_moments_of_adam_follow_ldadams_rule_and_count_what_was_not_covered():
    first, second = normal(2, 4, 12), normal(3, 4, 12) ** 2 + 0.5
    second = jnp.maximum(second, first**2)  # as averages with equal weights have it
    (m, v), q = carry((MU, NU), (first, second))
    first, second = (np.asarray(x, np.float64) for x in (first, second))
    np.testing.assert_allclose(m, q @ first, atol=1e-6)
    expected = (q * q) @ (second - first**2) + (q @ first) ** 2 + outside(q, second)
    np.testing.assert_allclose(v, expected, atol=1e-5)


def test_a_second_moment_never_falls_below_zero():
    first, second = 10 * normal(2, 4, 12), normal(3, 4, 12) ** 2  # m² far above v
    (_, v), _ = carry((MU, NU), (first, second))
    assert (v >= 0).all()
    assert v.max() <= 5 * np.asarray(second).sum(axis=0).max() * (1 + 1e-5)


def test_moments_stay_where_the_basis_stays():
    first, second = normal(2, 4, 12), normal(3, 4, 12) ** 2
    same = bases(0, 8, 4)
    (m, v), _ = carry((MU, NU), (first, second), old=same, new=same)
    np.testing.assert_allclose(m, first, atol=2e-6)
    np.testing.assert_allclose(v, second, atol=2e-5)


def test_a_second_moment_alone_and_adafactors_factors_turn_by_squares():
    second, along_rank, along_width = normal(3, 4, 12) ** 2, normal(4, 4) ** 2, normal(5, 12) ** 2
    rows, columns = Moment("v_row", Role(FACTOR, 0, (0,))), Moment("v_col", Role(OTHER, 0, (1,)))
    carried, q = carry((ALONE, rows, columns), (second, along_rank, along_width))
    for got, given in zip(carried, (second, along_rank), strict=False):
        expected = (q * q) @ np.asarray(given) + outside(q, given)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(carried[2], along_width)


def test_a_divisor_without_the_present_gradient_counts_what_was_not_covered_with_the_mean():
    second = normal(3, 4, 12) ** 2
    (carried,), q = carry((STALE,), (second,))
    expected = (q * q) @ np.asarray(second) + outside(q, second, stale=True)
    np.testing.assert_allclose(carried, expected, atol=1e-5)
    assert carried.min() > 0.1 * np.asarray(second).min()


def test_second_moments_of_a_flat_spectrum_do_not_shrink_from_refresh_to_refresh():
    flat = jnp.linalg.qr(normal(0, 32, 16))[0].T * 4
    tx = galore(4, optax.adam(0.1), update_proj_gap=1)
    state = tx.init(flat)
    update = jax.jit(lambda state: tx.update(flat, state, flat)[1])
    sums = [float(jnp.sum((state := update(state)).inner[0].nu)) for _ in range(20)]
    # As at full coverage, where the sum of Adam's moment is that of g², times 1 - b2^t.
    share = float(jnp.sum((state.bases.T @ flat) ** 2))
    np.testing.assert_allclose(sums[-1], share * (1 - 0.999**20), rtol=0.5)


@pytest.mark.parametrize("inner", [optax.adam(1.0), optax.adamax(1.0), optax.rmsprop(1.0)])
@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_with_a_constant_gradient_the_steps_stay_what_they_are(inner, moments):
    """A reset does not set back Adam's step count, which its moments have to fit."""
    ones = jnp.ones((8, 12))
    tx = galore(1, inner, update_proj_gap=7, scale=1.0, moments=moments)
    state, sizes = tx.init(ones), []
    plain, update, own = inner.init(ones), jax.jit(tx.update), jax.jit(inner.update)
    for _ in range(30):
        updates, state = update(ones, state, ones)
        expected, plain = own(ones, plain, ones)
        # One direction of length √8 takes the step that each of eight coordinates takes.
        sizes.append(float(jnp.linalg.norm(updates) / jnp.linalg.norm(expected)))
    np.testing.assert_allclose(sizes, 1 / np.sqrt(8), rtol=1e-4)


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_the_mean_of_squares_stays_above_the_square_of_the_mean(moments):
    """Centered RMSProp takes the root of their difference."""

    def find(gradient, basis, key):
        return jnp.linalg.qr(jax.random.normal(key, basis.shape))[0]

    inner = optax.rmsprop(0.1, decay=0.9, centered=True)
    tx = galore(3, inner, update_proj_gap=4, subspace=find, moments=moments)
    grads = [normal(9, 8, 12) + normal(i, 8, 12) for i in range(10)]
    assert np.isfinite(run(tx, normal(9, 8, 12), grads)[-1]).all()


@pytest.mark.parametrize(
    "inner",
    [optax.adamw(0.1, eps=0), optax.adamax(0.1, eps=0), optax.contrib.adopt(0.1, eps=1e-30)],
)
def test_steps_after_a_refresh_do_not_depend_on_the_gradients_size(inner):
    """Powers of two scale without rounding; squares of moments would leave float32's range."""
    tx = galore(4, inner, update_proj_gap=2, subspace="svd")
    params, update = normal(9, 8, 12), jax.jit(tx.update)

    def last(size):
        state, step = tx.init(params), None
        for i in range(4):
            step, state = update(size * normal(i, 8, 12), state, params)
        return step

    for size in (2.0**-44, 2.0**44):
        np.testing.assert_array_equal(last(size), last(1.0))


def test_what_is_no_moment_is_kept():
    described = (Moment("ratio", Role(OTHER, 0, BOTH)), Moment("norm", Role(OTHER, 0, (None,))))
    moments = (normal(2, 4, 12), normal(3, 1))
    carried, _ = carry(described, moments)
    for got, given in zip(carried, moments, strict=True):
        np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("shape", [(8, 12), (3, 8, 12)])
def test_reset_keeps_the_sizes_of_moments_and_gives_them_the_gradients_directions(shape):
    numbers = GaLoreDimensionNumbers(-2, -1)
    tx = galore(
        4, optax.adam(0.1), update_proj_gap=2, moments="reset", weight_dimension_numbers=numbers
    )
    state = tx.init(normal(0, *shape))
    np.testing.assert_array_equal(state.inner[0].mu, 0)
    for i in range(1, 6):
        grad, before = normal(i, *shape), state
        _, state = tx.update(grad, state, normal(0, *shape))
        small, old = state.bases.mT @ grad, before.inner[0]
        size = jnp.linalg.norm(old.mu, axis=-2, keepdims=True)
        mu = 0.9 * small / jnp.linalg.norm(small, axis=-2, keepdims=True) * size + 0.1 * small
        refreshed = np.allclose(state.inner[0].mu, mu, atol=1e-6)
        assert refreshed == (i % 2 == 1)  # a refresh at updates 0, 2 and 4
        if not refreshed:
            continue
        nu = (state.inner[0].nu - 0.001 * small**2) / 0.999
        for axis in (-1, -2):  # sums over a column stay, those over a row are dealt out by strength
            expected, found = old.nu.sum(axis=axis), nu.sum(axis=axis)
            if axis == -1:
                order = jnp.argsort(jnp.argsort((small**2).sum(axis=-1), axis=-1), axis=-1)
                expected = jnp.take_along_axis(jnp.sort(expected, axis=-1), order, -1)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)


def test_reset_gives_a_memory_of_the_params_their_new_coordinates():
    inner = optax.GradientTransformation(
        lambda params: {"anchor": params}, lambda updates, state, params: (updates, state)
    )
    tx = galore(4, inner, update_proj_gap=1, moments="reset")
    weight = normal(0, 8, 12)
    _, state = tx.update(normal(1, 8, 12), tx.init(weight), weight)
    np.testing.assert_allclose(state.inner["anchor"], state.bases.T @ weight, atol=1e-6)


def test_a_function_decides_for_each_moment():
    seen = set()

    def only_the_first(name, moment, turn):
        seen.add(name)
        return turn(moment) if name == "mu" else jnp.ones_like(moment)

    tx = galore(4, optax.scale_by_adam(b2=1.0), update_proj_gap=1, moments=only_the_first)
    _, state = tx.update(normal(1, 8, 12), tx.init(normal(0, 8, 12)))
    assert seen == {"mu", "nu"}
    np.testing.assert_array_equal(state.inner.nu, 1)


def test_an_inner_that_remembers_the_params_is_refused_unless_moments_says_what_to_do():
    inner = optax.contrib.schedule_free_adamw(0.1)
    params = normal(0, 8, 12)
    with pytest.raises(ValueError, match=r"inner.*remembers the params.*moments="):
        galore(4, inner).init(params)
    for moments in ("keep", "reset", "rotate"):
        tx = galore(4, inner, moments=moments, update_proj_gap=2, decoupled_decay=False)
        assert np.isfinite(run(tx, params, [normal(i, 8, 12) for i in range(4)])[-1]).all()


def test_moments_of_a_tensors_core_turn_along_every_axis():
    numbers = TuckerDimensionNumbers((0, 1, 2))
    grads = [normal(i, 4, 5, 6) for i in range(5)]
    inner = optax.sgd(0.1, momentum=0.9)
    # Rank 5 of (4, 5, 6) projects the last axis only; its moments turn along that axis.
    tx = galore(5, inner, update_proj_gap=2, scale=1.0, weight_dimension_numbers=numbers)
    state = tx.init(normal(9, 4, 5, 6))
    before = None
    for grad in grads[:3]:
        before = state
        _, state = tx.update(grad, state)
    (old,), (new,) = ([s.bases] for s in (before, state))
    turned = before.inner[0].trace @ (new.T @ old).T
    np.testing.assert_allclose(state.inner[0].trace, 0.9 * turned + grads[2] @ new, atol=1e-5)
