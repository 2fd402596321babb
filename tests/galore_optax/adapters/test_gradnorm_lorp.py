"""GradNormLoRP: its weight, its gradients, its optimizer, and merging."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_adapters import IN, OUT, RANK, normal, trained_a_while

from galore_optax import galore_adamw, gradnorm_lorp_adamw, quantize_weights
from galore_optax.adapters.base import (
    Adapter,
    factor_dimension_numbers,
    join,
    merge,
    product,
    split,
)
from galore_optax.adapters.gradnorm_lorp import GradNormLoRP


def test_gradients_are_the_reconstructions_formulas_in_float64():
    with jax.enable_x64():
        node = trained_a_while(dtype=jnp.float64)
        x, target = normal(5, 30, IN, dtype=jnp.float64), normal(6, 30, OUT, dtype=jnp.float64)

        def loss_of_weight(w):
            return jnp.mean(jnp.tanh(x @ w) * target)

        def loss(a, b, m):
            return loss_of_weight(GradNormLoRP(node.base, a, b, m).matrix())

        found = jax.grad(loss, argnums=(0, 1, 2))(node.a, node.b, node.magnitude)
        merged = np.asarray(node.matrix())
        of_weight = np.asarray(jax.grad(loss_of_weight)(merged))
        base, a, b, m = map(np.asarray, (node.base, node.a, node.b, node.magnitude))
    v = base + a @ b
    norms = np.linalg.norm(v, axis=0)
    unit = v / norms
    of_m = (of_weight * unit).sum(axis=0)
    of_v = m / norms * (of_weight - unit * of_m)
    for gradient, wanted in zip(found, (of_v @ b.T, a.T @ of_v, of_m), strict=True):
        assert gradient.dtype == jnp.float64
        # The bound below, 1e-6, changes a norm of about 4 by a part in 1e13.
        np.testing.assert_allclose(gradient, wanted, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(merged, m * unit, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layers", [(), (3,)])
def test_an_adapter_begins_with_the_weight_itself(layers, dtype):
    w = normal(0, *layers, IN, OUT, dtype=dtype)
    node = GradNormLoRP.create(w, jax.random.key(1), RANK)
    assert {x.dtype for x in jax.tree.leaves(node)} == {jnp.dtype(dtype)}
    # In bfloat16 the magnitude is rounded, to 8 bits.
    np.testing.assert_allclose(
        np.float32(node.matrix()), np.float32(w), rtol=1e-6 if dtype == jnp.float32 else 2**-7
    )
    assert float(jnp.abs(node.a).max()) <= IN**-0.5 * 1.01
    assert float(jnp.abs(node.a).mean()) == pytest.approx(IN**-0.5 / 2, rel=0.2)


def test_zero_columns_and_tiny_ones_are_safe_and_learn():
    w = normal(0, IN, OUT).at[:, 3].set(0.0).at[:, 4].set(1e-30)
    params = {"w": GradNormLoRP.create(w, jax.random.key(1), RANK)}
    np.testing.assert_allclose(params["w"].matrix(), w, rtol=1e-6)
    trained, frozen = split(params)
    x, target = normal(2, 64, IN), normal(2, 64, IN) @ normal(4, IN, OUT)

    def loss(trained):
        return jnp.mean((product(x, join(trained, frozen)["w"]) - target) ** 2, axis=0)

    gradient = jax.grad(lambda t: jnp.mean(loss(t)))(trained)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient["w"].b[:, 3]).max()) > 1e-3
    tx = optax.adam(0.05)
    state = tx.init(trained)

    @jax.jit
    def step(trained, state):
        updates, state = tx.update(jax.grad(lambda t: jnp.mean(loss(t)))(trained), state)
        return optax.apply_updates(trained, updates), state

    before = loss(trained)
    for _ in range(200):
        trained, state = step(trained, state)
    assert np.all(loss(trained)[3:5] < 0.7 * before[3:5])


def test_a_column_whose_direction_vanishes_keeps_gradients_finite():
    node = trained_a_while()
    node = GradNormLoRP(-(node.a @ node.b), node.a, node.b, node.magnitude)
    gradient = jax.grad(
        lambda b: jnp.sum(GradNormLoRP(node.base, node.a, b, node.magnitude).matrix())
    )
    assert bool(jnp.all(jnp.isfinite(gradient(node.b))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_merged_weight_gives_equal_outputs(dtype):
    node, x = trained_a_while(dtype=dtype), normal(9, 30, IN, dtype=dtype)
    merged = merge({"w": node, "norm": jnp.ones(3)})
    assert merged["w"].dtype == dtype
    assert isinstance(merged["w"], jax.Array)
    np.testing.assert_array_equal(product(x, node), x @ merged["w"])


def test_a_stack_is_merged_and_run_like_its_layers():
    stack, x = trained_a_while(3), normal(9, 30, IN)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(3)]
    merged = merge(stack)
    for layer, w in zip(layers, merged, strict=True):
        # One program for a layer, one for the stack: products summed in another order.
        np.testing.assert_allclose(layer.matrix(), w, rtol=1e-5, atol=1e-6)
    _, outputs = jax.lax.scan(lambda carry, layer: (carry, product(x, layer)), 0, stack)
    np.testing.assert_allclose(outputs, jnp.einsum("ni,lio->lno", x, merged), atol=1e-4)


def residual_sizes(function, *args) -> list[int]:
    pullback = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return [x.size for x in jax.tree.leaves(pullback)]


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_no_merged_matrix_is_kept_for_the_backward_pass(policy):
    layers, rows = 3, 5
    trained, frozen = split({"w": trained_a_while(layers)})

    def step(x, layer):
        return jnp.tanh(product(x, layer["w"])) @ jnp.ones((OUT, IN)), None

    if policy is not None:
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)

    def run(trained, frozen):
        return jax.lax.scan(step, jnp.ones((rows, IN)), join(trained, frozen))[0]

    kept = residual_sizes(lambda t: run(t, frozen), trained)
    # The frozen weights themselves may be among them, once.
    assert sum(size == layers * IN * OUT for size in kept) <= 1


def test_a_product_has_the_gradients_of_the_merged_matrix():
    node, x, g = trained_a_while(), normal(8, 30, IN), normal(9, 30, OUT)
    found = jax.vjp(product, x, node)[1](g)
    wanted = jax.vjp(lambda x, node: x @ node.matrix(), x, node)[1](g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def params_of_a_model():
    return {
        "first": trained_a_while(2),
        "second": trained_a_while(seed=10),
        "head": normal(20, IN, OUT),
        "norm": normal(21, IN),
        "absent": None,
    }


@pytest.mark.parametrize("adapters_only", [False, True])
def test_frozen_weights_have_no_gradient_and_no_state(adapters_only):
    params = params_of_a_model()
    trained, frozen = split(params, adapters_only=adapters_only)
    jax.tree.map(np.testing.assert_array_equal, join(trained, frozen), params)
    shapes = {x.shape for x in jax.tree.leaves(trained)}
    assert (2, IN, OUT) not in shapes
    assert ((IN,) in shapes) is not adapters_only
    state = gradnorm_lorp_adamw(0.01, 2).init(trained)
    weights = IN * OUT * (2 if adapters_only else 1)
    assert max(x.size for x in jax.tree.leaves(state)) < weights + (not adapters_only)


def test_factors_are_projected_below_the_adapters_rank_and_nothing_else_is():
    trained, _ = split(params_of_a_model())
    state = gradnorm_lorp_adamw(0.01, 0.5).init(trained)
    bases, mu = state.bases, state.inner[0].mu
    assert bases["first"].a.shape == bases["first"].b.shape == (2, RANK, RANK // 2)
    assert [x.shape for x in mu["first"].b] == [(RANK // 2, OUT)] * 2
    assert mu["second"].a.shape == (IN, RANK // 2)
    assert mu["second"].magnitude.shape == (OUT,)
    assert mu["head"].shape == (IN, OUT)


def test_the_optimizer_is_galores_on_the_factors():
    trained, _ = split({"w": trained_a_while(), "norm": normal(21, IN)})
    ours = gradnorm_lorp_adamw(0.01, 2, weight_decay=0.1, update_proj_gap=2)
    theirs = galore_adamw(
        0.01, 2, weight_decay=0.1, update_proj_gap=2,
        weight_dimension_numbers=factor_dimension_numbers,
    )  # fmt: skip
    results = []
    for tx in (ours, theirs):
        params, state = trained, tx.init(trained)
        update = jax.jit(tx.update)
        for i in range(3):
            gradient = jax.tree.map(lambda p, i=i: jnp.cos(p + i), params)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_factors_in_arrays_of_ones_own_are_projected_too():
    params = {"a": normal(0, IN, RANK), "b": jnp.zeros((RANK, OUT)), "m": jnp.ones(OUT)}
    state = gradnorm_lorp_adamw(0.01, 2).init(params)
    assert state.inner[0].mu["a"].shape == (IN, 2)
    assert state.inner[0].mu["m"].shape == (OUT,)


@pytest.mark.parametrize("rank", [RANK, RANK + 5, 1.0, lambda path, shape: RANK])
def test_a_gradients_rank_that_is_not_below_the_adapters_is_refused(rank):
    trained, _ = split({"w": trained_a_while()})
    tx = gradnorm_lorp_adamw(0.01, rank)
    with pytest.raises(ValueError, match=rf"compresses nothing.*\['w'\]\.a.* below {RANK}, the a"):
        tx.init(trained)


def test_params_that_hold_the_frozen_weight_are_refused():
    with pytest.raises(
        ValueError, match=r"\['w'\] contain the frozen weight; give .*split\(params\)"
    ):
        gradnorm_lorp_adamw(0.01, 2).init({"w": trained_a_while()})


@pytest.mark.parametrize("rank", [0, -1, IN + 1, 2.0, True])
def test_an_adapters_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank={rank!r} .* from 1 to its smaller side, {IN}"):
        GradNormLoRP.create(jnp.ones((3, IN, OUT)), jax.random.key(0), rank)
    with pytest.raises(ValueError, match=r"shape \(3,\) has no low-rank factors"):
        GradNormLoRP.create(jnp.ones(3), jax.random.key(0), 1)


def test_moments_may_be_stored_in_8_bits():
    trained, _ = split({"w": GradNormLoRP.create(normal(0, 96, 128), jax.random.key(1), 64)})
    state = jax.eval_shape(gradnorm_lorp_adamw(0.01, 48, bits=8).init, trained)
    moment = state.inner[0].mu["w"].b
    assert moment.shape == (48, 128)
    assert moment.nbytes < 0.3 * 4 * moment.size


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_of_a_quantized_weight_merges_into_its_code(bits):
    base = quantize_weights(normal(0, 2, 64, 96), bits=bits)
    node = GradNormLoRP.create(base, jax.random.key(1), RANK)
    np.testing.assert_allclose(node.matrix(), base.dequantize(), rtol=1e-5)
    node = GradNormLoRP(base, node.a, normal(2, 2, RANK, 96) / 4, 2 * node.magnitude)
    new = jax.jit(GradNormLoRP.restarted)(node, jax.random.key(3))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, node)
    assert jax.tree.structure(new) == jax.tree.structure(node)
    # Rounded up or down at random: by less than a step of the code, and by none in the mean.
    error = np.asarray(new.matrix() - node.matrix())
    step = np.asarray(jnp.max(new.base.scales))
    assert np.abs(error).max() < 1.001 * step
    assert abs(error.mean()) < 4 * step / error.size**0.5


def test_an_adapter_says_that_it_needs_a_matrix():
    with pytest.raises(NotImplementedError):
        Adapter(None, jnp.ones((3, 1)), jnp.ones((1, 3))).matrix()
