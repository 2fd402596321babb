"""The ways back: the authors' trajectories, float64 references, stacks, layers, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import normal, run
from paths import FIXTURES
from toy_layers import MATRIX, MODEL, NUMBERS, assert_equal, by_layers, ordinary

from galore_optax import (
    Alice,
    Apollo,
    Fira,
    GaLoreDimensionNumbers,
    Layerwise,
    TuckerDimensionNumbers,
    apollo_adamw,
    apollo_mini_adamw,
    fira_adamw,
    galore,
    state_bytes,
    subspace_parts,
    unstacked,
    without_refresh,
)
from galore_optax.quantization.array import dequantized

PUBLISHED = np.load(FIXTURES / "galore_torch.npz")
AUTHORS = np.load(FIXTURES / "fira_apollo.npz")
FACTORS = (1.0, 1.0, 4.0, 0.5, 4.0)  # of make_fira_apollo.py, as is what follows
LEARNING_RATES = (0.001, 0.01, 0.01, 0.005, 0.002)
SHAPES = ("wide", "square", "odd")  # "tall" is projected as "odd" is


def rates(count):
    return jnp.asarray(LEARNING_RATES)[count]


# Their limiter compares norms before the moments are corrected, as do the recipes'.
METHODS = {
    "fira": functools.partial(fira_adamw, rank=3, moments="keep"),
    "apollo": functools.partial(apollo_adamw, rank=3),
    "apollo_mini": apollo_mini_adamw,
}


def recorded(name):
    """A subspace function that returns the authors' bases, one after the other."""
    bases = [AUTHORS[f"{shape}/{name}/bases"][::2] for shape in SHAPES]

    def find(gradient, basis, key):
        own = jnp.asarray(next(b for b in bases if b.shape[1:] == basis.shape))
        there = [jnp.all(basis == b) for b in own[:-1]]
        return jnp.select(there, own[1:], own[0])

    return find


@pytest.mark.parametrize("name", METHODS)
def test_it_follows_the_authors_code_over_refreshes_growth_and_a_schedule(name):
    tx = METHODS[name](rates, eps=1e-12, subspace=recorded(name), update_proj_gap=2)
    weights = {shape: jnp.asarray(PUBLISHED[f"{shape}/weight"]) for shape in SHAPES}
    grads = [
        {shape: factor * PUBLISHED[f"{shape}/grads"][i] for shape in SHAPES}
        for i, factor in enumerate(FACTORS)
    ]
    trajectory = run(tx, weights, grads)
    for shape in SHAPES:
        got = np.stack([step[shape] for step in trajectory])
        # float32 weights near 1, and sums of updates in another order
        np.testing.assert_allclose(got, AUTHORS[f"{shape}/{name}"], atol=3e-6, err_msg=shape)


def test_alice_scales_each_column_by_its_own_mean_energy_outside_the_subspace():
    (n, m), r, rate, scale, gamma = (8, 12), 3, 0.1, 0.3, 1.01
    weight = np.asarray(normal(0, n, m), np.float64)
    factors = np.linspace(0.1, 3, m)  # columns of other sizes; and one step of another size
    grads = [np.asarray(normal(i, n, m), np.float64) * factors for i in range(1, 6)]
    grads[3] *= 5
    tx = galore(r, optax.sgd(rate), recover=Alice(rate), scale=scale, subspace="random")
    got = run(tx, jnp.asarray(weight, jnp.float32), [jnp.asarray(g, jnp.float32) for g in grads])
    state = tx.init(jnp.asarray(weight, jnp.float32))
    _, state = tx.update(jnp.asarray(grads[0], jnp.float32), state)
    basis, mean, previous = np.asarray(state.bases, np.float64), np.zeros(m), None
    for step, g in enumerate(grads):
        projected = basis.T @ g
        residual = g - basis @ projected
        mean = 0.9 * mean + 0.1 * (np.sum(g**2, 0) - np.sum(projected**2, 0))
        unit = np.sqrt(n - r) * residual @ np.diag(mean**-0.5)
        norm = np.linalg.norm(unit)
        if previous is not None:
            unit = unit * gamma / max(norm / previous, gamma)
        previous = np.linalg.norm(unit)
        weight = weight - rate * scale * (basis @ projected + 0.4 * unit)
        np.testing.assert_allclose(got[step], weight, atol=2e-6)


WAYS = {"fira": Fira(0.01), "apollo-mini": Apollo(0.01, per="matrix"), "alice": Alice(0.01)}


@pytest.mark.parametrize(("way", "inner"), [("alice", optax.adam), ("apollo-mini", optax.lamb)])
def test_a_stack_equals_its_matrices_apart(way, inner):
    options = dict(update_proj_gap=2, subspace="svd", recover=WAYS[way])
    grads = [normal(i, 2, 12, 8) * i for i in range(4)]  # zero at first
    numbers = GaLoreDimensionNumbers(1, 2)
    stacked = galore(3, inner(0.01), weight_dimension_numbers=numbers, **options)
    got = run(stacked, normal(9, 2, 12, 8), grads)[-1]
    expected = run(galore(3, inner(0.01), **options), [*normal(9, 2, 12, 8)], map(list, grads))
    np.testing.assert_allclose(got, jnp.stack(expected[-1]), atol=1e-6)


def test_axes_that_are_merged_equal_the_reshaped_matrix():
    numbers = GaLoreDimensionNumbers(reduction_axis=(0, 2), output_axis=1)
    options = dict(recover=WAYS["alice"], subspace="svd")
    tx = galore(3, optax.adam(0.01), weight_dimension_numbers=numbers, **options)

    def matrix(x):
        return x.transpose(0, 2, 1).reshape(-1, x.shape[1])

    grads = [normal(i, 4, 6, 2) for i in range(3)]
    got = run(tx, normal(9, 4, 6, 2), grads)[-1]
    flat = galore(3, optax.adam(0.01), **options)
    expected = run(flat, matrix(normal(9, 4, 6, 2)), [matrix(g) for g in grads])[-1]
    np.testing.assert_allclose(matrix(got), expected, atol=1e-6)


def test_a_layer_wise_step_has_the_ordinary_steps_numbers():
    numbers = {**NUMBERS, "out": {"norm": None, "head": MATRIX}}
    inner = optax.adamw(0.01, weight_decay=0.1)
    tx = galore(
        3, inner, recover=Alice(0.01, tracking=0.9), update_proj_gap=2,
        weight_dimension_numbers=numbers,
    )  # fmt: skip
    assert_equal(by_layers(tx), ordinary(tx), 1e-5)


def one(way, **options):
    params = {"w": normal(0, 8, 12), "b": jnp.ones(3)}
    tx = galore(3, optax.adam(0.01), recover=way, **options)
    return tx, params, tx.init(params)


@pytest.mark.parametrize("way", WAYS)
def test_the_parts_and_a_step_without_a_refresh_give_the_whole_update(way):
    tx, params, state = one(WAYS[way])
    _, state = tx.update(params, state, params)
    expected, after = tx.update(params, state, params)
    parts = subspace_parts(unstacked(tx, lambda params: jax.tree.map(lambda x: None, params)))
    small = parts.project(params, state)
    for got, own in (
        parts.update_projected(small, state, params, gradient=params),
        without_refresh(tx).update(params, state, params),
    ):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-7), got, expected)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), own, after)


def test_a_sum_of_projected_gradients_is_refused():
    tx, params, state = one("fira")
    parts = subspace_parts(tx)
    with pytest.raises(ValueError, match=r'recover=Fira.*gradient=, or choose recover="project"'):
        parts.update_projected(parts.project(params, state), state, params)
    with pytest.raises(ValueError, match=r'accumulate_in_subspace=True.*recover="project"'):
        Layerwise(MODEL, tx, accumulate_in_subspace=True)
    with pytest.raises(ValueError, match=r"recover='fira' needs .* or leave sum_over out"):
        one("fira", sum_over="data")


@pytest.mark.parametrize(
    "options",
    [
        {"side": "both"},
        {"weight_dimension_numbers": {"w": TuckerDimensionNumbers((0, 1)), "b": None}},
    ],
)
def test_a_leaf_without_a_whole_side_is_refused_by_name(options):
    with pytest.raises(ValueError, match=r"recover=Fira.*one side is projected.*\['w'\]"):
        one("fira", **options)


@pytest.mark.parametrize("way", WAYS)
def test_a_zero_or_nan_gradient_leaves_the_memory_as_it_was(way):
    tx, params, state = one(WAYS[way])
    update = jax.jit(tx.update)
    zero = jax.tree.map(jnp.zeros_like, params)
    expected, after = update(params, update(zero, state, params)[1], params)
    assert jnp.linalg.norm(expected["w"]) > 1e-3  # not limited to the growth of nothing
    assert all(jnp.all(x > 0) for x in jax.tree.leaves(after.recovery))
    nan = jax.tree.map(lambda x: x * jnp.nan, params)
    recovery = update(nan, after, params)[1].recovery
    jax.tree.map(np.testing.assert_array_equal, recovery, after.recovery)


@pytest.mark.parametrize(("bits", "dtype"), [(None, "float32"), (4, "float32"), (None, "bfloat16")])
@pytest.mark.parametrize("way", WAYS)
def test_rounding_outside_the_subspace_is_not_scaled_up(way, bits, dtype):
    # All of the gradient is within the subspace, but for rounding.
    params = {"w": normal(0, 8, 12).astype(dtype)}
    tx = galore(3, optax.sgd(0.01), recover=WAYS[way], projection_bits=bits, scale=1.0)
    state = tx.init(params)
    for step in range(3):
        gradient = (normal(1, 8, 2) @ normal(step + 2, 2, 12)).astype(dtype)
        updates, state = tx.update({"w": gradient}, state, params)
        assert jnp.max(jnp.abs(updates["w"])) < 0.1


def test_the_limiter_of_few_bits_has_the_residuals_norm():
    gradient = {"w": normal(1, 256, 300)}
    tx = galore(32, optax.sgd(1.0), recover=Fira(1.0), scale=1.0, projection_bits=4)
    _, state = tx.update(gradient, tx.init(gradient), gradient)
    basis = dequantized(state.bases["w"])
    residual = gradient["w"] - basis @ (basis.T @ gradient["w"])
    np.testing.assert_allclose(state.recovery["w"], jnp.linalg.norm(residual), rtol=1e-4)


def test_states_stay_float32_where_numbers_are_float64():
    with jax.enable_x64(True):
        params = {"w": jnp.ones((8, 12), jnp.float32)}
        tx = fira_adamw(0.01, 3)
        state = tx.init(params)
        _, after = tx.update(params, state, params)
        assert after.recovery["w"].dtype == state.recovery["w"].dtype == jnp.float32


def test_bases_that_are_not_orthonormal_carry_no_moments_over():
    with pytest.raises(ValueError, match='moments="rotate" needs orthonormal bases'):
        galore(3, optax.adam(0.01), subspace="gaussian", moments="rotate")
    params, steps = {"w": normal(0, 8, 12)}, []
    for moments in (None, "keep"):
        options = dict(subspace="gaussian", recover="apollo", update_proj_gap=1, moments=moments)
        tx = galore(3, optax.adam(0.01), **options)
        state = tx.init(params)
        for step in range(3):
            updates, state = tx.update({"w": normal(step, 8, 12)}, state, params)
        steps.append(updates["w"])
    np.testing.assert_array_equal(*steps)


def test_bfloat16_weights_get_the_dtype_of_their_own_and_states_in_float32():
    params = {"w": normal(0, 8, 12).astype(jnp.bfloat16), "v": normal(1, 12, 8)}
    for way in WAYS.values():
        tx = galore(3, optax.adam(0.01), recover=way)

        def steps(tx=tx):
            def step(state, _):
                updates, state = tx.update(params, state, params)
                return state, updates

            return jax.lax.scan(step, tx.init(params), None, 3)  # whose carry keeps its type

        state, updates = jax.eval_shape(steps)
        assert {k: x.dtype for k, x in updates.items()} == {k: x.dtype for k, x in params.items()}
        assert {x.dtype for x in jax.tree.leaves(state.recovery)} == {jnp.dtype("float32")}


def test_what_it_remembers_is_counted():
    _, _, state = one(Alice(0.01))
    _, _, plain = one("project")
    assert plain.recovery == ()
    more = {**state_bytes(plain)}
    more["moments"] += 4 * 12 + 4
    assert state_bytes(state) == more


def test_it_may_be_a_function():
    tx, params, state = one(lambda own, state: (own.scale * own.basis @ own.step, state))
    plain, _, theirs = one("project")
    got, state = tx.update(params, state, params)
    expected, _ = plain.update(params, theirs, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-7), got, expected)
    assert state.recovery == ()
    with pytest.raises(ValueError, match=r"recover: .* it returns float32 of shape \(3, 12\)"):
        one(lambda own, state: (own.step, state))
    with pytest.raises(ValueError, match='subspace="gaussian" is not orthonormal'):
        one("fira", subspace="gaussian")
    with pytest.raises(ValueError, match="recover='firra' is unknown; choose one of project, fira"):
        one("firra")


def test_a_limiter_that_does_not_know_the_schedule_says_so():
    rising = optax.linear_schedule(0.0, 0.01, 100)
    inject = optax.inject_hyperparams(optax.adam)
    for inner in (optax.adam(rising), inject(rising)):
        with pytest.warns(UserWarning, match=r"recover=Fira.*the schedule as its learning_rate"):
            galore(3, inner, recover="fira").init(jnp.ones((8, 12)))
    galore(3, optax.adam(rising), recover=Fira(rising)).init(jnp.ones((8, 12)))
    galore(3, inject(0.01), recover="fira").init(jnp.ones((8, 12)))


def test_a_learning_rate_that_is_none_is_refused():
    for way in (Fira, Apollo, Alice):
        with pytest.raises(ValueError, match=r"learning_rate='x' must be a number"):
            way("x")


def test_a_history_without_a_memory_is_refused():
    class Past:
        history = staticmethod(lambda state, basis: basis)

        def __call__(self, own, state):
            return own.gradient, state

    class Rows(Past):
        history = staticmethod(lambda state, basis: basis.T)

        def init(self, like, rank):
            return jnp.zeros(())

    for kind, message in ((Past, r"a method init makes"), (Rows, r"shape \(3, 8\); it must")):
        with pytest.raises(ValueError, match=rf"history.*{message}"):
            galore(3, optax.sgd(1.0), recover=kind()).init(jnp.ones((8, 12)))


def test_a_learning_rate_of_zero_limits_nothing_afterwards():
    rising, gradient = optax.linear_schedule(0.0, 1.0, 10), normal(0, 8, 12)
    for way in (Fira(rising), Apollo(rising)):
        tx = galore(3, optax.sgd(rising), recover=way, scale=1.0, subspace="svd")
        updates = run(tx, jnp.zeros((8, 12)), [gradient] * 3)
        # Plain SGD: the update is the whole gradient, at a rate of 0, 0.1, 0.2.
        np.testing.assert_allclose(updates[-1], -0.3 * gradient, atol=1e-5)
