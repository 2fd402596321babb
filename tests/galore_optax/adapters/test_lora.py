"""Adapters of a model's matrices: where they go, what they compute, merging, sharding, dropout."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from galore_optax import quantize_weights
from galore_optax.adapters.base import Adapter, adapt, is_adapter, join, merge, product, split
from galore_optax.adapters.gradnorm_lorp import GradNormLoRP
from galore_optax.adapters.lora import DoRA, LoRA, with_dropout_keys
from galore_optax.adapters.low_rank import LowRank
from galore_optax.adapters.restart import restart_params
from galore_optax.quantization.array import dequantized
from models.llama.axes import logical_axes
from models.llama.config import LlamaConfig
from models.llama.model import Llama
from train.step.mesh import make_mesh, param_shardings

CONFIG = LlamaConfig(
    vocab_size=50, width=32, mlp_width=48, layers=2, heads=4, kv_heads=2, max_length=32
)
GRAPH, STATE = nnx.split(Llama(CONFIG, rngs=nnx.Rngs(0)), nnx.Param)
# Large enough for attention to depend visibly on its input.
BASE = jax.tree.map(lambda w: 5 * w, nnx.to_pure_dict(STATE))
IDS = jax.random.randint(jax.random.key(0), (2, 12), 0, CONFIG.vocab_size)
KINDS = [LoRA, DoRA, LowRank, GradNormLoRP]


@jax.jit
def logits(params):
    return nnx.merge(GRAPH, params)(IDS)


def adapted(kind, rank=4, pattern="", base=BASE, **options):
    create = functools.partial(kind.create, rank=rank, **options)
    return adapt(base, create, jax.random.key(1), pattern=pattern)


def moved(params):
    """As after some training: every trained leaf of an adapter changed."""
    trained, frozen = split(params)

    def move(path, x):
        key = jax.random.fold_in(jax.random.key(2), zlib.crc32(jax.tree_util.keystr(path).encode()))
        return x + 0.1 * jax.random.normal(key, x.shape, x.dtype)

    return join(jax.tree.map_with_path(move, trained), frozen)


@functools.cache
def trained_a_while(kind):
    return moved(adapted(kind))


def test_a_python_number_among_params_has_no_adapter():
    params = adapted(LoRA, base={"layers": jnp.ones((2, 8, 8)), "scale": 1.5})
    assert is_adapter(params["layers"])
    assert params["scale"] == 1.5


def adapters_of(params) -> dict[str, Adapter]:
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_adapter)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in leaves
        if is_adapter(x)
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("query|value", ["attention/query", "attention/value"]),
        ("mlp/", ["mlp/down", "mlp/gate", "mlp/up"]),
        ("up$", ["mlp/up"]),
    ],
)
def test_adapters_go_where_the_pattern_says(pattern, names):
    assert sorted(adapters_of(adapted(LoRA, pattern=pattern))) == [f"layers/{n}" for n in names]


def test_what_a_function_of_the_path_freezes_is_whole_and_joined_again():
    params = adapted(LoRA, pattern="query|up")
    names = []

    def trains(path: str) -> bool:
        names.append(path)
        return path in ("layers/mlp/up", "norm")

    part, frozen = split(params, trains=trains)
    assert "layers/attention/query" in names
    assert jax.tree.leaves(part["layers"]["attention"]) == []  # the adapter there, too
    assert {x.size for x in jax.tree.leaves(part)} == {32, 2 * 32 * 4, 2 * 4 * 48}
    jax.tree.map(np.testing.assert_array_equal, join(part, frozen), params)
    with pytest.raises(ValueError, match="trains"):
        split(params, trains="norm")


def test_all_matrices_of_the_layers_are_adapted_by_default_each_with_its_own_factors():
    adapters = adapters_of(adapted(LoRA))
    assert len(adapters) == 7
    query, out = adapters["layers/attention/query"], adapters["layers/attention/out"]
    assert query.a.shape == out.a.shape
    assert not np.array_equal(query.a, out.a)
    assert not np.array_equal(query.a[0], query.a[1])
    # Adding one elsewhere does not change them.
    alone = adapters_of(adapted(LoRA, pattern="query"))["layers/attention/query"]
    np.testing.assert_array_equal(alone.a, query.a)


@pytest.mark.parametrize("pattern", ["querry", "embedding", "head", "norm"])
def test_a_pattern_without_a_matrix_is_refused_with_those_there_are(pattern):
    with pytest.raises(ValueError, match=rf"pattern='{pattern}'.*; these are .*attention/query, "):
        adapted(LoRA, pattern=pattern)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17}, r"rank=17 for a weight of shape \(2, 32, 16\).* smaller side, 16"),
        ({"alpha": 0.0}, "alpha=0.0: give a finite number, above 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0: give a finite number, at least 0, less than 1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_numbers_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        adapted(kind, **options)


@pytest.mark.parametrize("kind", [LoRA, DoRA, GradNormLoRP])
def test_a_new_adapter_changes_nothing(kind):
    np.testing.assert_allclose(logits(adapted(kind)), logits(BASE), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_the_adapted_models_outputs(kind):
    params = trained_a_while(kind)
    merged = merge(params)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, BASE)
    found = logits(params)
    assert np.abs(found - logits(BASE)).max() > 0.1
    # Float32 logits of up to 10, summed in another order.
    np.testing.assert_allclose(logits(merged), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_gives_the_same_outputs_and_a_new_adapter(kind):
    params = trained_a_while(kind)
    again = restart_params(params, jax.random.key(5))
    np.testing.assert_allclose(logits(again), logits(params), rtol=1e-4, atol=1e-4)
    if kind is not LowRank:
        assert all(float(jnp.abs(x.b).max()) == 0 for x in adapters_of(again).values())


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_takes_adapters(kind):
    params = trained_a_while(kind)
    model = nnx.merge(GRAPH, params)
    found, _ = model.decode(IDS, model.init_cache(2, 12))
    np.testing.assert_allclose(found, logits(params), rtol=1e-4, atol=1e-4)


def test_loras_and_doras_weights_are_the_papers():
    params = adapters_of(moved(adapted(LoRA, alpha=2.0)))
    for x in params.values():
        np.testing.assert_allclose(x.matrix(), x.base + 0.5 * x.a @ x.b, rtol=1e-5, atol=1e-6)
    for x in adapters_of(moved(adapted(DoRA, alpha=2.0))).values():
        v = np.asarray(x.base + 0.5 * x.a @ x.b)
        wanted = x.magnitude[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
        np.testing.assert_allclose(x.matrix(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_merged_weights_has_the_same_gradients(kind):
    node = jax.tree.map(lambda x: x[0], adapters_of(trained_a_while(kind))["layers/mlp/up"])
    x = jax.random.normal(jax.random.key(0), (9, 32))
    found = jax.grad(lambda node: jnp.sum(jnp.tanh(x @ merge(node))))(node)
    wanted = jax.grad(lambda node: jnp.sum(jnp.tanh(product(x, node))))(node)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_doras_gradient_takes_the_norm_for_a_constant():
    node = jax.tree.map(lambda x: x[0], adapters_of(trained_a_while(DoRA))["layers/mlp/up"])
    x, g = (
        jax.random.normal(jax.random.key(0), (9, 32)),
        jax.random.normal(jax.random.key(1), (9, 48)),
    )
    norms = jnp.linalg.norm(node.base + node.a @ node.b, axis=0)

    def constant(node):
        return x @ (node.base + node.a @ node.b) * (node.magnitude / norms)

    found = jax.vjp(lambda node: product(x, node), node)[1](g)[0]
    wanted = jax.vjp(constant, node)[1](g)[0]
    for name in ("a", "b", "magnitude"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=1e-4
        )


def test_low_rank_factors_keep_what_the_leading_directions_hold():
    w = jax.random.normal(jax.random.key(0), (3, 24, 40))
    whole = LowRank.create(w, jax.random.key(1), rank=24)
    np.testing.assert_allclose(whole.matrix(), w, atol=1e-4)
    half = LowRank.create(w, jax.random.key(1), rank=12).matrix()
    best = (np.linalg.svd(w, compute_uv=False)[:, :12] ** 2).sum()
    # One power step on the flat spectrum of noise.
    assert 0.9 * best < float(jnp.sum(half**2)) <= 1.001 * best
    assert float(jnp.abs(LowRank.create(0 * w, jax.random.key(1), rank=2).matrix()).max()) == 0


def test_bfloat16_keeps_corrections_that_a_sum_in_bfloat16_would_lose():
    base, x = jnp.ones((64, 8), jnp.bfloat16), jnp.ones((1, 64), jnp.bfloat16)
    a, b = jnp.full((64, 1), 1e-3, jnp.bfloat16), jnp.ones((1, 8), jnp.bfloat16)
    node = LoRA(base, a, b)
    np.testing.assert_array_equal(node.matrix(), base)  # 1 + 1e-3 rounds to 1
    cancelled = LoRA(0 * base, a, b)
    assert float(product(x, cancelled)[0, 0]) == pytest.approx(0.064, rel=0.01)


def test_dropout_is_for_training_and_differs_by_layer_matrix_and_step():
    params = moved(adapted(LoRA, dropout=0.5))
    np.testing.assert_allclose(logits(params), logits(trained_a_while(LoRA)), atol=1e-4)
    steps = [with_dropout_keys(params, jax.random.key(i)) for i in range(2)]
    keys = [
        tuple(map(int, key))
        for step in steps
        for x in adapters_of(step).values()
        for key in jax.random.key_data(x.key)
    ]
    assert len({*keys}) == 2 * 7 * 2
    assert not np.allclose(logits(steps[0]), logits(steps[1]), atol=1e-2)
    np.testing.assert_array_equal(logits(steps[0]), logits(steps[0]))


def test_dropout_keeps_the_mean_and_its_gradient_is_of_the_same_inputs():
    node = jax.tree.map(
        lambda x: x[0], adapters_of(moved(adapted(LoRA, dropout=0.3)))["layers/mlp/up"]
    )
    x = jax.random.normal(jax.random.key(0), (4, 32))

    def drop(key):
        return product(x, dataclasses.replace(node, key=key))

    outputs = jax.vmap(drop)(jax.random.split(jax.random.key(1), 4000))
    error = jnp.std(outputs, axis=0) / 4000**0.5
    assert float(jnp.max(jnp.abs(jnp.mean(outputs, axis=0) - product(x, node)) / error)) < 5
    keyed = dataclasses.replace(node, key=jax.random.key(7))
    g = jnp.ones((4, 48))
    of_b = jax.vjp(lambda b: product(x, dataclasses.replace(keyed, b=b)), keyed.b)[1](g)[0]
    wanted = jax.vjp(lambda b: dataclasses.replace(keyed, b=b).times(x), keyed.b)[1](g)[0]
    np.testing.assert_allclose(of_b, wanted, rtol=1e-5)


QUANTIZED = quantize_weights(BASE, lambda path, x: x.ndim == 3, block=16)
DEQUANTIZED = dequantized(QUANTIZED)


@pytest.mark.parametrize("kind", [None, LoRA, GradNormLoRP])
def test_quantized_weights_run_and_are_adapted_as_their_values_are(kind):
    params, values = (moved(adapted(kind, base=p)) if kind else p for p in (QUANTIZED, DEQUANTIZED))
    np.testing.assert_allclose(logits(params), logits(values), rtol=1e-4, atol=1e-4)
    if kind is not None:
        np.testing.assert_allclose(
            merge(params)["layers"]["mlp"]["up"], merge(values)["layers"]["mlp"]["up"], atol=1e-5
        )


@pytest.mark.parametrize("kind", [LoRA, DoRA, GradNormLoRP])
def test_no_float_copy_of_quantized_weights_is_kept_for_the_backward_pass(kind):
    trained, frozen = split(adapted(kind, base=QUANTIZED), adapters_only=True)
    matrices = {x.shape for x in jax.tree.leaves(BASE["layers"]) if x.ndim == 3}
    for rematerialize in (False, True):
        config = dataclasses.replace(CONFIG, rematerialize=rematerialize)
        graph, _ = nnx.split(nnx.eval_shape(lambda c=config: Llama(c, rngs=nnx.Rngs(0))), nnx.Param)

        def loss(trained, graph=graph):
            return jnp.sum(nnx.merge(graph, join(trained, frozen))(IDS))

        pullback = jax.eval_shape(lambda t, f=loss: jax.vjp(f, t)[1], trained)
        kept = [(x.shape, x.dtype) for x in jax.tree.leaves(pullback)]
        assert not [shape for shape, dtype in kept if shape in matrices and dtype != jnp.uint8]
    gradient = jax.jit(jax.grad(loss))(trained)
    assert all(bool(jnp.any(x.b != 0)) for x in adapters_of(gradient).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_adapters_are_sharded_like_their_weights(kind, axis_type):
    params = trained_a_while(kind)
    mesh = make_mesh("fsdp=4,tensor=2")
    shardings, notes = param_shardings(mesh, params, logical_axes(params))
    assert not [note for note in notes if "layers" in note]
    up = shardings["layers"]["mlp"]["up"]
    assert up.a.spec == PartitionSpec(None, "fsdp", None)
    assert up.b.spec == PartitionSpec(None, None, "tensor")
    if kind in (DoRA, GradNormLoRP):
        assert up.magnitude.spec == PartitionSpec(None, "tensor")
    if axis_type is AxisType.Auto:
        placed = jax.device_put(params, shardings)
        np.testing.assert_allclose(logits(placed), logits(params), rtol=1e-4, atol=1e-4)
    else:  # one matrix, as the model itself runs under automatic axes
        mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
        node = jax.tree.map(lambda x: x[0], params["layers"]["mlp"]["up"])
        at = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), up)
        x = jax.random.normal(jax.random.key(0), (8, 32))

        def squares(x, node):
            return jnp.sum(product(x, node) ** 2)

        differentiated = jax.value_and_grad(squares, (0, 1))
        with jax.set_mesh(mesh):
            found = jax.jit(differentiated)(x, jax.device_put(node, at))
        for a, b in zip(
            jax.tree.leaves(found), jax.tree.leaves(differentiated(x, node)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", [("fsdp", None), (None, "fsdp"), ("data", "fsdp")])
def test_low_rank_factors_are_found_under_explicit_axes(spec):
    weight = jax.random.normal(jax.random.key(0), (32, 64))
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))  # explicit axes are its default
    with jax.set_mesh(mesh):
        placed = jax.device_put(weight, NamedSharding(mesh, PartitionSpec(*spec)))
        found = LowRank.create(placed, jax.random.key(1), rank=8)
        assert jax.typeof(found.a).sharding.spec == PartitionSpec(spec[0], None)
        assert jax.typeof(found.b).sharding.spec == PartitionSpec(None, spec[1])
    expected = LowRank.create(weight, jax.random.key(1), rank=8)
    np.testing.assert_allclose(found.a, expected.a, atol=1e-4)
