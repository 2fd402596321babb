"""What each leaf of a state is, for every optimizer of optax: its moments follow a new basis."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import INNERS, REMEMBER_PARAMS, arguments, parts_slow

from galore_optax import GaLoreDimensionNumbers, galore, subspace_parts
from galore_optax.trace.roles import FACTOR, FIRST, OTHER, SECOND, state_roles
from galore_optax.trace.traced import trace

NUMBERS = {"wide": GaLoreDimensionNumbers(), "tall": GaLoreDimensionNumbers(-2, -1), "bias": None}
RANK = 3
PARAMS = {
    "wide": jax.random.normal(jax.random.key(0), (5, 8)),
    "tall": jax.random.normal(jax.random.key(1), (2, 7, 4)),
    "bias": jnp.ones(8),
}
PERMUTATION, SIGNS = np.array([2, 0, 1]), np.array([-1.0, 1.0, -1.0], np.float32)
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(RANK, RANK)))[0].astype(np.float32)
# Random numbers, or curvature along random directions, are others in another basis.
RANDOM = {"noisy_sgd", "add_noise", "sophia"}
# Subtracts a mean over coordinates: another optimizer in another basis, though it has no state.
MIXES = {"centralize"}
# Their states are not understood, of which `galore` warns by name.
NOT_UNDERSTOOD = {
    "galore": {"projector", "mu", "nu"},
    "scale_by_galore": {"projector", "mu", "nu"},
    "sophia": {"nu"},
}


def stays(gradient, basis, key):
    del gradient, key
    return basis


def permuted(gradient, basis, key):
    """The same subspace, its vectors in another order and with other signs."""
    del gradient, key
    return basis[:, PERMUTATION] * SIGNS


def rotated(gradient, basis, key):
    """The same subspace in another basis."""
    del gradient, key
    return basis @ ROTATION


def gradients(step):
    keys = jax.random.split(jax.random.key(step), len(PARAMS))
    pairs = zip(PARAMS.items(), keys, strict=True)
    return {name: jax.random.normal(key, x.shape) for (name, x), key in pairs}


def made(inner, find, **options):
    usual = dict(update_proj_gap=2, scale=1.0, subspace=find, weight_dimension_numbers=NUMBERS)
    return galore(RANK, inner, **usual | options)


def trajectory(inner, find, name, steps=4):
    """Updates of a stack, projected from the right, and of a bias."""
    few = ("tall", "bias")
    numbers, params = ({key: tree[key] for key in few} for tree in (NUMBERS, PARAMS))
    tx = made(inner, find, weight_dimension_numbers=numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, update = tx.init(params), tx.update
    found = []
    for step in range(steps):
        value = optax.tree.norm(params)
        grads = gradients(step)
        grads = {key: grads[key] for key in few}
        updates, state = update(grads, state, params, **arguments(name, value))
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found


@pytest.mark.parametrize(
    "name",
    parts_slow(sorted(INNERS.keys() - REMEMBER_PARAMS - RANDOM - MIXES - set(NOT_UNDERSTOOD))),
)
def test_updates_do_not_depend_on_the_order_and_the_signs_of_a_basis(name):
    expected = trajectory(INNERS[name], stays, name)
    found = trajectory(INNERS[name], permuted, name)
    for one, other in zip(found, expected, strict=True):
        for key, update in one.items():
            size = float(jnp.abs(other[key]).max())
            np.testing.assert_allclose(update, other[key], atol=2e-5 * max(size, 1e-6), err_msg=key)


@pytest.mark.parametrize("name", sorted(NOT_UNDERSTOOD))
def test_a_state_that_is_not_understood_is_named_at_init_once(name):
    tx = made(INNERS[name], stays)
    with pytest.warns(UserWarning, match="not known how the inner's state") as seen:
        tx.init({"wide": PARAMS["wide"]} | {"bias": PARAMS["bias"]} | {"tall": PARAMS["tall"]})
    named = " ".join(str(warning.message) for warning in seen)
    for field in NOT_UNDERSTOOD[name]:
        assert f".{field}['wide']" in named
    # A projector of zeros, until the inner finds one again, is a step of 0.
    with pytest.warns(UserWarning, match="is set to what it was at first when a basis changes"):
        made(INNERS[name], stays, moments="reset").init(PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*uses params elementwise")
        made(INNERS[name], stays, moments="keep").init(PARAMS)


def of_each_param(begin, step):
    """A transformation whose state has for each param what `begin` makes, such as a tuple."""

    def update(updates, state, params=None):
        leaves, tree = jax.tree.flatten(updates)
        made = [step(g, own) for g, own in zip(leaves, tree.flatten_up_to(state), strict=True)]
        return tree.unflatten([u for u, _ in made]), tree.unflatten([own for _, own in made])

    return optax.GradientTransformation(lambda params: jax.tree.map(begin, params), update)


@pytest.mark.parametrize(
    ("begin", "step"),
    [
        # A tuple for each param, so that the param's path is not the end of the state's.
        (lambda p: (jnp.zeros(p.size),), lambda g, s: (g, (0.9 * s[0] + g.ravel(),))),
        (lambda p: {"l": jnp.eye(len(p))}, lambda g, s: (g, {"l": s["l"] + g @ g.T})),
        # Integers, of which no basis makes others.
        (lambda p: jnp.zeros(p.shape, jnp.int8), lambda g, s: (s * g, jnp.sign(g).astype(s.dtype))),
        (lambda p: jnp.zeros(p.shape, bool), lambda g, s: (jnp.where(s, g, 0), g > 0)),
        (lambda p: jnp.zeros(p.shape, int), lambda g, s: (g / (1 + s), s + (jnp.abs(g) > 1))),
    ],
)
def test_a_state_of_ones_own_that_is_not_understood_is_named(begin, step):
    tx = made(of_each_param(begin, step), stays, weight_dimension_numbers=None)
    with pytest.warns(UserWarning, match=r"not known how the inner's state \['wide'\]"):
        tx.init({"wide": PARAMS["wide"], "bias": PARAMS["bias"]})


def test_a_state_of_ones_own_that_belongs_to_no_basis_is_not_named():
    tx = of_each_param(
        lambda p: (jnp.zeros_like(p), jnp.zeros(p.shape[-1], int), jnp.zeros(3, int)),
        lambda g, s: (s[0], (s[0] + g, s[1] + jnp.any(g != 0, axis=0), s[2] + 1)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx = made(tx, stays, weight_dimension_numbers=None)
        tx.init({"wide": PARAMS["wide"], "bias": PARAMS["bias"]})


@pytest.mark.parametrize(
    "name", parts_slow(sorted(INNERS.keys() - REMEMBER_PARAMS - set(NOT_UNDERSTOOD)))
)
def test_first_moments_rotate_exactly_and_second_ones_as_ldadam_says(name):
    tx, params = made(INNERS[name], rotated), {"wide": PARAMS["wide"]}
    tx = made(INNERS[name], rotated, weight_dimension_numbers=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = tx.init(params)
    for step in range(3):
        grads = {"wide": gradients(step)["wide"]}
        value = optax.tree.norm(params)
        before = state
        _, state = tx.update(grads, state, params, **arguments(name, value))
    after = subspace_parts(tx).refresh(grads, before._replace(count=before.count + 1), params)
    if not (after.refreshes > before.refreshes).all():
        after = subspace_parts(tx).refresh(grads, before, params)
    assert (after.refreshes > before.refreshes).all()
    q = np.asarray(after.bases["wide"], np.float64).T @ np.asarray(before.bases["wide"], np.float64)
    inner = optax.with_extra_args_support(INNERS[name])
    small = {"wide": jnp.ones((RANK, 8))}
    roles = state_roles(trace(inner, small), {(0, 0)})
    pairs = list(zip(jax.tree.leaves(before.inner), jax.tree.leaves(after.inner), strict=True))
    first = None
    for role, (old, new) in zip(roles, pairs, strict=True):
        if role.kind == OTHER:
            if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
                continue
            np.testing.assert_array_equal(new, old)
            continue
        old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
        size = max(np.abs(old).max(), 1e-12)
        if role.kind == FIRST:
            first = old if first is None else first
            np.testing.assert_allclose(new, q @ old, atol=1e-5 * size)
        elif role.kind == FACTOR or (role.kind == SECOND and not _has_first(roles, role)):
            np.testing.assert_allclose(new, (q * q) @ old, atol=1e-5 * size)


def _has_first(roles, role):
    return any(r.kind == FIRST and r.average and r.param == role.param for r in roles)


def kinds(tx):
    """The kinds of the arrays of a state, by path."""
    params = {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32)}
    traced = trace(optax.with_extra_args_support(tx), params)
    state = jax.eval_shape(tx.init, params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    roles = state_roles(traced, {(0, 0)})
    pairs = zip(paths, roles, traced.states, strict=True)
    return {path: role.kind for path, role, x in pairs if x.ndim}


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adan(0.1), {"m": FIRST, "v": FIRST, "g": FIRST, "n": SECOND}),
        (optax.yogi(0.1), {"mu": FIRST, "nu": SECOND}),
        (optax.rprop(0.1), {"prev_updates": FIRST, "step_sizes": SECOND}),
        (optax.adadelta(0.1), {"e_g": SECOND, "e_x": SECOND}),
        (optax.chain(optax.clip(1.0), optax.trace(0.9)), {"trace": FIRST}),
        (optax.lars(0.1, momentum=0.9), {"trace": FIRST}),
        (optax.contrib.adopt(0.1), {"mu": FIRST, "nu": SECOND}),
        (
            optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=None),
            {"v_row": FACTOR, "v_col": OTHER, "v": OTHER},
        ),
    ],
)
def test_kinds_do_not_go_by_names(tx, expected):
    found = kinds(tx)
    by_field = {path.split(".")[-1].split("[")[0]: kind for path, kind in found.items()}
    assert by_field == expected


def test_the_axis_of_a_factor_is_found_for_square_matrices_too():
    params = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    roles = state_roles(trace(optax.with_extra_args_support(inner), params), {(0, 0)})
    assert [(role.kind, role.axes) for role in roles if role.axes][:2] == [
        (FACTOR, (0,)),
        (OTHER, (1,)),
    ]


def test_wrappers_are_looked_through():
    for wrap in (
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.masked(tx, {"w": True}),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    ):
        found = kinds(wrap(optax.adam(0.1)))
        assert {k for p, k in found.items() if ".mu" in p or "acc_grads" in p} == {FIRST}
        assert {k for p, k in found.items() if ".nu" in p} == {SECOND}


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.adam(0.1), {"mu"}),
        (optax.adan(0.1), {"m", "v"}),
        (optax.contrib.ademamix(0.1), {"m1", "m2"}),
        (optax.contrib.simplified_ademamix(0.1), set()),  # a sum
        (optax.inject_hyperparams(optax.contrib.simplified_ademamix)(0.1), set()),
        (optax.apply_if_finite(optax.contrib.simplified_ademamix(0.1), 3), set()),
        # The same sum, of gradients that something before it has made smaller.
        (optax.chain(optax.scale(0.5), optax.contrib.simplified_ademamix(0.1)), set()),
        (optax.chain(optax.clip_by_block_rms(1.0), optax.contrib.simplified_ademamix(0.1)), set()),
        (optax.chain(optax.clip_by_block_rms(1.0), optax.scale(0.5), optax.adam(0.1)), {"mu"}),
        (optax.contrib.adopt(0.1), set()),  # of quotients
        (optax.chain(optax.clip_by_global_norm(1.0), optax.clip(1.0), optax.lamb(0.1)), {"mu"}),
        (optax.inject_hyperparams(optax.adamw)(0.1, b1=lambda count: 0.9), {"mu"}),
        (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), {"mu", "acc_grads"}),
    ],
)
def test_first_moments_that_are_no_averages_of_gradients_are_known(tx, expected):
    tx = optax.with_extra_args_support(tx)
    params = {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32)}
    paths = [
        jax.tree_util.keystr(p)
        for p, _ in jax.tree.leaves_with_path(jax.eval_shape(tx.init, params))
    ]
    pairs = zip(paths, state_roles(trace(tx, params), {(0, 0)}), strict=True)
    found = {p.split(".")[-1].split("[")[0] for p, r in pairs if r.kind == FIRST and r.average}
    assert found == expected


@pytest.mark.parametrize(
    ("new", "divisor", "expected"),
    [
        (lambda v, g: v + g**2, jnp.sqrt, True),
        (lambda v, g: v + g**2, lambda v: v**0.5, True),
        (lambda v, g: v + g**4, lambda v: v**0.25, False),  # a fourth moment
        (lambda v, g: v + g**4, lambda v: jnp.sqrt(jnp.sqrt(v)), False),
        (lambda v, g: jnp.sqrt(v**2 + g**2), lambda v: v, False),  # the root is in the state
        (lambda v, g: jnp.sqrt(v * v + g**2), lambda v: v, False),
    ],
)
def test_a_moment_that_is_no_average_of_squares_is_known(new, divisor, expected):
    """Beside a first moment m it is not compared with m², which is of another size."""

    def step(g, s):
        m, v = 0.9 * s[0] + 0.1 * g, new(0.9 * s[1], g)
        return m / (divisor(v) + 1e-8), (m, v)

    tx = of_each_param(lambda p: (jnp.zeros(p.shape), jnp.zeros(p.shape)), step)
    tx, params = optax.with_extra_args_support(tx), {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32)}
    _, second = state_roles(trace(tx, params), {(0, 0)})
    assert (second.kind, second.root) == (SECOND, expected)


def test_an_update_that_divides_by_the_moment_before_the_step_is_known():
    def stale(tx):
        params = {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32)}
        return any(role.stale for role in state_roles(trace(tx, params)))

    for tx, expected in (
        (optax.contrib.acprop(0.1), True),
        (optax.contrib.adopt(0.1), True),
        (optax.adam(0.1), False),
        (optax.amsgrad(0.1), False),
        (optax.scale_by_factored_rms(min_dim_size_to_factor=2), False),
    ):
        assert stale(optax.with_extra_args_support(tx)) == expected


@pytest.mark.parametrize("name", ["acprop", "adopt"])
@pytest.mark.parametrize("rank", [2, 6])
def test_a_stale_divisor_does_not_make_a_quadratic_diverge(name, rank):
    target = jax.random.normal(jax.random.key(0), (12, 16))
    tx = galore(rank, INNERS[name], update_proj_gap=10)

    @jax.jit
    def step(weight, state):
        updates, state = tx.update(weight - target, state, weight)
        return optax.apply_updates(weight, updates), state

    weight, state, losses = jnp.zeros_like(target), None, []
    state = tx.init(weight)
    for _ in range(60):
        weight, state = step(weight, state)
        losses.append(float(jnp.mean((weight - target) ** 2)))
    assert max(losses) <= 1.05 * losses[0]
    assert losses[-1] < losses[0]
