"""`explain` says what is decided for each leaf, through every wrapper."""

import jax
import jax.numpy as jnp
import optax
import pytest

from galore_optax import (
    GaLoreDimensionNumbers,
    TuckerDimensionNumbers,
    adamw8bit,
    explain,
    galore,
    galore_adamw8bit,
    q_galore_adamw8bit,
    quantize_state,
    unstacked,
)

PARAMS = {
    "b": jax.ShapeDtypeStruct((512,), jnp.float32),
    "k": jax.ShapeDtypeStruct((3, 3, 32, 64), jnp.float32),
    "l": jax.ShapeDtypeStruct((3, 64, 96), jnp.float32),
    "w": jax.ShapeDtypeStruct((64, 512), jnp.float32),
}
NUMBERS = {
    "b": None,
    "k": TuckerDimensionNumbers((2, 3)),
    "l": GaLoreDimensionNumbers(1, 2),
    "w": GaLoreDimensionNumbers(),
}


def by_path(tx, params=None):
    return {leaf.path: leaf for leaf in explain(tx, PARAMS if params is None else params).leaves}


def stored(leaf):
    return [(x.name, x.role, x.stored) for x in leaf.state]


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: unstacked(tx, lambda params: jax.tree.map(lambda _: None, params)),
        lambda tx: optax.GradientTransformation(jax.jit(tx.init), tx.update),
    ],
)
def test_projection_decay_roles_and_bits_of_each_leaf_are_seen_through_wrappers(around):
    tx = galore_adamw8bit(0.1, 8, weight_decay=0.1, weight_dimension_numbers=NUMBERS)
    leaves = by_path(around(tx))
    assert list(leaves) == ["['b']", "['k']", "['l']", "['w']"]
    b, k, l, w = leaves.values()
    assert [x.projection for x in (b, k, l, w)] == ["none", "axes 2, 3", "left", "left"]
    assert [x.rank for x in (b, k, l, w)] == [(), (8, 8), (8,), (8,)]
    assert [x.matrices for x in (b, k, l, w)] == [1, 9, 3, 1]
    assert l.together
    assert {x.decay for x in leaves.values()} == {"of the whole leaf"}
    assert stored(w) == [
        ("basis", "basis", "float32"),
        ("[0].mu", "first moment", "8 bits"),
        ("[0].nu", "second moment", "8 bits"),
    ]
    # An array of fewer than 4,096 elements is not quantized.
    assert stored(b) == [
        ("[0].mu", "first moment", "float32"),
        ("[0].nu", "second moment", "float32"),
    ]


def test_matrices_of_a_stack_that_are_apart_and_factors_are_named():
    tx = galore(8, optax.adafactor(0.1, min_dim_size_to_factor=1), side="both",
                weight_dimension_numbers=NUMBERS)  # fmt: skip
    leaf = by_path(tx)["['l']"]
    assert (leaf.projection, leaf.rank, leaf.together, leaf.decay) == (
        "both",
        (8, 8),
        False,
        "none",
    )
    factors = [x for x in leaf.state if x.role == "factor of a second moment"]
    assert [x.shape for x in factors] == [(8,), (8,)]


@pytest.mark.parametrize(
    ("inner", "decay"),
    [
        (optax.sgd(0.1, momentum=0.9), "none"),
        (optax.lion(0.1), "of the whole leaf"),
        (optax.lamb(0.1, weight_decay=0.1), "within the subspace"),
        (optax.chain(optax.adamw(0.1), optax.clip(1.0)), "within the subspace"),
        (optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1)), "within the subspace"),
        (optax.adafactor(0.1), "none"),  # which uses a norm only
    ],
)
def test_decay_within_the_subspace_is_told_from_that_of_the_whole_matrix(inner, decay):
    params = {"b": PARAMS["b"], "w": PARAMS["w"]}
    explained = explain(galore(8, inner), params)
    b, w = explained.leaves
    assert w.decay == decay
    assert b.decay == ("none" if decay == "none" else "of the whole leaf")


def test_other_parts_of_a_chain_or_partition_are_explained_too():
    tx = optax.partition(
        {"low": q_galore_adamw8bit(0.1, 8), "full": adamw8bit(0.1)},
        {"b": "full", "k": "full", "l": "full", "w": "low"},
    )
    leaves = by_path(tx)
    assert stored(leaves["['w']"])[0] == ("basis", "basis", "4 bits")
    assert [x[1:] for x in stored(leaves["['k']"])] == [
        ("first moment", "8 bits"),
        ("second moment", "8 bits"),
    ]
    w = by_path(optax.chain(galore(8, optax.sgd(0.1)), optax.ema(0.9)), {"w": PARAMS["w"]})["['w']"]
    assert [x.name for x in w.state] == ["basis", "[1].ema"]


def test_decay_outside_of_the_subspace_and_leaves_without_a_state_are_named():
    params, decay = {"b": PARAMS["b"], "w": PARAMS["w"]}, optax.add_decayed_weights(-0.01)
    kernels = optax.masked(decay, {"b": False, "w": True})
    chained = by_path(optax.chain(galore(8, optax.adam(0.1)), kernels), params)
    assert {k: x.decay for k, x in chained.items()} == {
        "['b']": "none",
        "['w']": "of the whole leaf",
    }
    others = {"low": galore(8, optax.sgd(0.1)), "full": optax.chain(decay, optax.sgd(0.1))}
    parts = by_path(optax.partition(others, {"b": "full", "w": "low"}), params)
    assert {k: (x.projection, x.decay) for k, x in parts.items()} == {
        "['w']": ("left", "none"),
        "['b']": ("none", "of the whole leaf"),
    }


def test_parts_whose_states_look_alike_are_told_apart():
    params = {"v": jnp.ones((64, 96)), "w": jnp.ones((48, 96))}
    made = {"z": galore(4, optax.sgd(0.1)), "a": galore(3, optax.sgd(0.1))}
    parts = by_path(optax.partition(made, {"v": "z", "w": "a"}), params)
    assert {k: x.rank for k, x in parts.items()} == {"['v']": (4,), "['w']": (3,)}
    chained = explain(optax.named_chain(*made.items()), params).leaves
    assert [(x.rank[0], x.state[0].shape[-1]) for x in chained] == [(4, 4), (4, 4), (3, 3), (3, 3)]


def test_arrays_of_no_leaf_are_named_in_and_outside_of_a_galore():
    muon = optax.contrib.muon(0.1)  # whose coefficients are in its state
    for tx in (muon, galore(8, muon)):
        assert [x.shape for x in explain(tx, {"w": PARAMS["w"]}).rest] == [(3,)]


def test_quantized_outside_the_bases_are_quantized_too():
    w = by_path(quantize_state(galore(8, optax.adam(0.1)), min_size=1), {"w": PARAMS["w"]})["['w']"]
    assert [x.stored for x in w.state] == ["8 bits"] * 3


def test_a_transformation_without_a_subspace_is_explained():
    w = by_path(adamw8bit(0.1, weight_decay=0.1))["['w']"]
    assert (w.projection, w.decay) == ("none", "of the whole leaf")
    assert [x.stored for x in w.state] == ["8 bits", "8 bits"]


def test_fallbacks_are_notes_of_the_table():
    tx = galore(8, optax.chain(optax.adamw(0.1), optax.clip(1.0)))
    explained = explain(tx, PARAMS)
    assert [note[:40] for note in explained.notes] == [
        "galore leaves 2 params with three or mor",
        "galore: inner uses params elementwise, a",
    ]
    text = str(explained)
    assert "note: galore leaves 2 params" in text
    assert "['w'] 64x512     left, rank 8  within the subspace" in text


def test_notes_are_all_of_it_though_init_has_warned_before():
    params, tx = {"w": jnp.ones((64, 128))}, quantize_state(optax.rmsprop(0.1, centered=True))
    with pytest.warns(UserWarning, match="as floats"):
        tx.init(params)
    assert len(explain(tx, params).notes) == 2


def test_an_update_that_needs_an_argument_is_explained_with_it():
    def update(updates, state, params=None, *, temperature):
        return jax.tree.map(lambda u, p: temperature * u - 0.1 * p, updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = galore(8, inner, moments="keep")
    params = {"w": PARAMS["w"]}
    assert by_path(tx, params)["['w']"].decay == "unknown"
    assert explain(tx, params, temperature=2.0).leaves[0].decay == "of the whole leaf"


def test_what_is_no_transformation_or_hides_its_decisions_is_refused():
    with pytest.raises(ValueError, match="must be an optax"):
        explain(optax.adam, PARAMS)
    hidden = galore(8, optax.adam(0.1), weight_dimension_numbers=NUMBERS)
    hidden = optax.GradientTransformation(jax.jit(hidden.init), hidden.update)
    explain(hidden, PARAMS)
    with pytest.raises(ValueError, match=r"tx: it hides what galore decided.*without jax.jit"):
        explain(hidden, PARAMS)
