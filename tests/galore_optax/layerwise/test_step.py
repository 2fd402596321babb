"""The layer-wise step: the ordinary step's numbers, with one layer's gradient alive at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_layers import (
    MATRIX,
    MODEL,
    NUMBERS,
    STEPS,
    TIED,
    D,
    F,
    L,
    N,
    V,
    assert_equal,
    batches,
    by_layers,
    embed,
    head,
    layer,
    ordinary,
    params,
)

from galore_optax import (
    GaLoreDimensionNumbers,
    Staggered,
    apply_updates,
    galore,
    galore_adafactor,
    quantize_state,
    quantize_weights,
    unstacked,
)
from galore_optax.layerwise.step import Layered, Layerwise
from galore_optax.memory import tree_bytes
from galore_optax.quantization.array import dequantized
from galore_optax.quantization.weights import value_and_grad

INNERS = {
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=2, momentum=0.9),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(0.001),
}


@pytest.mark.parametrize("name", INNERS)
def test_it_equals_the_ordinary_step(name):
    tx = INNERS[name]
    # What a layer keeps for its backward pass changes nothing.
    got = by_layers(tx, checkpoint=name != "adamw")
    assert_equal(got, ordinary(tx, unstack=True))


GALORE = {
    # From the present basis, which at first is the one that init draws; of the head, too.
    "momentum, power": dict(
        inner=INNERS["momentum"], subspace="power", update_proj_gap=2,
        weight_dimension_numbers={**NUMBERS, "out": {"norm": None, "head": MATRIX}},
    ),
    # Of the head, too: refreshes are spread over all matrices of the model.
    "sgd, staggered": dict(
        inner=INNERS["momentum"], subspace="random", update_proj_gap=Staggered(4),
        weight_dimension_numbers={**NUMBERS, "out": {"norm": None, "head": MATRIX}},
    ),
    "adamw, random, staggered, reset": dict(
        inner=INNERS["adamw"], subspace="random", moments="reset", update_proj_gap=Staggered(4),
        weight_dimension_numbers=NUMBERS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GALORE)
def test_galore_draws_and_refreshes_as_it_does_for_the_whole_stack(name):
    tx = galore(3, **GALORE[name])
    assert_equal(by_layers(tx), ordinary(tx), 1e-5)


def test_galore_with_adafactor_keeps_its_statistics_by_matrix():
    # Norms, too, are a leaf for each layer.
    tx = galore_adafactor(
        0.01, 3, momentum=0.9, update_proj_gap=2,
        # No random numbers: those of leaves of other paths are others.
        subspace=lambda gradient, basis, key: gradient[:, :3] / jnp.linalg.norm(gradient),
        weight_dimension_numbers=lambda p: jax.tree.map(
            lambda x: GaLoreDimensionNumbers() if x.shape in [(D, F), (F, D)] else None, p
        ),
    )  # fmt: skip
    assert_equal(by_layers(tx), ordinary(tx, unstack=True), 1e-5)


def param_axes(params):
    def choose(path, _):
        names = [entry.key for entry in path]
        return (1 if names[-1] == "norm" else 2) if names[0] == "layers" else None

    return jax.tree.map_with_path(choose, params)


@pytest.mark.parametrize(
    "inner",
    # Of the norms, 24 elements in all and 8 in a layer, and by the root mean square of a leaf.
    [quantize_state(optax.adam(0.01), min_size=16), INNERS["adafactor"]],
    ids=["8 bits", "adafactor"],
)
def test_what_is_done_by_leaf_is_done_by_layer_in_an_ordinary_step_of_what_is_unstacked(inner):
    tx = unstacked(inner, param_axes)
    assert_equal(by_layers(tx), ordinary(tx))


def test_states_and_weights_may_be_quantized():
    tx = galore(
        3, quantize_state(optax.adam(0.01), min_size=1), update_proj_gap=2, projection_bits=4,
        subspace="random", weight_dimension_numbers=NUMBERS,
    )  # fmt: skip
    which = {"embedding": False, "layers": NUMBERS["layers"], "out": False}
    which = jax.tree.map(lambda x: x is MATRIX, which, is_leaf=lambda x: x is None or x is MATRIX)
    held = quantize_weights(params(), which, block=4)
    assert not isinstance(held["layers"]["up"], np.ndarray)

    def update(part, updates, count, layer):
        return apply_updates(part, updates, None)

    model = MODEL._replace(layer=lambda own, x, batch: layer(dequantized(own), x, batch))
    optimizer = Layerwise(model, tx, apply_updates=update, clip_norm=1.0)
    state, step = jax.jit(optimizer.init)(held), jax.jit(optimizer.step)
    whole = optax.chain(optax.clip_by_global_norm(1.0), tx)
    reference, theirs = jax.jit(whole.init)(held), held

    def loss(params, batch):
        x = embed(params, batch)
        for i in range(N):
            x = layer(jax.tree.map(lambda w, i=i: w[i], dequantized(params["layers"])), x, batch)
        return head(params, x, batch)

    def ordinary_step(params, state, batch):
        value, gradient = value_and_grad(loss)(params, batch)
        updates, state = whole.update(gradient, state, params)
        return apply_updates(params, updates, None), state, value

    ordinary_step = jax.jit(ordinary_step)
    for batch in batches():
        held, state, metrics = step(held, state, batch)
        theirs, reference, value = ordinary_step(theirs, reference, batch)
        # A number between two codes is rounded to either, as its last bits are.
        np.testing.assert_allclose(metrics.loss, value, rtol=1e-3)
    assert metrics.finite
    inner = state.layers.inner[0].mu["layers"]["up"]
    assert inner.codes.shape == (N, 3, F)
    assert inner.codes.dtype == jnp.uint8


def clipped(tx):
    return optax.chain(optax.clip_by_global_norm(0.3), tx)


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_clipping_by_the_global_norm_is_exact(model):
    tx = optax.sgd(0.1, momentum=0.9)
    got = by_layers(tx, model=model, clip_norm=0.3)
    assert float(got[2][0].grad_norm) > 0.3
    assert_equal(got, ordinary(clipped(tx), model=model))


def test_clipping_by_the_previous_norm_takes_the_first_steps_own():
    _, trajectory, told = by_layers(optax.sgd(0.1), clip_norm=0.3, clip="previous")
    norms = [float(metrics.grad_norm) for metrics in told]
    assert min(norms) > 0.3

    def moved(after, before):
        leaves = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in leaves))

    first, second, third, *_ = trajectory
    assert moved(first, params()) == pytest.approx(0.1 * 0.3, rel=1e-4)
    assert moved(second, first) == pytest.approx(0.1 * 0.3 * norms[1] / norms[0], rel=1e-4)
    assert moved(third, second) == pytest.approx(0.1 * 0.3 * norms[2] / norms[1], rel=1e-4)


def test_microbatches_are_summed_layer_by_layer():
    tx = optax.sgd(0.1, momentum=0.9)
    cut = batches(STEPS, 2)
    whole = [{k: x.reshape(-1, L) for k, x in batch.items()} for batch in cut]
    half = Layered(embed, layer, lambda *args: head(*args) / 2)
    got = by_layers(tx, model=half, accumulate=2, clip_norm=1.0, batches=cut)
    assert_equal(
        got, ordinary(optax.chain(optax.clip_by_global_norm(1.0), tx), batches=whole), 1e-5
    )


def poisoned_layer(layer_params, x, batch):
    """A layer whose gradient is infinite where the batch is bad and its first norm is 0."""
    bad = batch["bad"] > 0
    first = jnp.where(bad, layer_params["norm"][0], 1.0)
    return layer(layer_params, x, batch) + jnp.where(bad, jnp.sqrt(first), 0.0)


@functools.cache
def with_a_bad_batch(clip_norm):
    """Params before and after a bad batch, and after a good one; the last state; metrics."""
    start = jax.tree.map(np.copy, params())
    start["layers"]["norm"] = np.abs(start["layers"]["norm"])
    start["layers"]["norm"][1, 0] = 0
    model = MODEL._replace(layer=poisoned_layer)
    optimizer = Layerwise(model, optax.adam(0.01), clip_norm=clip_norm)
    step = jax.jit(optimizer.step)
    state, told, trajectory = jax.jit(optimizer.init)(start), [], [start]
    for batch, bad in zip(batches(), (1, 0), strict=False):
        here, state, metrics = step(trajectory[-1], state, {**batch, "bad": jnp.float32(bad)})
        trajectory.append(here)
        told.append(metrics)
    return trajectory, state, told


def test_a_gradient_that_is_not_finite_leaves_out_the_whole_step_where_the_norm_is_exact():
    (start, after_bad, after_good), state, (bad, good) = with_a_bad_batch(1.0)
    assert np.isfinite(bad.loss)
    assert not bad.finite
    assert good.finite
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, after_bad, start)))
    assert not np.array_equal(after_good["embedding"], start["embedding"])
    np.testing.assert_array_equal(state.layers[0].count, [1, 1, 1])
    assert int(state.count) == 2
    assert np.isfinite(state.norm)


def test_without_it_nothing_is_updated_from_the_bad_gradient_on():
    (start, after_bad, after_good), state, (bad, good) = with_a_bad_batch(None)
    assert not bad.finite
    assert not np.isfinite(bad.grad_norm)
    assert good.finite
    moved = jax.tree.map(lambda a, b: (a != b).any(axis=tuple(range(1, a.ndim))), after_bad, start)
    for leaf in jax.tree.leaves(moved["layers"]):
        np.testing.assert_array_equal(leaf, [False, False, True])  # the poisoned one is layer 1
    assert not moved["embedding"].any()
    assert moved["out"]["head"].all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after_good, state)))
    np.testing.assert_array_equal(state.layers[0].count, [1, 1, 2])


@pytest.mark.parametrize(
    ("tx", "others"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)), "clip_norm= clips"),
        (optax.apply_if_finite(optax.adam(0.01), 3), "what is not finite is not applied"),
        (optax.contrib.prodigy(), r"update of \['.*\] depends on the gradient of \['"),
        (galore(3, optax.contrib.dog(), moments="keep"), "all gradients at once"),
    ],
    ids=["clip_by_global_norm", "apply_if_finite", "prodigy", "galore of dog"],
)
def test_a_transformation_that_needs_all_gradients_is_refused_with_the_reason(tx, others):
    with pytest.raises(ValueError, match=others):
        Layerwise(MODEL, tx).init(params())


def test_masks_and_numbers_may_be_trees_of_all_params():
    mask = {
        "embedding": False,
        "layers": {"norm": False, "up": True, "down": True, "mix": True},
        "out": {"norm": False, "head": True},
    }
    tx = optax.masked(galore(3, optax.adam(0.01), weight_dimension_numbers=NUMBERS), mask)
    state = jax.eval_shape(Layerwise(MODEL, tx).init, params())
    assert state.layers.inner_state.bases["layers"]["up"].shape == (N, D, 3)
    moments = state.layers.inner_state.inner[0].mu["layers"]
    assert {name: x.shape for name, x in moments.items() if name != "norm"} == {
        "up": (N, 3, F),
        "down": (N, F, 3),
        "mix": (N, D, D),
    }
    assert not jax.tree.leaves(moments["norm"])
    assert state.rest["out"].inner_state.inner[0].mu["out"]["head"].shape == (D, V)
    assert not jax.tree.leaves(state.rest["embedding"].inner_state.inner[0].mu)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(clip="global"), "clip='global'"),
        (dict(clip_norm=0), "clip_norm=0"),
        (dict(accumulate=0), "accumulate=0"),
    ],
)
def test_arguments_out_of_range_name_themselves(options, names):
    with pytest.raises(ValueError, match=names):
        Layerwise(MODEL, optax.adam(0.01), **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"embedding": jnp.ones((V, D))}, "no entry 'layers'"),
        ({"layers": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}}, "no common first axis"),
    ],
)
def test_params_without_stacked_layers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Layerwise(MODEL, optax.adam(0.01)).init(wrong)


def wide(layers, tx, clip_norm=None):
    """Bytes of one layer, of its state, of hidden states between layers, and of temporaries."""
    width, inside, vocabulary = 128, 344, 64
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {
        "embedding": shape((vocabulary, width)),
        "layers": {
            "norm": shape((layers, width)),
            "up": shape((layers, width, inside)),
            "down": shape((layers, inside, width)),
            "mix": shape((layers, width, width)),
        },
        "out": {"norm": shape((width,)), "head": shape((width, vocabulary))},
    }
    optimizer = Layerwise(MODEL, tx, clip_norm=clip_norm)
    state = jax.eval_shape(optimizer.init, params)
    batch = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((2, 4), jnp.int32))
    step = jax.jit(optimizer.step, donate_argnums=(0, 1)).lower(params, state, batch)
    memory = step.compile().memory_analysis()
    given = tree_bytes(params) + tree_bytes(state)
    # Given away, and written where they were.
    assert memory.alias_size_in_bytes == pytest.approx(given, rel=1e-3)
    hidden = 2 * 4 * width * 4
    layer, own = tree_bytes(params["layers"]) / layers, tree_bytes(state.layers) / layers
    return layer, own, hidden, memory.temp_size_in_bytes


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.01),
        optax.adamw(0.01),
        optax.adafactor(0.01),
        galore(32, optax.adam(0.01), subspace="random"),
    ],
    ids=["adam", "adamw", "adafactor", "galore"],
)
def test_temporaries_are_a_few_layers_of_many(tx):
    layers = 32
    layer, own, hidden, temporaries = wide(layers, tx)
    # A layer's weights for the products, its gradient, the squares of its largest leaf, and what
    # the next turn writes: weights and state. (The gradient of all is 32 layers.)
    assert temporaries < 3.6 * layer + 1.1 * own + layers * hidden


def test_temporaries_grow_with_depth_by_hidden_states_only():
    tx = optax.adam(0.01)
    (layer, _, hidden, few), (_, _, _, many) = (wide(n, tx, clip_norm=1.0) for n in (8, 32))
    assert many - few == pytest.approx(24 * hidden, abs=0.02 * layer)
