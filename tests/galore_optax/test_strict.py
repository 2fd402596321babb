"""The core of the library under JAX's strict modes, where `optax.adamw` passes."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import checkify

import galore_optax as go

PARAMS = {"wide": jnp.ones((16, 40)), "stack": jnp.ones((2, 24, 16)), "bias": jnp.ones(5)}
GRADS = {
    name: jax.random.normal(jax.random.key(i), x.shape)
    for i, (name, x) in enumerate(PARAMS.items())
}
NUMBERS = {
    "wide": go.GaLoreDimensionNumbers(),
    "stack": go.GaLoreDimensionNumbers(1, 2),
    "bias": None,
}
EVERY_STEP = dict(update_proj_gap=1, weight_dimension_numbers=NUMBERS)
TINY = dict(min_size=1)  # quantizes small leaves, too


def steps(tx, params=PARAMS, grads=GRADS, apply=optax.apply_updates):
    def run():
        state, now = jax.jit(tx.init)(params), params
        for _ in range(2):
            updates, state = jax.jit(tx.update)(grads, state, now)
            now = jax.jit(apply)(now, updates)
        return now

    return run


def quantized():
    tx = go.q_galore_adamw8bit(0.01, 9, weight_dimension_numbers=NUMBERS)
    params = jax.jit(lambda p: go.quantize_weights(p))(PARAMS)
    return steps(tx, params, apply=lambda p, u: go.apply_updates(p, u, key=jax.random.key(0)))


def adapters():
    def trained(x):
        given = {
            "lora": go.LoRA.create(x, jax.random.key(0), rank=12),
            "dora": go.DoRA.create(x, jax.random.key(0), rank=12),
            "gradnorm": go.GradNormLoRP.create(go.quantize_nf4(x), jax.random.key(0), rank=12),
        }
        parts, frozen = go.split(given)
        rows = jnp.ones((3, 16), x.dtype)

        def loss(parts):
            return sum(jnp.sum(go.product(rows, a)) for a in go.join(parts, frozen).values())

        return parts, jax.grad(loss)(parts)

    parts, grads = jax.jit(trained)(PARAMS["wide"])
    return steps(go.gradnorm_lorp_adamw(0.01, rank=9), parts, grads)


def layerwise():
    def layer(layer, x, batch):
        return x + jnp.tanh(x @ layer["w"])

    model = go.Layered(lambda p, rows: rows @ p["e"], layer, lambda p, x, _: jnp.mean(x @ p["o"]))
    step = go.Layerwise(model, go.galore_adamw(0.01, 9, update_proj_gap=1), clip_norm=1.0)
    params = {
        "e": jnp.ones((6, 12)),
        "layers": {"w": jnp.ones((2, 12, 12))},
        "o": jnp.ones((12, 5)),
    }
    rows = jnp.ones((3, 6))

    def run():
        state = jax.jit(step.init)(params)
        return jax.jit(step.step)(params, state, rows)[0]

    return run


CASES = {
    "optax": lambda: steps(optax.adamw(0.01)),
    "galore": lambda: steps(go.galore_adamw(0.01, 9, **EVERY_STEP)),
    "8 bits, staggered, both sides": lambda: steps(
        go.galore(
            9, go.quantize_state(optax.adamw(0.01), bits=8, **TINY), side="both", subspace="power",
            update_proj_gap=go.Adaptive(go.Staggered(2)), weight_dimension_numbers=NUMBERS,
        )
    ),
    "4 bits, reset": lambda: steps(
        go.galore(
            9, go.quantize_state(optax.adamw(0.01), bits=4, **TINY), moments="reset", **EVERY_STEP
        )
    ),
    **{
        name: lambda way=way: steps(go.galore(9, optax.adam(0.01), recover=way, **EVERY_STEP))
        for name, way in {"fira": "fira", "mini": "apollo-mini", "alice": go.Alice(0.01)}.items()
    },
    "muon": lambda: steps(go.muon(0.01, weight_dimension_numbers=NUMBERS)),
    "racs": lambda: steps(go.racs(0.01, weight_dimension_numbers=NUMBERS)),
    "scale": lambda: steps(go.scale_sgd(0.01, False, weight_dimension_numbers=NUMBERS)),
    "q-galore": quantized,
    "adapters": adapters,
    "layerwise": layerwise,
}  # fmt: skip


@contextlib.contextmanager
def mode(option, value):
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        yield
    finally:
        jax.config.update(option, before)


@pytest.mark.parametrize("case", CASES)
def test_no_ranks_are_promoted(case):
    run = CASES[case]()
    with mode("jax_numpy_rank_promotion", "raise"):
        jax.eval_shape(run)


@pytest.mark.parametrize(
    "case", ["optax", "galore", pytest.param("adapters", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("option", "value"),
    [("jax_debug_nans", True), ("jax_enable_x64", True), ("jax_disable_jit", True)],
)
def test_the_core_runs_in_strict_modes(case, option, value):
    run = CASES[case]()
    with mode(option, value):
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(run()))


def test_no_dtypes_are_promoted():
    """Where optax itself promotes none: `optax.adamw` does."""
    tx = go.galore(9, optax.sgd(0.1, momentum=0.9), update_proj_gap=go.Adaptive(go.Staggered(2)))
    with mode("jax_numpy_dtype_promotion", "strict"):
        jax.eval_shape(steps(tx, {"w": PARAMS["wide"]}, {"w": GRADS["wide"]}))


def test_no_tracer_outlives_the_trace_of_an_update_of_a_low_bit_state():
    tx = go.quantize_state(optax.adam(0.1), min_size=1)
    params = {"w": jnp.ones((16, 24))}
    state = tx.init(params)
    with jax.checking_leaks():
        jax.jit(tx.update).lower(params, state)


@pytest.mark.parametrize("case", ["optax", "galore", "8 bits, staggered, both sides"])
def test_a_compiled_step_moves_nothing_from_or_to_the_host(case):
    run = CASES[case]()
    with jax.transfer_guard("disallow"):
        run()


def test_a_step_is_checked_by_checkify():
    tx, params = go.galore(4, optax.adam(0.01)), {"w": jnp.ones((8, 12))}
    update = checkify.checkify(tx.update, errors=checkify.all_checks)
    error, _ = jax.jit(update)(params, tx.init(params), params)
    error.throw()
