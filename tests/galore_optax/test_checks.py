"""Wrong values of arguments are refused where they are given, by name and in few words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
    Adaptive,
    Alice,
    GaLoreDimensionNumbers,
    Layered,
    Layerwise,
    LoRA,
    Staggered,
    adamw8bit,
    adapt,
    cast_state,
    explain,
    galore,
    galore_adafactor,
    galore_adamw,
    quantize_nf4,
    quantize_state,
    quantize_weights,
    restart,
    split,
    unstacked,
    value_and_grad,
    without_refresh,
)

KEY = jax.random.key(0)
ADAM = optax.adam(0.1)
PARAMS = {"w": jnp.ones((8, 12)), "b": jnp.ones(12)}
MODEL = Layered(lambda p, b: b, lambda layer, x, b: x, lambda p, x, b: jnp.sum(x))
LARGE = np.zeros((30, 30))
NO_NUMBER = ["x", "", None, float("nan"), float("inf"), 10**300, True, 1j, LARGE, [1], object()]
NO_INTEGER = [*NO_NUMBER[:5], 1.5, True, np.bool_(True), int, -1, LARGE, np.array([1, 2]), 2**40]


def of_numbers(axis):
    numbers = {"w": GaLoreDimensionNumbers(axis), "b": None}
    return galore(2, ADAM, weight_dimension_numbers=numbers).init(PARAMS)


NUMBERS = {
    "scale": lambda x: galore(2, ADAM, scale=x),
    "learning_rate": lambda x: galore_adamw(x, 2),
    "b1": lambda x: adamw8bit(0.1, b1=x),
    "eps_root": lambda x: galore_adamw(0.1, 2, eps_root=x),
    "weight_decay": lambda x: galore_adafactor(0.1, 2, weight_decay=x),
    "decay_rate": lambda x: galore_adafactor(0.1, 2, decay_rate=x),
    "threshold": lambda x: Adaptive(2, threshold=x),
    "dropout": lambda x: LoRA.create(jnp.ones((8, 8)), KEY, 2, dropout=x),
    "keep": lambda x: restart(ADAM, PARAMS, ADAM.init(PARAMS), KEY, keep=x),
}
INTEGERS = {
    "update_proj_gap": lambda x: galore(2, ADAM, update_proj_gap=Staggered(x)),
    "min_size": lambda x: quantize_state(ADAM, min_size=x),
    "window": lambda x: Adaptive(2, window=x),
    "min_dim_size_to_factor": lambda x: galore_adafactor(0.1, 2, min_dim_size_to_factor=x),
    "block": lambda x: quantize_nf4(jnp.ones((8, 8)), block=x),
    "accumulate": lambda x: Layerwise(MODEL, ADAM, accumulate=x),
}


def refusal(call, value):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        call(value)
    return str(refused.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused(name):
    for value in NO_NUMBER:
        assert name in refusal(NUMBERS[name], value)


@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_is_refused(name):
    for value in NO_INTEGER:
        if value is int and name == "update_proj_gap":
            continue  # a function may stand for a gap
        assert name in refusal(INTEGERS[name], value)


def test_what_is_no_rank_and_no_axis_is_refused():
    for value in ("x", None, float("nan"), 1.5, 0, -1, True, LARGE, np.array([1, 2])):
        assert "rank" in refusal(lambda x: galore(x, ADAM), value)
    for value in ("x", None, float("nan"), 1.5, int, 5, True, LARGE, np.array([1, 2]), jnp.ones(2)):
        assert "weight_dimension_numbers" in refusal(of_numbers, value)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("rank", lambda: galore(lambda: 2, ADAM).init(PARAMS)),
        ("rank", lambda: galore(int, ADAM).init(PARAMS)),
        ("rank", lambda: galore(LARGE, ADAM)),
        ("rank", lambda: LoRA.create(jnp.ones((8, 8)), KEY, jnp.array(2))),
        ("alpha", lambda: LoRA.create(jnp.ones((8, 8)), KEY, 2, alpha=0)),
        ("low-rank factors", lambda: LoRA.create("w", KEY, 2)),
        ("create", lambda: adapt({"w": jnp.ones((2, 8, 8))}, lambda x, key: x, KEY)),
        ("pattern", lambda: adapt({"w": jnp.ones((2, 8, 8))}, LoRA.create, KEY, pattern=1)),
        ("adapters_only", lambda: split(PARAMS, adapters_only=1)),
        ("weight_dimension_numbers", lambda: of_numbers(LARGE)),
        (
            "weight_dimension_numbers",
            lambda: galore(2, ADAM, weight_dimension_numbers=lambda: None).init(PARAMS),
        ),
        ("learning_rate", lambda: galore_adamw(lambda: 0.1, 2)),
        ("learning_rate", lambda: adamw8bit(int)),
        ("weight_decay", lambda: galore_adamw(0.1, 2, weight_decay=lambda c: jnp.ones(2))),
        ("mask", lambda: galore_adamw(0.1, 2, mask=1)),
        ("mask", lambda: galore_adamw(0.1, 2, mask=lambda p: 0.0).init(PARAMS)),
        ("mask", lambda: galore_adamw(0.1, 2, mask=lambda: True).init(PARAMS)),
        ("weight_decay_mask", lambda: galore_adafactor(0.1, 2, weight_decay_mask="w")),
        ("clipping_threshold", lambda: galore_adafactor(0.1, 2, clipping_threshold=0)),
        ("state_dtype", lambda: galore_adamw(0.1, 2, state_dtype=np.float32(0.5))),
        ("dtype", lambda: cast_state(ADAM, jnp.ones(3))),
        ("unsigned", lambda: quantize_state(ADAM, min_size=1, unsigned=lambda: 1).init(PARAMS)),
        ("which", lambda: quantize_weights(PARAMS, lambda: True)),
        ("double", lambda: quantize_nf4(jnp.ones((8, 8)), double=1)),
        ("weight", lambda: quantize_nf4(jnp.ones(8))),
        ("has_aux", lambda: value_and_grad(jnp.sum, has_aux=1)),
        ("function", lambda: value_and_grad(1)),
        ("tx", lambda: without_refresh("x")),
        ("tx", lambda: explain("x", PARAMS)),
        ("param_axes", lambda: unstacked(ADAM, lambda: None).init(PARAMS)),
        ("model", lambda: Layerwise("x", ADAM)),
        ("tx", lambda: Layerwise(MODEL, "x")),
        ("clip_norm", lambda: Layerwise(MODEL, ADAM, clip_norm="1")),
        ("factored", lambda: Layerwise(MODEL, ADAM, factored=True)),
        ("checkpoint", lambda: Layerwise(MODEL, ADAM, checkpoint=1)),
        ("apply_updates", lambda: Layerwise(MODEL, ADAM, apply_updates=1)),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(name, call):
    message = refusal(lambda _: call(), None)
    assert name in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"update_proj_gap": Adaptive(5)}),
        ({"update_proj_gap": Adaptive(5, window=2)}, {"update_proj_gap": Adaptive(5, window=3)}),
        ({}, {"recover": "fira"}),
        ({"recover": "fira"}, {"recover": Alice(0.1)}),
        ({"recover": Alice(0.1)}, {"recover": Alice(0.1, tracking=0.5)}),
    ],
)
def test_a_state_that_lacks_what_another_argument_needs_is_refused(before, now):
    state, (name,) = galore(2, ADAM, **before).init(PARAMS), now
    with pytest.raises(ValueError, match=f"state: it has .*{name}=.*that init made with it"):
        galore(2, ADAM, **now).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    ("inner", "params", "now"),
    [
        (ADAM, {**PARAMS, "w": jnp.ones((8, 20))}, ADAM),
        (optax.amsgrad(0.1), PARAMS, ADAM),
        (ADAM, PARAMS, optax.lion(0.1)),
    ],
)
def test_a_state_of_other_params_or_another_inner_is_refused_as_such(inner, params, now):
    state = galore(2, inner).init(params)
    with pytest.raises(ValueError, match=r"state: .* of inner .* for these params.*that init made"):
        galore(2, now).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("moments", ["rotate", "keep"])
@pytest.mark.parametrize("recover", ["project", "apollo-mini"])
@pytest.mark.parametrize("decay", [None, False])
def test_a_state_of_another_side_is_refused_also_where_its_moments_broadcast(
    moments, recover, decay
):
    options = {"moments": moments, "recover": recover, "decoupled_decay": decay}
    before, now = (galore(1, ADAM, side=side, **options) for side in ("left", "right"))
    params = {"w": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match=r"state: .* of inner .* for these params.*that init made"):
        now.update(params, before.init(params), params)


@pytest.mark.parametrize("moments", ["rotate", "keep"])
def test_codes_are_refused_by_an_inner_of_floats_as_such(moments):
    state = galore(2, quantize_state(ADAM, min_size=1), moments=moments).init(PARAMS)
    with pytest.raises(ValueError, match=r"state: .* of inner .* for these params.*that init made"):
        galore(2, ADAM, moments=moments).update(PARAMS, state, PARAMS)
    galore(2, quantize_state(ADAM), moments=moments).update(PARAMS, state, PARAMS)


def test_a_refused_state_does_not_change_what_init_makes_next():
    params, numbers = {"w": jnp.ones((2, 6, 8))}, GaLoreDimensionNumbers(1, 2)
    make = functools.partial(galore, 2, weight_dimension_numbers=numbers)
    tx = make(ADAM)
    with pytest.raises(ValueError, match="state: "):
        tx.update(params, make(optax.lion(0.1)).init(params), params)
    jax.tree.map(np.testing.assert_array_equal, tx.init(params), make(ADAM).init(params))


def test_a_message_shows_no_array():
    for value in (LARGE, jnp.zeros((30, 30)), {"a": LARGE}, [LARGE] * 9):
        for call in (NUMBERS["scale"], lambda x: galore(2, x), of_numbers):
            message = refusal(call, value)
            assert len(message) < 250
            assert "\n" not in message


def test_numbers_and_integers_of_numpy_are_taken():
    for scale in (np.float32(0.5), np.int64(2), np.array(0.5), jnp.array(0.5)):
        galore(np.int64(2), ADAM, scale=scale, update_proj_gap=np.int32(2))
