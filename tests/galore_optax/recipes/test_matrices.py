"""RACS, SCALE, Muon and Alice: float64 references, stacks, layers, shardings, what is refused."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import normal, run
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from toy_layers import MATRIX, NUMBERS, assert_equal, by_layers, ordinary

from galore_optax import (
    Alice,
    GaLoreDimensionNumbers,
    TuckerDimensionNumbers,
    alice,
    galore,
    muon,
    quantize_state,
    quantize_weights,
    racs,
    scale_sgd,
    state_bytes,
    state_shardings,
)
from galore_optax.quantization.array import dequantized


def doubles(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def test_racs_scales_rows_and_columns_by_the_fixed_points_mean():
    n, m, rate, alpha, beta, gamma = 8, 12, 0.02, 0.05, 0.9, 1.01
    factors = jnp.geomspace(1e-12, 1e-9, m)  # whose squares float32 can hardly hold
    grads = [normal(i, n, m) * factors * (5 if i == 3 else 1) for i in range(1, 6)]
    got = run(racs(rate), jnp.zeros((n, m)), grads)
    q_mean, s_mean, previous, weight = np.zeros(n), np.zeros(m), None, np.zeros((n, m))
    for step, g in enumerate(doubles(*grads)):
        q = np.ones(n)
        for _ in range(5):
            s = (g**2).T @ q / np.sum(q**2)
            q = g**2 @ s / np.sum(s**2)
        q_mean = beta * q_mean + (1 - beta) * q
        s_mean = beta * s_mean + (1 - beta) * s
        update = np.diag(q_mean**-0.5) @ g @ np.diag(s_mean**-0.5)
        if previous is not None:
            update *= gamma / max(np.linalg.norm(update) / previous, gamma)
        previous = np.linalg.norm(update)
        weight = weight - rate * alpha * update
        np.testing.assert_allclose(got[step], weight, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mark", [lambda tree: tree, lambda tree: lambda params: tree])
def test_a_bias_of_the_last_layer_has_adamw_alone(mark):
    params = {"w": normal(0, 6, 8), "head": {"kernel": normal(1, 8, 5), "bias": normal(2, 5)}}
    grads = [jax.tree.map(lambda x, i=i: normal(i, *x.shape), params) for i in range(3, 7)]
    got = run(scale_sgd(0.01, mark({"w": False, "head": True})), params, grads)[-1]
    bias = run(optax.adam(0.01), params["head"]["bias"], [g["head"]["bias"] for g in grads])[-1]
    np.testing.assert_allclose(got["head"]["bias"], bias, rtol=1e-6)


def test_scale_normalizes_columns_and_keeps_momentum_in_the_last_layer_alone():
    params = {"w": normal(0, 6, 8), "head": normal(1, 8, 5), "norm": normal(2, 8)}
    grads = [jax.tree.map(lambda x, i=i: normal(i, *x.shape), params) for i in range(3, 6)]
    last = {"w": False, "head": True, "norm": False}
    tx = scale_sgd(0.01, last, weight_decay=0.1)
    got = run(tx, params, grads)[-1]
    expected = dict(zip(params, doubles(*params.values()), strict=True))
    mean = 0.0
    for grad in grads:
        w, head = doubles(grad["w"], grad["head"])
        mean = 0.9 * mean + 0.1 * head
        for name, g in {"w": w, "head": mean}.items():
            unit = g / np.sqrt(np.mean(g**2, 0))
            expected[name] = expected[name] - 0.01 * (unit + 0.1 * expected[name])
    expected["norm"] = run(
        optax.adamw(0.01, weight_decay=0.1), params["norm"], [g["norm"] for g in grads]
    )[-1]
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, atol=2e-6, err_msg=name)
    assert state_bytes(tx.init(params))["moments"] == 4 * (8 * 5 + 2 * 8)


def orthogonalized(x):
    """Five steps of Newton and Schulz with the coefficients of Jordan et al."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_by_hand(weight, grads, rate, decay):
    mean = 0.0
    for i, g in enumerate(grads, 1):
        mean = 0.95 * mean + 0.05 * g
        ahead = 0.95 * mean / (1 - 0.95 ** (i + 1)) + 0.05 * g / (1 - 0.95**i)  # Nesterov's
        size = 0.2 * np.sqrt(max(weight.shape))
        weight = weight - rate * (size * orthogonalized(ahead) + decay * weight)
    return weight


def test_muon_orthogonalizes_momentum_and_has_adamw_for_the_rest():
    params = {"w": normal(0, 6, 8), "tall": normal(1, 9, 4), "norm": normal(2, 8)}
    grads = [jax.tree.map(lambda x, i=i: normal(i, *x.shape), params) for i in range(3, 7)]
    mask = {"w": True, "tall": False, "norm": True}
    tx = muon(0.01, weight_decay=0.1, mask=mask, product_dtype="float32")
    got = run(tx, params, grads)[-1]
    w, tall = (doubles(params[name], *[g[name] for g in grads]) for name in ("w", "tall"))
    np.testing.assert_allclose(got["w"], muon_by_hand(w[0], w[1:], 0.01, 0.1), atol=2e-6)
    turned = muon_by_hand(tall[0].T, [g.T for g in tall[1:]], 0.01, 0)
    np.testing.assert_allclose(got["tall"], turned.T, atol=2e-6)
    norm = run(optax.nadamw(0.01, weight_decay=0.1), params["norm"], [g["norm"] for g in grads])
    np.testing.assert_allclose(got["norm"], norm[-1], atol=1e-6)


def test_muon_in_bfloat16_takes_products_in_it_and_gives_nearly_the_same_update():
    params, gradient, single = normal(0, 64, 128), normal(1, 64, 128), jnp.float32
    update = jax.jit(muon(1.0).update)
    state = muon(1.0).init(params)
    text = update.lower(gradient, state, params).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all(line.count("bf16>") == 3 for line in products)
    made, exact = (update(gradient, state, params)[0], muon(1.0, product_dtype=single).update)
    expected, _ = exact(gradient, state, params)
    assert made.dtype == single
    assert 1e-3 < np.linalg.norm(made - expected) / np.linalg.norm(expected) < 0.1


@pytest.mark.parametrize(("bits", "bytes_a_weight", "off"), [(8, 1.04, 0.05), (4, 0.56, 0.25)])
def test_muons_momentum_in_few_bits_gives_nearly_its_update(bits, bytes_a_weight, off):
    params, grads = normal(0, 64, 128), [normal(1, 64, 128) + normal(i, 64, 128) for i in range(9)]
    exact, tx = muon(0.01), muon(0.01, bits=bits)
    states = exact.init(params), tx.init(params)
    updates = [jax.jit(x.update) for x in (exact, tx)]
    assert state_bytes(states[1])["moments"] < bytes_a_weight * params.size
    for grad in grads:
        (expected, a), (got, b) = (f(grad, s, params) for f, s in zip(updates, states, strict=True))
        states = a, b
    assert 0 < np.linalg.norm(got - expected) < off * np.linalg.norm(expected)


def test_muons_function_of_the_params_sees_all_of_them():
    params = {"w": normal(0, 2, 6, 8), "b": normal(1, 2, 8)}
    sides = {3: GaLoreDimensionNumbers(1, 2), 2: None}
    tx = muon(
        0.01,
        product_dtype="float32",
        weight_dimension_numbers=lambda p: {name: sides[p[name].ndim] for name in p},
    )
    got = run(tx, params, [params])[-1]
    for i in range(2):
        w, g = doubles(params["w"][i], params["w"][i])
        np.testing.assert_allclose(got["w"][i], muon_by_hand(w, [g], 0.01, 0), atol=2e-6)


@pytest.mark.parametrize("tx", [muon(0.01), muon(0.01, bits=8), racs(0.01), scale_sgd(0.01, False)])
def test_stacks_that_are_not_taken_for_matrices_are_named_once(tx):
    params = {"layers": normal(0, 2, 6, 8), "biases": normal(1, 2, 8), "head": normal(2, 8, 9)}
    with pytest.warns(UserWarning, match=r"^2 params .* the first of shape \(2, 8\); say") as seen:
        tx.init(params)
    assert len({str(w.message) for w in seen}) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init({"head": params["head"], "bias": normal(3, 9)})


@pytest.mark.parametrize("bits", [None, 8])
def test_muons_matrices_may_be_sharded_over_explicit_axes(bits):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    heads = PartitionSpec("a", "b", None)
    numbers = GaLoreDimensionNumbers(0, (1, 2))
    tx = muon(0.02, product_dtype="float32", weight_dimension_numbers=numbers)
    tx = tx if bits is None else quantize_state(tx, bits, min_size=1)
    gradient = normal(0, 16, 4, 8)
    expected, _ = tx.update(gradient, tx.init(gradient), gradient)
    placed = jax.device_put(gradient, NamedSharding(mesh, heads))
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(placed)
        updates, after = jax.jit(tx.update)(placed, state, placed)
    np.testing.assert_allclose(updates, expected, atol=1e-6)
    assert updates.sharding.spec == heads
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_the_recipe_of_alice_is_the_papers():
    tx = alice(0.02, 3, leading=2, tracking=0)
    params = normal(0, 8, 12)
    # The first step: Adam's signs in the subspace, and the compensation of equal energies.
    gradient = normal(1, 8, 12)
    updates, state = tx.update(gradient, tx.init(params), params)
    basis, g = doubles(state.bases, gradient)
    residual = g - basis @ basis.T @ g
    unit = np.sqrt(8 - 3) * residual / np.sqrt(0.1 * np.sum(residual**2, 0))
    expected = -0.02 * 0.3 * (basis @ np.sign(basis.T @ g) + 0.4 * unit)
    np.testing.assert_allclose(updates, expected, atol=1e-6)
    leading = np.linalg.svd(g)[0][:, 0]
    assert np.linalg.norm(basis[:, :2].T @ leading) > 0.5


def test_alice_finds_a_subspace_from_the_gradients_that_it_tracked():
    n, m, r, beta = 8, 12, 3, 0.9
    numbers = GaLoreDimensionNumbers(1, 2)
    tx = galore(
        r, optax.adam(0.01), recover=Alice(0.01, tracking=beta), subspace="svd", update_proj_gap=3,
        weight_dimension_numbers=numbers,
    )  # fmt: skip
    params, grads = normal(9, 2, n, m), [normal(i, 2, n, m) for i in range(4)]
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads[:3]:
        _, state = update(grad, state, params)
    basis, *steps = doubles(state.bases, *grads)
    mean = np.zeros((2, r, r))
    for g in steps[:3]:
        small = basis.mT @ g
        mean = beta * mean + (1 - beta) * small @ small.mT
    np.testing.assert_allclose(state.recovery[2], mean, atol=1e-5)
    _, state = update(grads[3], state, params)
    whole = beta * basis @ mean @ basis.mT + (1 - beta) * steps[3] @ steps[3].mT
    leading = np.linalg.eigh(whole)[1][..., -r:]
    overlap = np.linalg.norm(leading.mT @ np.asarray(state.bases), axis=(1, 2)) ** 2 / r
    np.testing.assert_allclose(overlap, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["racs", "scale", "muon"])
def test_matrices_of_a_stack_are_scaled_apart_and_a_layer_wise_step_does_the_same(name):
    numbers = {**NUMBERS, "out": {"norm": None, "head": MATRIX}}

    def last_layer(params):
        paths, tree = jax.tree.flatten_with_path(params)
        return tree.unflatten(["head" in jax.tree_util.keystr(path) for path, _ in paths])

    tx = {
        "racs": racs(0.02, weight_dimension_numbers=numbers),
        "scale": scale_sgd(0.01, last_layer, weight_dimension_numbers=numbers),
        "muon": muon(0.01, product_dtype="float32", weight_dimension_numbers=numbers),
    }[name]
    assert_equal(by_layers(tx), ordinary(tx), 1e-5)


def test_states_of_rows_and_columns_are_sharded_as_these_are():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    spec = PartitionSpec(None, "a", "b")
    tx = racs(0.02, weight_dimension_numbers=GaLoreDimensionNumbers(1, 2))
    at = NamedSharding(mesh, spec)
    shardings = state_shardings(tx, jax.ShapeDtypeStruct((3, 8, 16), jnp.float32), at)
    rows, columns, norm = shardings[0].matrices
    assert [tuple(x.spec) for x in (rows, columns, norm)] == [(None, "a"), (None, "b"), (None,)]
    gradient = normal(0, 3, 8, 16)
    expected, _ = tx.update(gradient, tx.init(gradient), gradient)
    with jax.set_mesh(mesh):
        placed = jax.device_put(gradient, at)
        state = jax.jit(tx.init)(placed)
        updates, after = jax.jit(tx.update)(placed, state, placed)
    np.testing.assert_allclose(updates, expected, atol=1e-6)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_alice_at_full_rank_is_sharded_and_so_are_squares():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    at = NamedSharding(mesh, PartitionSpec("a", "b"))
    for shape in ((8, 16), (8, 8)):
        state = state_shardings(alice(0.01, 8), jax.ShapeDtypeStruct(shape, jnp.float32), at)
        assert len(state.recovery[2].spec) == 2  # (rank, rank), along a side at most once


@pytest.mark.parametrize("kind", ["racs", "scale", "muon"])
def test_quantized_weights_are_updated_as_their_values(kind):
    params = quantize_weights({"w": normal(0, 64, 128), "b": normal(1, 128)})
    values, grads = dequantized(params), {"w": normal(2, 64, 128), "b": normal(3, 128)}
    last = {"w": True, "b": False}
    tx = {
        "racs": racs(0.01, weight_decay=0.1),
        "scale": scale_sgd(0.01, last, weight_decay=0.1),
        "muon": muon(0.01, weight_decay=0.1, bits=8),
    }
    update = jax.jit(tx[kind].update)
    state = jax.jit(tx[kind].init)(params)
    expected, _ = update(grads, state, values)
    close = functools.partial(np.testing.assert_allclose, atol=1e-7)
    jax.tree.map(close, update(grads, state, params)[0], expected)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: racs("x"), "learning_rate='x'"),
        (lambda: racs(0.1, steps=0), "steps=0 must be"),
        (lambda: racs(0.1, decay=1.0), "decay=1.0: give"),
        (lambda: muon(0.1, beta=1.0), "beta=1.0: give"),
        (lambda: muon(0.1, bits=3), "bits=3"),
        (lambda: muon(0.1, product_dtype="int8"), "product_dtype='int8'"),
        (lambda: muon(0.1, state_dtype="int8"), "state_dtype='int8' is not a float type"),
        # As optax.inject_hyperparams makes jnp.float32, a function, of the step.
        (lambda: muon(0.1, state_dtype=jnp.float32(0)), r"^state_dtype=.* static_args=\(\.\.\.\)"),
        (lambda: muon(0.1, bits=8, state_dtype="float32"), "state_dtype='float32' with bits=8"),
        (lambda: scale_sgd(0.1, {"w": 1}), "last_layer: 1 in it must be True or False"),
        (lambda: alice(0.1, 3, leading=0), "leading=0 must be"),
        (lambda: alice(0.1, 3, compensation=-1), "compensation=-1: give"),
        (
            lambda: run(alice(0.1, 3, leading=4), normal(0, 8, 9), [normal(1, 8, 9)]),
            "leading=4: .* rank=3",
        ),
        (
            lambda: racs(0.1, weight_dimension_numbers=TuckerDimensionNumbers((0, 1))).init(
                {"w": jnp.ones((3, 4))}
            ),
            r"TuckerDimensionNumbers at \['w'\]",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_a_zero_gradient_changes_nothing_and_nothing_is_nan_afterwards():
    params = jnp.ones((6, 8)).at[2].set(0)  # and a row of zeros
    for tx in (racs(0.02), scale_sgd(0.01, False), muon(0.01), muon(0.01, bits=4)):
        state = tx.init(params)
        updates, state = tx.update(0 * params, state, params)
        np.testing.assert_array_equal(updates, 0)
        updates, _ = tx.update(params, state, params)
        assert np.isfinite(updates).all()
        assert (updates[0] < 0).all()
