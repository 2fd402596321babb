"""`galore` around every optimizer that optax has, and inside every wrapper that optax has."""

import functools
import inspect
from types import FunctionType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import (
    FEW,
    INNERS,
    REMEMBER_PARAMS,
    START,
    TARGET,
    arguments,
    inside_galore,
    loss,
    parts_slow,
)
from optax import contrib

from galore_optax import (
    GaLoreDimensionNumbers,
    cast_state,
    galore,
    galore_adamw,
    quantize_state,
    state_bytes,
)

MATRICES = GaLoreDimensionNumbers(-2, -1)  # of every leaf with at least two axes
# These take another transformation; they are tested around galore, and inside, further below.
WRAPPERS = {
    "apply_if_finite",
    "chain",
    "conditionally_mask",
    "conditionally_transform",
    "flatten",
    "freeze",
    "lookahead",
    "masked",
    "mechanize",
    "multi_transform",
    "named_chain",
    "partition",
    "sam",
    "schedule_free",
    "selective_transform",
    "split_real_and_imaginary",
    "with_extra_args_support",
}
BESIDE = {
    "optimistic_adam": "deprecated, warns; optimistic_adam_v2 took its place",
    "differentially_private_aggregate": "takes a gradient for each example: before galore",
    "dpsgd": "takes a gradient for each example",
    "keep_params_nonnegative": "speaks of coordinates of the weights: after galore",
    "measure_with_ema": "turns updates into a measurement, inside optax.monitor",
    "scale_by_muon": "for matrices alone; muon has it",
    "scale_by_backtracking_linesearch": "evaluates the loss at the weights: after galore",
    "scale_by_zoom_linesearch": "evaluates the loss at the weights: after galore",
    "set_to_zero": "takes no step",
}
COMPILED = {"sgd", "adamw", "adafactor", "galore", "lamb", "muon", "polyak_sgd", "sophia"}
# optax itself fails for them: IndexError.
WITHOUT_SCALARS = {"sm3", "scale_by_sm3"}


def described(x):
    return x.shape, x.dtype


def outside_jit(step):
    """In the place of `jax.jit` where most operations were compiled for another case already."""
    return step


def descend(tx, steps=4, *, name=None, params=START, jit=outside_jit):
    """Params and state after steps on the loss."""

    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, **arguments(name, value))
        return optax.apply_updates(params, updates), state

    state, step = tx.init(params), jit(step)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def around(inner, **options):
    # The exact subspace, since it compiles in a fraction of the time.
    usual = dict(update_proj_gap=3, scale=1.0, subspace="svd", weight_dimension_numbers=MATRICES)
    return galore(4, inner, **usual | options)


def test_every_transformation_of_optax_is_listed():
    returned = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)

    def makes_a_transformation(name, value):
        if name.startswith("_") or not isinstance(value, FunctionType | functools.partial):
            return False
        signature = inspect.signature(value)
        return (
            signature.return_annotation in returned
            or "learning_rate" in signature.parameters
            or name.startswith("scale_by_")
        )

    public = {
        name
        for package in (optax, contrib)
        for name, value in vars(package).items()
        if makes_a_transformation(name, value)
    }
    assert public == set(INNERS) | WRAPPERS | set(BESIDE)


@pytest.mark.parametrize("name", parts_slow(inside_galore(INNERS.keys() - REMEMBER_PARAMS)))
def test_lowers_a_convex_loss_around(name):
    start = {k: x for k, x in START.items() if k != "gain" or name not in WITHOUT_SCALARS}
    jit = jax.jit if name in COMPILED else outside_jit
    params, state = descend(around(INNERS[name]), name=name, params=start, jit=jit)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    assert loss(params) < loss(start)
    # Matrices, a stack of them, vectors and scalars all take part.
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True):
        assert not np.array_equal(before, after)


@pytest.mark.parametrize("name", inside_galore(REMEMBER_PARAMS))
def test_an_inner_that_remembers_params_is_refused_unless_told_what_to_do(name):
    with pytest.raises(ValueError, match=r"(?s)inner.*params.*moments"):
        around(INNERS[name]).init(START)
    params, state = descend(around(INNERS[name], moments="keep"), name=name)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))


def test_params_may_be_remembered_of_leaves_that_are_not_projected():
    def labels(params):
        return jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "rest", params)

    inner = optax.partition({"matrix": optax.adam(0.05), "rest": contrib.dog(1.0)}, labels)
    params, _ = descend(around(inner))
    assert loss(params) < loss(START)


@pytest.mark.parametrize("name", inside_galore(INNERS))
def test_its_state_keeps_its_structure_shapes_and_dtypes_around(name):
    tx = around(INNERS[name], moments="keep" if name in REMEMBER_PARAMS else None)
    params = {k: x for k, x in START.items() if k != "gain" or name not in WITHOUT_SCALARS}
    state = jax.eval_shape(tx.init, params)

    def update(grads, state, params):
        return tx.update(grads, state, params, **arguments(name, jnp.float32(1)))[1]

    new_state = jax.eval_shape(update, params, state, params)
    assert jax.tree.map(described, new_state) == jax.tree.map(described, state)


# Wrappers that here change nothing, so that the trajectory must stay the same.

ADAMW = optax.adamw(0.05, weight_decay=0.1)
NOTHING = {"w": False, "bias": False}
EVERY_LEAF = functools.partial(jax.tree.map, lambda leaf: True)
NEUTRAL = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "chain": lambda tx: optax.chain(optax.identity(), tx, optax.scale(1.0)),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "freeze": lambda tx: optax.chain(tx, optax.freeze(NOTHING)),
    "masked": lambda tx: optax.masked(tx, EVERY_LEAF),
    "multi_transform": lambda tx: optax.multi_transform(
        {"all": tx}, functools.partial(jax.tree.map, lambda leaf: "all")
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "named_chain": lambda tx: optax.named_chain(("galore", tx), ("nothing", optax.identity())),
    "partition": lambda tx: optax.partition(
        {"all": tx}, functools.partial(jax.tree.map, lambda leaf: "all")
    ),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=NOTHING),
    "split_real_and_imaginary": contrib.split_real_and_imaginary,
    "with_extra_args_support": optax.with_extra_args_support,
}
# Inside, leaves are projected (a stack is a tuple), so that a mask must be a function.
NEUTRAL_INSIDE = NEUTRAL.keys() - {"freeze", "selective_transform", "MultiSteps"}


@pytest.fixture(scope="module")
def plain():
    return descend(around(ADAMW), params=FEW, jit=jax.jit)[0]


def assert_close(got, expected, atol=1e-6):
    """Equal but for the order of float32 sums, which XLA's fusions change."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, expected)


@pytest.mark.parametrize("name", NEUTRAL)
def test_works_inside(name, plain):
    got, _ = descend(NEUTRAL[name](around(ADAMW)), params=FEW, jit=jax.jit)
    assert_close(got, plain)


@pytest.mark.parametrize("name", sorted(NEUTRAL_INSIDE))
def test_works_around(name, plain):
    got, _ = descend(around(NEUTRAL[name](ADAMW)), params=FEW, jit=jax.jit)
    assert_close(got, plain)


def test_accumulated_steps_inside_are_those_of_the_summed_projections():
    inner = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = around(inner, update_proj_gap=100)
    state = tx.init(START)
    grads = [jax.grad(loss)(START), START]
    first, state = tx.update(grads[0], state, START)
    second, state = tx.update(grads[1], state, START)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    basis = state.bases["w"]
    np.testing.assert_array_equal(first["w"], 0)
    np.testing.assert_allclose(second["w"], -0.1 * basis @ (basis.T @ mean["w"]), atol=1e-6)
    np.testing.assert_allclose(second["bias"], -0.1 * mean["bias"], atol=1e-7)


def test_flattened_inside_and_warned_of_outside():
    with pytest.raises(ValueError, match=r"inner: its state.*moments=.keep"):
        around(optax.flatten(optax.adam(0.05))).init(FEW)
    tx = around(optax.flatten(optax.adam(0.05)), moments="keep")
    apart = around(optax.adam(0.05), moments="keep")
    assert_close(descend(tx, params=FEW)[0], descend(apart, params=FEW)[0])
    with pytest.warns(UserWarning, match="projects nothing"):
        optax.flatten(galore(4, optax.adam(0.05))).init({"w": START["w"]})


# Wrappers that do something.


def test_masked_and_partitioned_leaves_have_no_basis():
    mask = {"w": True, "layers": False, "bias": False, "gain": False, "nothing": {}}
    state = optax.masked(around(ADAMW), mask).init(START).inner_state
    assert [x.shape for x in jax.tree.leaves(state.bases)] == [(6, 4)]
    labels = jax.tree.map(lambda m: "matrix" if m else "rest", mask)
    tx = optax.partition({"matrix": around(ADAMW), "rest": optax.sgd(0.1)}, labels)
    params, state = descend(tx, steps=1)
    assert len(jax.tree.leaves(state.inner_states["matrix"].inner_state.bases)) == 1
    expected = START["layers"] - 0.1 * (START["layers"] - TARGET["layers"])
    np.testing.assert_allclose(params["layers"], expected, atol=1e-6)


def test_a_mask_as_a_tree_reaches_the_projected_leaves():
    # Of a stacked leaf every matrix is a leaf of its own: a mask by tree is a prefix of that.
    mask = {"w": True, "layers": True, "bias": False, "gain": False, "nothing": {}}
    params, _ = descend(around(optax.masked(optax.set_to_zero(), mask)), steps=1)
    np.testing.assert_array_equal(params["w"], START["w"])
    np.testing.assert_array_equal(params["layers"], START["layers"])
    assert not np.array_equal(params["bias"], START["bias"])


def test_a_step_that_is_not_finite_leaves_no_trace():
    tx = optax.apply_if_finite(around(ADAMW), 3)
    state = tx.init(START)
    bad = jax.tree.map(lambda x: x * jnp.nan, START)
    updates, new_state = tx.update(bad, state, START)
    assert not any(x.any() for x in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, new_state.inner_state, state.inner_state)


def test_hyperparameters_are_injected_and_changed():
    static = ("rank", "update_proj_gap", "seed", "weight_dimension_numbers")
    tx = optax.inject_hyperparams(galore_adamw, static_args=(*static, "subspace", "side"))(
        learning_rate=optax.linear_schedule(0.1, 0.0, 4),
        rank=4,
        scale=0.5,
        weight_decay=0.1,
        subspace="svd",
        weight_dimension_numbers=MATRICES,
    )
    state = tx.init(START)
    assert {"learning_rate", "scale", "weight_decay", "b1"} <= state.hyperparams.keys()
    grads = jax.grad(loss)(START)
    update = jax.jit(tx.update)
    updates, _ = update(grads, state, jax.tree.map(jnp.zeros_like, START))
    state.hyperparams["scale"] = jnp.float32(1.0)  # no new compilation: it is an array
    doubled, state = update(grads, state, jax.tree.map(jnp.zeros_like, START))
    np.testing.assert_allclose(doubled["w"], 2 * updates["w"], rtol=1e-5)
    np.testing.assert_array_equal(doubled["bias"], updates["bias"])
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.1)
    assert update._cache_size() == 1


def test_reduce_on_plateau_lowers_the_rate_of_the_whole():
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = optax.chain(around(optax.sgd(0.1)), plateau)
    state = tx.init(START)
    grads = jax.grad(loss)(START)
    sizes = []
    for _ in range(4):
        updates, state = tx.update(grads, state, START, value=1.0)
        sizes.append(optax.tree.norm(updates))
    assert state[1].scale <= 0.5
    np.testing.assert_allclose(sizes[-1], sizes[0] * state[1].scale, rtol=1e-3)


@pytest.mark.parametrize(
    "wrap",
    [
        contrib.mechanize,
        lambda tx: contrib.schedule_free(tx, 0.1),
        lambda tx: contrib.sam(tx, optax.sgd(0.01), sync_period=2),
    ],
    ids=["mechanize", "schedule_free", "sam"],
)
def test_a_wrapper_that_remembers_params_works_outside(wrap):
    tx = wrap(around(optax.sgd(0.1)))
    params, state = descend(tx, steps=8, params=FEW, jit=jax.jit)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    assert loss(params) < loss(FEW)


def test_coordinates_of_the_weights_are_bounded_after():
    tx = optax.chain(around(optax.sgd(0.5)), optax.keep_params_nonnegative())
    params, _ = descend(tx, params=jax.tree.map(jnp.abs, START))
    assert min(x.min() for x in jax.tree.leaves(params)) == 0  # some targets are negative


def test_schedule_free_outside_evaluates_its_average():
    params, state = descend(contrib.schedule_free(around(optax.sgd(0.3)), 0.3), steps=8)
    average = contrib.schedule_free_eval_params(state, params)
    assert loss(average) < loss(START)
    assert not np.allclose(average["w"], params["w"])


def test_lookahead_keeps_the_slow_params_whole():
    tx = optax.lookahead(around(optax.sgd(0.1)), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(START)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params.slow) < loss(START)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params.slow, params.fast)


@pytest.mark.parametrize(
    "search",
    [optax.scale_by_zoom_linesearch(5), optax.scale_by_backtracking_linesearch(5)],
    ids=["zoom", "backtracking"],
)
def test_a_line_search_runs_after(search):
    tx = optax.chain(around(optax.sgd(1.0)), search)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params, state = FEW, tx.init(FEW)
    for _ in range(3):
        params, state = step(params, state)
    assert loss(params) < loss(FEW) / 10


def test_gradients_by_example_are_made_private_before():
    private = contrib.differentially_private_aggregate(1.0, 0.0, key=0)
    tx = optax.chain(private, around(optax.sgd(1.0)))
    grads = jax.random.normal(jax.random.key(0), (3, 6, 8))
    updates, state = tx.update(grads, tx.init(grads[0]), grads[0])
    clipped = grads / jnp.maximum(1, jnp.linalg.norm(grads, axis=(1, 2), keepdims=True))
    basis = state[1].bases
    np.testing.assert_allclose(updates, -basis @ (basis.T @ clipped.mean(0)), atol=1e-6)


# What a transformation must bear.


def test_abstract_init_describes_the_state():
    tx = optax.chain(optax.clip_by_global_norm(1.0), around(ADAMW))
    abstract = jax.eval_shape(tx.init, START)
    assert jax.tree.map(described, abstract) == jax.tree.map(described, tx.init(START))


def test_scanned_steps_with_donated_buffers_equal_a_loop(plain):
    tx = around(ADAMW)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=4)[0], donate_argnums=0)
    carry = jax.tree.map(jnp.copy, (FEW, tx.init(FEW)))
    params, _ = run(carry)
    assert all(x.is_deleted() for x in jax.tree.leaves(carry))
    assert_close(params, plain)


def test_states_of_a_chain_are_mapped_as_params():
    tx = optax.chain(optax.clip(1.0), around(optax.adam(0.1)), optax.trace(0.9))
    state = tx.init(START)
    mapped = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    adam = mapped[1].inner[0]
    assert all((x == 1).all() for x in jax.tree.leaves((adam.mu, adam.nu, mapped[2].trace)))
    assert adam.count == mapped[1].count == 0


def test_trees_without_matrices_pass_through():
    for params in ({}, {"a": {}, "b": None}, ()):
        tx = galore(4, optax.adam(0.1))
        updates, state = tx.update(params, tx.init(params), params)
        assert updates == params
        assert state.count == 1
    params = {"scalar": jnp.asarray(1.0), "vector": jnp.ones(3)}
    plain = optax.adam(0.1)
    expected, _ = plain.update(params, plain.init(params))
    with pytest.warns(UserWarning, match="projects nothing"):
        state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_leaves_that_are_none_stay_none():
    params = {"w": START["w"], "frozen": None}
    tx = around(ADAMW)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["frozen"] is None
    assert jnp.isfinite(updates["w"]).all()


@pytest.mark.parametrize("inner", ["sgd", "adamw", "adafactor", "lion"])
@pytest.mark.parametrize(("params", "grads"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_params_and_gradients_may_differ_in_dtype(inner, params, grads):
    tx = around(INNERS[inner])
    weights = optax.tree.cast(START, params)
    state = tx.init(weights)
    gradients = optax.tree.cast(jax.grad(loss)(START), grads)
    for _ in range(2):
        updates, new_state = tx.update(gradients, state, weights)
        assert jax.tree.map(described, new_state.bases) == jax.tree.map(described, state.bases)
        state, weights = new_state, optax.apply_updates(weights, updates)
    assert {x.dtype.name for x in jax.tree.leaves(weights)} == {params}
    assert loss(optax.tree.cast(weights, "float32")) < loss(START)


def test_float64_stays_float64_and_is_exact_to_it():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        weight, grad = rng.standard_normal((2, 6, 8))
        tx = galore(3, optax.sgd(0.1), scale=1.0, subspace="svd")
        params = jnp.asarray(weight)
        updates, state = jax.jit(tx.update)(jnp.asarray(grad), tx.init(params), params)
        assert updates.dtype == state.bases.dtype == jnp.float64
        left = np.linalg.svd(grad)[0][:, :3]
        np.testing.assert_allclose(updates, -0.1 * left @ (left.T @ grad), atol=1e-13)


def test_bfloat16_descends_close_to_float32(plain):
    weights = optax.tree.cast(FEW, "bfloat16")
    tx = around(ADAMW)
    state = tx.init(weights)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(weights), state, weights)
        assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"bfloat16"}
        weights = optax.apply_updates(weights, updates)
    # bfloat16 has eight bits: values near 1 round to 1 / 256 at every step.
    got = loss(optax.tree.cast(weights, "float32"))
    np.testing.assert_allclose(got, loss(plain), rtol=0.05)


def test_an_integer_that_adamw_decays_decays_inside():
    params, grads = {"i": jnp.arange(6), "w": jnp.ones((4, 8))}, {"i": jnp.zeros(6, int)}
    grads |= {"w": jnp.ones((4, 8))}
    inner = optax.adamw(0.1, weight_decay=0.1)
    expected, _ = inner.update(grads, inner.init(params), params)
    tx = galore(2, cast_state(inner), subspace="random")
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["i"], expected["i"])
    assert jnp.abs(expected["i"]).sum() > 0


def test_an_inner_may_return_its_state_in_other_containers():
    """As it may in optax; its wrappers with conditionals, such as MultiSteps, refuse it."""
    count = optax.GradientTransformation(
        lambda params: [jnp.zeros([])],
        lambda updates, state, params=None: (updates, (state[0] + 1,)),
    )
    params = {"w": jnp.ones((4, 8))}
    for tx in (galore(2, count, subspace="random"), quantize_state(count)):
        _, state = tx.update(params, tx.init(params), params)
        assert jax.tree.leaves(state)[-1] == 1


def test_an_inner_whose_first_update_changes_the_tree_of_its_state_is_refused_and_runs_before():
    """optax's MultiSteps, apply_if_finite and conditionally_transform refuse it, too."""
    monitor, params = optax.monitor({"norm": optax.tree.norm}), {"w": jnp.ones((4, 8))}
    inner = optax.chain(monitor, optax.adam(0.1))
    for tx in (galore(2, inner), quantize_state(inner, min_size=1)):
        with pytest.raises(ValueError, match=r"inner: its update changes the tree of its state .*"):
            tx.init(params)
    for tx in (optax.MultiSteps(inner, 2), optax.apply_if_finite(inner, 2)):
        with pytest.raises((ValueError, TypeError)):
            tx.update(params, tx.init(params), params)
    tx = optax.chain(monitor, galore(2, optax.adam(0.1), subspace="random"))
    _, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(state[0].measurements["norm"], 32**0.5, rtol=1e-6)


@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_a_learning_rate_may_be_set_to_a_number(moments):
    params = {"w": jnp.ones((6, 10)), "b": jnp.ones(10)}
    inner = optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.1)
    tx = galore(2, inner, moments=moments)
    states = [optax.tree.set(tx.init(params), learning_rate=x) for x in (0.01, jnp.float32(0.01))]
    assert state_bytes(states[0]) == state_bytes(states[1])
    found, wanted = (tx.update(params, state, params)[0] for state in states)  # not jitted
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
