"""What is done to a few rows at a time gives what is done to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_optax import apply_updates, galore_adamw8bit, quantize_state, quantize_weights
from galore_optax.quantization import elementwise as module
from galore_optax.quantization.array import dequantized
from galore_optax.quantization.elementwise import chunks

RNG = np.random.default_rng(0)
SHAPES = {
    "w": (64, 512),
    "ragged": (32, 700),
    "stack": (3, 64, 256),
    "vector": (9000,),
    "odd": (63, 512),
}


def tree(dtype=np.float32):
    return {k: jnp.asarray(RNG.standard_normal(s), dtype) for k, s in SHAPES.items()}


ELEMENTWISE = {
    "adamw": quantize_state(optax.adamw(optax.cosine_decay_schedule(0.01, 9), weight_decay=0.1)),
    "4 bits": quantize_state(optax.adamw(0.01), 4),
    "adan": quantize_state(optax.adan(0.01)),  # keeps the last gradient, chooses by the first step
}
WHOLE = {
    "lamb": quantize_state(optax.lamb(0.01)),  # norms of leaves
}


def trajectory(tx, params, gradients, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    jax.clear_caches()
    state = tx.init(params)
    lowered = jax.jit(tx.update).lower(gradients[0], state, params)
    loops, update = lowered.as_text().count("stablehlo.while"), lowered.compile()
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, loops


@pytest.mark.parametrize("name", [*ELEMENTWISE, *WHOLE])
def test_an_update_by_chunks_is_that_of_the_whole(name, monkeypatch):
    tx = (ELEMENTWISE | WHOLE)[name]
    params, gradients = tree(), [tree() for _ in range(3)]
    whole, whole_state, none = trajectory(tx, params, gradients, 2**30, monkeypatch)
    parts, parts_state, loops = trajectory(tx, params, gradients, 2**11, monkeypatch)
    assert none == 0
    assert loops == (4 if name in ELEMENTWISE else 0)  # one for each leaf that has rows
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), whole, parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        dequantized(whole_state), dequantized(parts_state),
    )  # fmt: skip


def test_gradients_of_another_dtype_get_updates_of_the_whole(monkeypatch):
    tx, params = quantize_state(optax.adam(0.01)), tree()
    gradients = [tree(jnp.bfloat16)]
    whole, _, _ = trajectory(tx, params, gradients, 2**30, monkeypatch)
    parts, _, loops = trajectory(tx, params, gradients, 2**11, monkeypatch)
    assert loops == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), whole, parts)


def test_floats_of_a_few_rows_are_all_that_there_is(monkeypatch, optimized):
    monkeypatch.setattr(module, "CHUNK", 2**14)
    tx = quantize_state(optax.adam(0.01))
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=(0, 1))
    memory = step.lower(params, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * 4 * module.CHUNK


def test_chunks_are_smaller_on_a_cpu_and_larger_in_a_program_for_another_platform():
    tx = quantize_state(optax.adam(0.01))
    params = {"w": jax.ShapeDtypeStruct((4096, 1024), jnp.float32)}
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
    for platform, rows in {"cpu": 8, "rocm": 4}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"tensor<64x{rows}x{64 // rows}x4x256xui8>" in text  # groups, chunks, rows, blocks


@pytest.mark.parametrize("spec", [P("a", None), P(None, "b"), P("a", "b")])
def test_chunks_of_sharded_rows_move_nothing(spec, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2**14)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    tx, place = quantize_state(optax.adam(0.01)), NamedSharding(mesh, spec)
    params = {"w": jnp.asarray(RNG.standard_normal((256, 2048)), jnp.float32)}
    assert chunks(params["w"], 2**14) == 16
    sharded = jax.device_put(params, place)
    state = jax.device_put(tx.init(params), place.update(spec=P()))
    put = {2048: place, 8: NamedSharding(mesh, spec)}
    state = jax.tree.map(lambda x: jax.device_put(x, put[x.shape[1]]) if x.ndim else x, state)
    step = jax.jit(tx.update)
    text = step.lower(sharded, state).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    updates, _ = step(sharded, state)
    expected, _ = jax.jit(tx.update)(params, tx.init(params))
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)


def test_weights_are_rounded_by_chunks_with_a_mean_that_is_exact(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2**12)
    rng = np.random.default_rng(1)
    params = {"codes": jnp.asarray(rng.standard_normal((256, 512)), jnp.float32)}
    params = quantize_weights(params) | {"half": jnp.ones((256, 512), jnp.bfloat16)}
    update = jnp.asarray(np.abs(rng.standard_normal((256, 512))) * 1e-3, jnp.float32)
    updates = {"codes": update, "half": update}
    keys = jax.random.split(jax.random.key(0))
    new = [jax.jit(apply_updates)(params, updates, key) for key in keys]
    before = dequantized(params)
    for name in params:
        moved = [np.asarray(dequantized(x)[name] - before[name], np.float32) for x in new]
        assert abs(moved[0].mean() - np.mean(update)) < 1e-4
        assert (moved[0] != moved[1]).mean() > 0.01
        # No two chunks are rounded alike.
        chunk = moved[0].reshape(16, 16, 512)
        assert len({chunk[:, i].tobytes() for i in range(16)}) == 16


def test_a_recipe_works_by_chunks(monkeypatch):
    params, gradients = {"w": jnp.ones((64, 2048))}, [{"w": jnp.ones((64, 2048))}]
    tx = galore_adamw8bit(0.01, 16)
    whole, _, _ = trajectory(tx, params, gradients, 2**30, monkeypatch)
    parts, _, _ = trajectory(tx, params, gradients, 2**11, monkeypatch)
    np.testing.assert_allclose(whole["w"], parts["w"], rtol=1e-6)
