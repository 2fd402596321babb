"""galore: the published trajectories, stacks, composition, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from inners import normal, run
from paths import FIXTURES

from galore_optax import (
    Adaptive,
    Alice,
    GaLoreDimensionNumbers,
    Staggered,
    TuckerDimensionNumbers,
    adamw8bit,
    galore,
    galore_adafactor,
    galore_adamw,
    galore_adamw8bit,
    q_galore_adamw8bit,
    quantize_state,
    subspace_parts,
)

PUBLISHED = np.load(FIXTURES / "galore_torch.npz")
SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16), "odd": (13, 7)}
CASES = [(name, rank) for name, shape in SHAPES.items() for rank in (1, 4, min(shape))]
STACKED = GaLoreDimensionNumbers(1, 2)


@pytest.mark.parametrize(("shape", "rank"), CASES)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_decay", "adafactor", "adafactor_momentum"])
def test_follows_the_published_optimizer(shape, rank, optimizer):
    common = dict(subspace="svd", update_proj_gap=200, scale=0.25)
    decay = 0.1 if optimizer.endswith(("decay", "momentum")) else 0.0
    if optimizer.startswith("adamw"):
        recipe = galore_adamw(0.01, rank, eps=1e-12, weight_decay=decay, **common)
        composed = galore(rank, optax.adamw(0.01, eps=1e-12, weight_decay=decay), **common)
    else:
        momentum = 0.9 if optimizer.endswith("momentum") else None
        recipe = galore_adafactor(0.01, rank, momentum=momentum, weight_decay=decay, **common)
        composed = recipe
    weight, grads = PUBLISHED[f"{shape}/weight"], PUBLISHED[f"{shape}/grads"]
    first, last = PUBLISHED[f"{shape}/{optimizer}/{rank}"]
    # galore-torch decays the weights after the update, optax before: they differ by
    # decay * lr * update, 0.1 * 0.01 * (at most sqrt(rank) * 0.25 * 0.01), a step.
    tolerance = 2e-6 if decay == 0 else 3e-5
    for tx in (recipe, composed):
        trajectory = run(tx, jnp.asarray(weight), jnp.asarray(grads))
        np.testing.assert_allclose(trajectory[0], first, atol=tolerance)
        np.testing.assert_allclose(trajectory[-1], last, atol=len(grads) * tolerance)


def test_refreshes_equal_projecting_with_each_gradients_own_subspace():
    # With plain SGD neither signs nor order of the singular vectors matter.
    params, gap, rank = normal(0, 12, 20), 2, 3
    grads = [normal(i, 12, 20) for i in range(1, 6)]
    got = run(galore(rank, optax.sgd(0.1), update_proj_gap=gap, subspace="svd"), params, grads)
    expected, weight = [], np.asarray(params, np.float64)
    for step, grad in enumerate(np.asarray(grads, np.float64)):
        if step % gap == 0:
            basis = np.linalg.svd(grad)[0][:, :rank]
        weight = weight - 0.1 * 0.25 * basis @ (basis.T @ grad)
        expected.append(weight)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("side", "shape", "basis"),
    [
        ("smaller", (8, 12), (8, 4)),
        ("smaller", (12, 8), (8, 4)),
        ("smaller", (8, 8), (8, 4)),
        ("larger", (8, 12), (12, 4)),
        ("larger", (12, 8), (12, 4)),
        ("left", (12, 8), (12, 4)),
        ("right", (8, 12), (12, 4)),
    ],
)
def test_side_says_which_side_of_the_matrix_is_projected(side, shape, basis):
    state = galore(4, optax.adam(1e-3), side=side).init(jnp.ones(shape))
    moment = state.inner[0].mu
    assert state.bases.shape == basis
    assert moment.size == 4 * shape[0] * shape[1] // basis[0]


def test_a_square_matrix_is_projected_on_its_input():
    state = galore(3, optax.adam(1e-3)).init(jnp.ones((8, 8)))
    assert state.inner[0].mu.shape == (3, 8)


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(0.01, weight_decay=0.1),
        optax.adafactor(0.01, min_dim_size_to_factor=2),
        optax.lamb(0.01),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01)),
    ],
    ids=["adamw", "adafactor", "lamb", "clipped adam"],
)
def test_a_stack_equals_its_matrices_apart(inner):
    options = dict(update_proj_gap=2, subspace="svd")
    grads = [normal(i, 3, 2, 8, 12) for i in range(5)]
    stacked = galore(4, inner, weight_dimension_numbers=GaLoreDimensionNumbers(2, 3), **options)
    apart = galore(4, inner, **options)

    def split(x):
        return [x[i, j] for i in range(3) for j in range(2)]

    got = run(stacked, normal(9, 3, 2, 8, 12), grads)[-1]
    expected = run(apart, split(normal(9, 3, 2, 8, 12)), [split(g) for g in grads])[-1]
    np.testing.assert_allclose(split(got), expected, atol=1e-6)  # order of float32 sums


def test_merged_axes_equal_the_reshaped_matrix():
    numbers = GaLoreDimensionNumbers(reduction_axis=(0, 2), output_axis=1)
    tx = galore(4, optax.adam(0.01), weight_dimension_numbers=numbers, subspace="svd")
    flat = galore(4, optax.adam(0.01), subspace="svd")

    def matrix(x):
        return x.transpose(0, 2, 1).reshape(-1, x.shape[1])

    grads = [normal(i, 4, 12, 2) for i in range(3)]
    got = run(tx, normal(9, 4, 12, 2), grads)[-1]
    expected = run(flat, matrix(normal(9, 4, 12, 2)), [matrix(g) for g in grads])[-1]
    np.testing.assert_allclose(matrix(got), expected, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_moving_over_from_optax_gives_its_trajectory(decay):
    shapes = {"wide": (12, 20), "tall": (20, 12), "square": (12, 12), "bias": (5,)}
    params = {name: normal(len(name), *shape) for name, shape in shapes.items()}
    grads = [jax.tree.map(lambda x, i=i: normal(i, *x.shape), params) for i in range(5)]
    theirs = optax.contrib.galore(0.01, rank=4, weight_decay=decay)
    ours = galore(4, optax.adamw(0.01, weight_decay=decay), side="larger", subspace="svd", scale=1)
    got, expected = run(ours, params, grads)[-1], run(theirs, params, grads)[-1]
    for name in params:
        np.testing.assert_allclose(got[name], expected[name], atol=2e-6, err_msg=name)


def test_leaves_that_are_not_projected_take_the_inner_update_unscaled():
    params = {"w": normal(0, 8, 12), "b": normal(1, 12), "embedding": normal(2, 16, 8)}
    numbers = {"w": GaLoreDimensionNumbers(), "b": None, "embedding": None}
    grads = [jax.tree.map(lambda x, i=i: normal(i, *x.shape), params) for i in range(3)]
    inner = optax.adamw(0.01, weight_decay=0.1)
    got = run(galore(4, inner, weight_dimension_numbers=numbers), params, grads)[-1]
    plain = run(inner, params, grads)[-1]
    for name in ("b", "embedding"):
        np.testing.assert_allclose(got[name], plain[name], atol=1e-7)
    assert not np.allclose(got["w"], plain["w"], atol=1e-3)


def test_dimension_numbers_may_be_a_tree_a_prefix_or_a_function():
    params = {
        "layers": {"a": normal(0, 3, 8, 12), "b": normal(1, 3, 12, 8)},
        "head": normal(2, 8, 9),
    }
    tree = {"layers": {"a": STACKED, "b": STACKED}, "head": None}
    prefix = {"layers": STACKED, "head": None}
    states = [
        galore(4, optax.adam(1e-3), weight_dimension_numbers=numbers).init(params)
        for numbers in (tree, prefix, lambda params: tree)
    ]
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    assert shapes[0] == shapes[1] == shapes[2]
    assert states[0].bases["layers"]["a"].shape == (3, 8, 4)


def test_a_param_that_is_none_takes_no_dimension_numbers():
    params = {"bias": None, "w": normal(0, 8, 12), "z": normal(1, 8)}
    numbers = {"bias": None, "w": GaLoreDimensionNumbers(), "z": None}
    bases = galore(4, optax.sgd(1.0), weight_dimension_numbers=numbers).init(params).bases
    assert jax.tree.map(jnp.shape, bases) == {"bias": None, "w": (8, 4), "z": optax.MaskedNode()}


def test_no_nan_enters_the_basis_and_the_refresh_stays_due():
    tx = galore(4, optax.sgd(1.0), update_proj_gap=10)
    params = normal(0, 8, 12)
    state = tx.init(params)
    random_basis = state.bases
    for bad in (jnp.full((8, 12), jnp.nan), jnp.zeros((8, 12)), params.at[0, 0].set(jnp.inf)):
        _, state = tx.update(bad, state, params)
        np.testing.assert_array_equal(state.bases, random_basis)
    good = normal(1, 8, 12)
    _, state = tx.update(good, state, params)
    assert state.next_refresh == 3 + 10
    assert not np.allclose(state.bases, random_basis)
    np.testing.assert_allclose(state.bases.T @ state.bases, np.eye(4), atol=1e-6)


def test_a_refresh_is_a_conditional_also_for_stacked_layers():
    tx = galore(4, optax.adam(1e-3), weight_dimension_numbers=STACKED)
    params = jnp.ones((5, 8, 12))
    jaxpr = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    outside = jaxpr[: jaxpr.index("cond[")]
    assert "cholesky" in jaxpr
    assert "cholesky" not in outside


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_and_state_keep_the_params_dtype(dtype):
    tx = galore(4, optax.adamw(0.01))
    params = normal(0, 8, 12).astype(dtype)
    state = tx.init(params)
    updates, new_state = tx.update(params, state, params)
    assert updates.dtype == dtype
    assert jax.tree.map(lambda x: x.dtype, new_state) == jax.tree.map(lambda x: x.dtype, state)


def test_composes_with_what_optax_users_combine():
    params = {"w": normal(0, 8, 12), "b": jnp.zeros(12)}
    grads = [jax.tree.map(lambda x, i=i: normal(i, *x.shape), params) for i in range(4)]
    inner = galore(4, optax.adamw(0.01, weight_decay=0.1))
    expected = run(inner, params, grads)[-1]
    composed = {
        "chain": optax.chain(optax.identity(), inner),
        "apply_if_finite": optax.apply_if_finite(inner, 10),
        "partition": optax.partition(
            {"matrix": inner, "rest": optax.adamw(0.01, weight_decay=0.1)},
            {"w": "matrix", "b": "rest"},
        ),
        "inject_hyperparams": optax.inject_hyperparams(
            galore_adamw, static_args=("rank", "update_proj_gap", "scale", "seed")
        )(learning_rate=0.01, rank=4, weight_decay=0.1),
    }
    for name, tx in composed.items():
        for leaf, wanted in zip(
            jax.tree.leaves(run(tx, params, grads)[-1]), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(leaf, wanted, atol=1e-6, err_msg=name)


def test_multi_steps_refreshes_on_the_mean_gradient():
    params = normal(0, 8, 12)
    grads = [normal(i, 8, 12) for i in range(4)]
    inner = galore(4, optax.sgd(0.1), update_proj_gap=1)
    got = run(optax.MultiSteps(inner, 2), params, grads)[-1]
    means = [(grads[0] + grads[1]) / 2, (grads[2] + grads[3]) / 2]
    np.testing.assert_allclose(got, run(inner, params, means)[-1], atol=1e-6)


def test_state_can_be_mapped_as_params_and_made_from_abstract_params():
    params = {"w": jnp.ones((8, 12)), "b": jnp.ones(12)}
    tx = galore(4, optax.adam(1e-3))
    state = tx.init(params)
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    assert (doubled.inner[0].mu["w"] == 1).all()
    assert doubled.count == 0
    numbers = {"w": GaLoreDimensionNumbers(), "b": None}
    tree = galore(4, optax.adam(1e-3), weight_dimension_numbers=numbers)
    mapped = optax.tree_utils.tree_map_params(tree, lambda x: x + 1, tree.init(params))
    assert (mapped.inner[0].mu["b"] == 1).all()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert jax.tree.map(jnp.shape, tx.init(abstract)) == jax.tree.map(jnp.shape, state)


def test_extra_arguments_reach_the_inner_transformation():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = galore(8, inner, scale=1.0)
    grad = normal(0, 8, 12)
    updates, _ = tx.update(grad, tx.init(grad), grad, value=3.0)
    np.testing.assert_allclose(updates, 3 * grad, atol=1e-5)  # rank 8 of 8 loses nothing


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)])
def test_a_key_is_the_seed_that_it_was_made_of(key):
    one, other = (galore(2, optax.sgd(0.1), seed=x).init(normal(0, 8, 12)) for x in (key, 3))
    np.testing.assert_array_equal(one.bases, other.bases)


def test_several_keys_are_no_seed():
    with pytest.raises(ValueError, match=r"seed of shape \(2,\) .* is no key"):
        galore(2, optax.sgd(0.1), seed=jax.random.split(jax.random.key(0)))


def test_a_run_repeats_itself_and_another_seed_does_not():
    params = normal(0, 8, 12)
    grads = [normal(i, 8, 12) for i in range(3)]
    runs = [run(galore(2, optax.adam(0.01), seed=seed), params, grads)[-1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_warns_of_what_it_leaves_out():
    with pytest.warns(UserWarning, match="projects nothing"):
        galore(4, optax.adam(1e-3)).init({"b": jnp.ones(3)})
    with pytest.warns(UserWarning, match="three or more axes"):
        galore(4, optax.adam(1e-3)).init({"w": jnp.ones((3, 4)), "s": jnp.ones((2, 3, 4))})


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (dict(rank=0), "rank=0"),
        (dict(rank=2.5), "rank=2.5"),
        (dict(rank=True), "rank=True"),
        (dict(moments="forget"), "moments=.forget."),
        (dict(update_proj_gap=0), "update_proj_gap=0"),
        (dict(scale=float("nan")), "scale=nan"),
        (dict(subspace="pca"), "subspace='pca'"),
        (dict(side="top"), "side='top'"),
        (dict(inner=0.1), "inner=0.1"),
        (dict(rank=np.array([4])), "rank=<array"),
        (dict(update_proj_gap=2**31), "update_proj_gap=2147483648 is too large"),
        (dict(scale=None), "scale=None must be a number, such as 0.25"),
        (dict(scale="0.25"), "scale='0.25' must be a number"),
        (dict(scale=1j), "scale=1j must be a number"),
        (dict(scale=10**40), "scale=1000.*: give a finite number"),
        (dict(scale=np.float32("nan")), "scale=.*nan.*: give a finite number"),
        (dict(scale=jnp.ones(2)), "scale=.* must be one real number"),
        (dict(side=np.array(["left"])), "side=<array"),
        (dict(decoupled_decay=0), "decoupled_decay=0 is unknown; choose one of None, False, True"),
        (dict(projection_bits=jnp.array(4)), "projection_bits=.* in static_args"),
        (dict(seed=1.5), "seed=1.5 must be an integer of at least 0"),
        (dict(seed=-1), "seed=-1"),
    ],
)
def test_arguments_out_of_range_name_themselves(arguments, names):
    with pytest.raises(ValueError, match=names):
        galore(**{"rank": 4, "inner": optax.adam(1e-3), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(update_proj_gap=lambda step: None), "update_proj_gap: it cannot be called with step"),
        (
            dict(update_proj_gap=lambda step: np.nan),
            "update_proj_gap: at step 0 it returns nan",
        ),
        (dict(update_proj_gap=lambda: 3), "update_proj_gap: it cannot be called with step 0"),
        (dict(update_proj_gap=lambda step: jnp.ones(3)), "update_proj_gap: at step 0 it returns"),
        (dict(subspace=lambda g, b, key: b.T), r"subspace: .* of shape \(4, 8\)"),
        (dict(subspace=lambda g: g), "subspace: it cannot be called with arguments of shapes"),
        (dict(moments=lambda name, x, turn: x[0]), "moments: .* makes one of shape"),
        (dict(moments=lambda name: None), "moments: the function does not carry them over"),
    ],
)
def test_functions_that_give_something_else_are_refused_at_init(arguments, message):
    tx = galore(**{"rank": 4, "inner": optax.adam(1e-3), **arguments})
    with pytest.raises(ValueError, match=message):
        tx.init(jnp.ones((8, 12)))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (dict(learning_rate=None), "learning_rate=None"),
        (dict(learning_rate="0.1"), "learning_rate='0.1'"),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        (dict(b1=1.0), "b1=1.0: give a finite number, at least 0, less than 1"),
        (dict(b2=None), "b2=None"),
        (dict(eps="x"), "eps='x'"),
        (dict(weight_decay=-1), "weight_decay=-1: give a finite number, at least 0"),
    ],
)
@pytest.mark.parametrize("recipe", [galore_adamw, q_galore_adamw8bit, adamw8bit])
def test_arguments_of_recipes_out_of_range_name_themselves(recipe, arguments, names):
    rank = {} if recipe is adamw8bit else {"rank": 4}
    with pytest.raises(ValueError, match=names):
        recipe(**{"learning_rate": 0.1, **rank, **arguments})


@pytest.mark.parametrize(
    "numbers",
    [
        {"w": GaLoreDimensionNumbers(0, 2)},
        GaLoreDimensionNumbers(0, 0),
        {"w": 3},
        {"other": GaLoreDimensionNumbers()},
        GaLoreDimensionNumbers("a", 1),
        GaLoreDimensionNumbers(True, False),
        TuckerDimensionNumbers(()),
        TuckerDimensionNumbers,
    ],
)
def test_dimension_numbers_that_do_not_fit_are_refused_at_init(numbers):
    with pytest.raises(ValueError, match="weight_dimension_numbers"):
        galore(4, optax.adam(1e-3), weight_dimension_numbers=numbers).init({"w": jnp.ones((8, 12))})


@pytest.mark.parametrize(
    "made_with",
    [dict(rank=4), dict(side="right"), dict(side="both"), dict(weight_dimension_numbers=None)],
)
def test_a_state_that_was_made_with_other_arguments_is_refused_by_the_leaf_and_the_shapes(
    made_with,
):
    params = {"w": jnp.ones((16, 24)), "b": jnp.ones((3, 5))}
    usual = dict(
        rank=8,
        inner=optax.adam(0.1),
        weight_dimension_numbers={"w": GaLoreDimensionNumbers(), "b": None},
    )
    state = galore(**usual | made_with).init(params)
    leaf = "b" if "weight_dimension_numbers" in made_with else "w"
    with pytest.raises(ValueError, match=rf"state: its bases of the leaf at \['{leaf}'\] have the"):
        galore(**usual).update(params, state, params)


def test_optax_dimension_numbers_are_accepted():
    theirs = optax.contrib.GaLoreDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    params = {"heads": jnp.ones((8, 3, 5)), "bias": jnp.ones(5)}
    state = galore(4, optax.adam(1e-3), weight_dimension_numbers=theirs).init(params)
    assert state.bases["heads"].shape == (8, 4)
    assert state.bases["bias"] == optax.MaskedNode()


def test_an_array_in_the_place_of_a_static_argument_says_what_to_do():
    tx = optax.inject_hyperparams(galore_adamw)(learning_rate=0.01, rank=4)
    with pytest.raises(ValueError, match="static_args"):
        tx.init(jnp.ones((8, 12)))
    tx = optax.inject_hyperparams(galore_adamw, static_args=("rank", "update_proj_gap", "seed"))(
        learning_rate=0.01, rank=4
    )
    params = normal(0, 8, 12)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)  # the scale is an array here
    assert jnp.isfinite(updates).all()


def tucker(gradient, modes, rank):
    """The gradient within the leading directions of its unfoldings, in float64."""
    core, bases = np.asarray(gradient, np.float64), []
    for mode in modes:
        unfolded = np.moveaxis(np.asarray(gradient, np.float64), mode, 0)
        basis = np.linalg.svd(unfolded.reshape(unfolded.shape[0], -1))[0][:, :rank]
        bases.append(basis)
    for mode, basis in zip(modes, bases, strict=True):
        core = np.moveaxis(np.tensordot(basis @ basis.T, core, (1, mode)), 0, mode)
    return core


@pytest.mark.parametrize(
    ("shape", "numbers", "side", "modes"),
    [
        ((8, 12), GaLoreDimensionNumbers(), "both", (0, 1)),
        ((12, 8), GaLoreDimensionNumbers(), "both", (0, 1)),
        ((3, 3, 8, 16), TuckerDimensionNumbers((0, 1, 2, 3)), "smaller", (2, 3)),
        ((6, 7, 8), TuckerDimensionNumbers((2, 0, 1)), "smaller", (0, 1, 2)),
        ((3, 2, 4), TuckerDimensionNumbers((0, 1, 2)), "smaller", ()),
        # A depthwise kernel: more channels than the rank, fewer other elements.
        ((1, 3, 1, 16), TuckerDimensionNumbers((0, 1, 2, 3)), "smaller", (3,)),
    ],
)
def test_several_sides_and_tensors_equal_a_float64_tucker_projection(shape, numbers, side, modes):
    tx = galore(
        4, optax.sgd(0.1), subspace="svd", side=side, update_proj_gap=1,
        weight_dimension_numbers=numbers,
    )  # fmt: skip
    params, grads = normal(0, *shape), [normal(i, *shape) for i in range(1, 4)]
    expected = np.asarray(params, np.float64)
    for got, grad in zip(run(tx, params, grads), grads, strict=True):
        expected = expected - 0.25 * 0.1 * tucker(grad, modes, 4)
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_a_batch_of_tensors_equals_its_tensors_apart():
    stacked = TuckerDimensionNumbers((1, 2, 3))
    grads = [normal(i, 2, 5, 6, 7) for i in range(3)]
    options = dict(update_proj_gap=2, subspace="svd")
    tx = galore(4, optax.adam(0.01), weight_dimension_numbers=stacked, **options)
    one = galore(
        4, optax.adam(0.01), weight_dimension_numbers=TuckerDimensionNumbers((0, 1, 2)), **options
    )
    got = run(tx, normal(9, 2, 5, 6, 7), grads)[-1]
    expected = run(one, list(normal(9, 2, 5, 6, 7)), [list(g) for g in grads])[-1]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_rank_may_be_a_fraction_or_a_function_of_path_and_shape():
    params = {"a": jnp.ones((8, 12)), "b": jnp.ones((40, 20)), "c": jnp.ones((2, 2))}

    def ranks(rank):
        state = galore(rank, optax.adam(1e-3)).init(params)
        return {name: basis.shape[-1] if len(basis) else () for name, basis in state.bases.items()}

    assert ranks(0.25) == {"a": 2, "b": 5, "c": 1}
    assert ranks(7 / 8) == {"a": 7, "b": 18, "c": ()}
    assert ranks(lambda path, shape: 3 if "a" in path else 0.5) == {"a": 3, "b": 10, "c": 1}
    with pytest.raises(ValueError, match=r"rank\(.*'a'.*=0"):
        ranks(lambda path, shape: 0)


@pytest.mark.parametrize("inner", [optax.adamw(0.1, weight_decay=0.1), optax.lamb(0.1)])
def test_a_matrix_no_larger_than_the_rank_has_no_basis_and_the_inners_update(inner):
    stacks = GaLoreDimensionNumbers(-2, -1)
    params = {"w": normal(0, 8, 12), "tall": normal(1, 12, 6), "stack": normal(2, 2, 8, 3)}
    apart = {**params, "stack": tuple(params["stack"])}
    tx = galore(12, inner, scale=1.0, weight_dimension_numbers=stacks)
    update, state, theirs = jax.jit(tx.update), tx.init(params), inner.init(apart)
    assert state.bases == {"w": (), "tall": (), "stack": ()}
    assert not subspace_parts(tx).is_due(state)
    for seed in range(2):
        grads = jax.tree.map(lambda x, seed=seed: normal(seed, *x.shape), params)
        got, state = update(grads, state, params)
        own = {**grads, "stack": tuple(grads["stack"])}
        expected, theirs = inner.update(own, theirs, apart)
        got["stack"] = tuple(got["stack"])
        close = functools.partial(np.testing.assert_allclose, atol=1e-6)
        jax.tree.map(close, got, expected)
    # As published, all directions are found with "svd".
    svd = jax.eval_shape(galore(8, inner, subspace="svd").init, normal(0, 8, 12))
    assert svd.bases.shape == (8, 8)


@pytest.mark.parametrize("way", ["fira", "apollo", Alice(0.1)])
def test_a_way_back_without_a_basis_is_that_of_the_whole_space(way):
    params = grads = normal(0, 2, 8, 12)
    common = dict(recover=way, weight_dimension_numbers=GaLoreDimensionNumbers(1, 2))

    def identity(gradient, basis, key):
        return jnp.eye(8)

    updates = []
    for find in ("randomized", identity):
        tx = galore(8, optax.sgd(0.1), subspace=find, **common)
        state = tx.init(params)
        assert len(state.bases) == (0 if find == "randomized" else 2)
        updates.append(jax.jit(tx.update)(grads, state, params)[0])
    np.testing.assert_allclose(*updates, atol=1e-6)


def test_one_transformation_serves_two_models_whose_projected_shapes_are_the_same():
    models, grads = [normal(0, 4, 12), normal(0, 8, 12)], [normal(1, 4, 12), normal(1, 8, 12)]
    shared = galore(4, optax.adam(0.1), update_proj_gap=1)
    for params, grad in zip(models, grads, strict=True):
        own = galore(4, optax.adam(0.1), update_proj_gap=1)
        steps = [grad, -grad[:, ::-1], grad]
        expected = run(own, params, steps)[-1]
        np.testing.assert_array_equal(run(shared, params, steps)[-1], expected)


def test_the_gap_may_be_a_function_of_the_step():
    tx = galore(4, optax.sgd(0.1), update_proj_gap=lambda step: jnp.where(step < 4, 2, 5))
    params = normal(0, 8, 12)
    state, refreshes = tx.init(params), []
    for step in range(12):
        before = state.bases
        _, state = tx.update(normal(step + 1, 8, 12), state)
        refreshes += [step] * (not np.array_equal(before, state.bases))
    assert refreshes == [0, 2, 4, 9]


def test_a_leaf_that_is_no_array_is_refused_by_name():
    tx = galore(4, optax.adam(0.01))
    with pytest.raises(
        ValueError, match=r"params: 1\.0 at \['b'\] is not an array; give jnp\.asarray"
    ):
        tx.init({"w": jnp.ones((8, 12)), "b": 1.0})


def test_a_matrix_of_complex_or_8_bit_numbers_is_refused_and_other_complex_leaves_are_the_inners():
    for dtype in (jnp.complex64, jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match=rf"'w'.*{dtype.__name__}.*16 bits.*give None"):
            galore(4, optax.adam(1e-3)).init({"w": jnp.ones((8, 12), dtype)})
    params = {"w": jnp.ones((8, 12)), "z": jnp.ones(3, jnp.complex64)}
    tx = galore(4, optax.sgd(0.1))
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_allclose(updates["z"], -0.1 * params["z"])


def test_a_map_of_the_state_to_the_params_leaves_the_counters():
    tx = galore(4, optax.adam(1e-3))
    state = tx.init({"w": jnp.ones((8, 12)), "b": jnp.ones(12)})
    halved = optax.tree_utils.tree_map_params(tx, lambda x: x.astype(jnp.bfloat16), state)
    assert halved.bases["w"].dtype == halved.inner[0].mu["w"].dtype == jnp.bfloat16
    assert halved.next_refresh.dtype == halved.count.dtype == jnp.int32


def test_recipes_with_hyperparameters_say_what_is_to_be_static():
    params = normal(0, 8, 12)
    for recipe in (galore_adamw8bit, q_galore_adamw8bit):
        static = ("rank", "update_proj_gap", "seed")
        tx = optax.inject_hyperparams(recipe, static_args=static)(learning_rate=0.1, rank=2)
        with pytest.raises(ValueError, match='"projection_bits", "bits"'):
            tx.init(params)
        static = (*static, "bits", "projection_bits")
        tx = optax.inject_hyperparams(recipe, static_args=static)(learning_rate=0.1, rank=2)
        updates, _ = tx.update(params, tx.init(params), params)
        assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("gap", [2**31 - 1, lambda step: jnp.where(step < 2, 2.0, jnp.inf)])
def test_a_gap_that_never_ends_never_ends(gap):
    tx = galore(3, optax.sgd(0.1), update_proj_gap=gap)
    state, counts = tx.init(jnp.ones((8, 12))), []
    for i in range(8):  # the first gradient is zero, so that the first refresh is late
        _, state = tx.update(normal(i, 8, 12) * (i > 0), state)
        counts.append(int(state.refreshes[0]))
    assert counts == ([0, 1, 1, 1, 1, 1, 1, 1] if gap == 2**31 - 1 else [0, 1, 1, 2, 2, 2, 2, 2])


def test_which_leaves_are_projected_is_decided_by_the_params():
    params = {"w": jnp.ones((8, 12)), "i": jnp.ones((3, 4), jnp.int32)}
    grads = {"w": normal(0, 8, 12), "i": jnp.zeros((3, 4))}
    tx = galore(3, optax.sgd(0.1))
    for given in (params, None):
        updates, _ = tx.update(grads, tx.init(params), given)
        assert not jnp.any(updates["i"])

    def numbers(params):
        low = jax.tree.map(lambda x: x.dtype == jnp.bfloat16, params)
        return jax.tree.map(lambda yes: GaLoreDimensionNumbers() if yes else None, low)

    params = {"w": jnp.ones((8, 12), jnp.bfloat16), "v": jnp.ones((8, 12))}
    grads = {"w": normal(0, 8, 12), "v": normal(1, 8, 12)}
    tx = galore(3, optax.adam(0.1), weight_dimension_numbers=numbers)
    updates, state = tx.update(grads, tx.init(params), params)
    assert state.bases["v"] == optax.MaskedNode()
    assert updates["w"].shape == (8, 12)


@pytest.mark.parametrize("subspace", ["randomized", "power", "svd"])
def test_float64_is_exact_to_its_own_rounding(subspace):
    with jax.enable_x64(True):
        grad = jax.random.normal(jax.random.key(0), (8, 12), jnp.float64)
        tx = galore(1.0, optax.sgd(1.0), scale=1.0, subspace=subspace)
        updates, _ = tx.update(grad, tx.init(grad), grad)
        np.testing.assert_allclose(updates, -grad, atol=1e-13)


def test_a_tucker_projection_of_two_axes_has_a_basis_for_each():
    for shape, axes in (((8, 12), (0, 1)), ((3, 3, 32, 64), (2, 3))):
        numbers = TuckerDimensionNumbers(axes)
        tx = galore(4, optax.adam(1e-3), weight_dimension_numbers=numbers)
        state = tx.init(jnp.ones(shape))
        assert [basis.shape[-1] for basis in state.bases] == [4, 4]
        assert jax.tree.leaves(state.inner[0].mu)[0].shape[-2:] == (4, 4)
        updates, _ = tx.update(normal(0, *shape), state)
        assert updates.shape == shape


@pytest.mark.parametrize("gap", [200, Staggered(200), Adaptive(200)])
def test_a_state_made_outside_of_jit_can_be_donated(gap):
    params = {"w": normal(0, 8, 12), "b": normal(1, 12)}
    tx = galore(4, optax.adam(0.01), update_proj_gap=gap)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tx.init(params))]
    assert len({*buffers}) == len(buffers)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("make", ["adamw", "8 bits", "adafactor"])
def test_the_inner_is_traced_at_most_twice_in_a_jitted_update(make, stacked):
    calls = {"update": 0}
    adamw = optax.adamw(0.1, weight_decay=0.1)
    own = optax.adafactor(0.1) if make == "adafactor" else adamw

    def update(updates, state, params=None):
        calls["update"] += 1
        return own.update(updates, state, params)

    def transformation():
        inner = optax.GradientTransformation(own.init, update)
        inner = quantize_state(inner, min_size=1) if make == "8 bits" else inner
        return galore(4, inner, weight_dimension_numbers=GaLoreDimensionNumbers(-2, -1))

    params = {"w": normal(0, *[3] * stacked, 8, 12)}
    tx = transformation()
    state = tx.init(params)
    # Once by galore, once more to compare a stack with its matrices, once by `quantize_state`.
    # Where matrices are given one by one, once with the whole stack: a mask may miss them.
    apart = stacked and make == "adafactor"
    assert calls["update"] <= 1 + stacked + (make == "8 bits") + apart
    for one in (tx, transformation()):  # as in a run, and in one that goes on from a checkpoint
        calls["update"] = 0
        jax.jit(one.update)(params, state, params)
        assert calls["update"] <= 2


BY_NDIM = optax.masked(
    optax.add_decayed_weights(0.1), lambda params: jax.tree.map(lambda x: x.ndim == 2, params)
)
OF_STACKS = {
    "adamw": (optax.adamw(0.1), True),
    "8 bits": (quantize_state(optax.adam(0.1), min_size=1), True),
    "adafactor": (optax.adafactor(0.1), False),
    "lamb": (optax.lamb(0.1), False),
    "muon": (optax.contrib.muon(0.1), False),  # which is Adam for arrays of three axes
    "decay of matrices": (optax.chain(optax.scale_by_adam(), BY_NDIM), False),
}


@pytest.mark.filterwarnings("ignore:galore")
@pytest.mark.parametrize("name", OF_STACKS)
def test_a_stack_is_updated_as_its_matrices_are_and_together_where_the_inner_allows_it(name):
    inner, together = OF_STACKS[name]
    stack = {"w": normal(0, 3, 16, 24)}
    each = {"w": tuple(stack["w"])}
    made = {}
    for key, params, numbers in (
        ("stack", stack, GaLoreDimensionNumbers(-2, -1)), ("each", each, None)
    ):  # fmt: skip
        tx = galore(4, inner, subspace="svd", weight_dimension_numbers=numbers, moments="keep")
        state = tx.init(params)
        if key == "stack":
            shapes = {x.shape[:-2] for x in jax.tree.leaves(state.inner) if jnp.ndim(x) > 1}
            assert (shapes == {(3,)}) == together
        for seed in range(3):
            gradient = {"w": normal(seed, 3, 16, 24)}
            if key == "each":
                gradient = {"w": tuple(gradient["w"])}
            updates, state = tx.update(gradient, state, params)
        made[key] = updates["w"]
    np.testing.assert_allclose(made["stack"], jnp.stack(made["each"]), rtol=1e-4, atol=1e-6)
