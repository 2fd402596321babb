"""Adapters in PEFT's format against those that peft wrote (fixtures/make_peft.py)."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paths import FIXTURES
from safetensors.numpy import load_file, save_file

from galore_optax.adapters.base import adapt, is_adapter, join, merge, split
from galore_optax.adapters.gradnorm_lorp import GradNormLoRP
from galore_optax.adapters.lora import DoRA, LoRA
from galore_optax.adapters.low_rank import LowRank
from models.hugging_face.llama import MODULES, load_llama
from models.hugging_face.peft import load_adapters, save_adapters

# Of these peft takes the initial factors off the base, or quantizes it.
CHANGE_THE_BASE = ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "mica"]
NAMES = ["peft_lora", "peft_dora", "peft_rslora", "peft_patterns"]
GRAPH, STATE = nnx.split(load_llama(FIXTURES / "llama"), nnx.Param)
BASE = nnx.to_pure_dict(STATE)


@jax.jit
def logits(params, ids):
    return nnx.merge(GRAPH, params)(ids)


def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / name / "expected.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_merged_outputs_equal_pefts(name):
    theirs, params = expected(name), load_adapters(BASE, FIXTURES / name)
    plain = logits(BASE, theirs["token_ids"])
    assert np.abs(plain - theirs["logits"]).max() > 0.1
    # The project's promise: two float32 programs of the same function.
    np.testing.assert_allclose(logits(params, theirs["token_ids"]), theirs["logits"], atol=2e-4)
    merged = merge(params)
    found = logits(merged, theirs["token_ids"])
    np.testing.assert_allclose(found, theirs["merged_logits"], atol=2e-4)
    for path, weight in theirs.items():
        if path.startswith("merged/"):
            module = "model.layers.{}." + path.removeprefix("merged/").removesuffix(".weight")
            _, part, matrix = MODULES[module]
            ours = merged["layers"][part][matrix][1].T
            np.testing.assert_allclose(ours, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["peft_lora", "peft_dora"])
def test_gradients_equal_pefts(name):
    theirs = expected(name)
    ids = jnp.asarray(theirs["token_ids"], jnp.int32)
    trained, frozen = split(load_adapters(BASE, FIXTURES / name), adapters_only=True)

    @jax.jit
    @jax.grad
    def gradient(trained):
        out = jax.nn.log_softmax(logits(join(trained, frozen), ids)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(out, ids[:, 1:, None], -1))

    layers = gradient(trained)["layers"]
    ends = {"lora_A.default.weight": "a", "lora_B.default.weight": "b"}
    compared = 0
    for path, wanted in theirs.items():
        if not path.startswith("gradient/"):
            continue
        module, kind, end = path.removeprefix("gradient/").split(".", 2)
        _, part, matrix = MODULES[f"model.layers.{{}}.{module}.{kind}"]
        field = ends.get(end, "magnitude")
        found = getattr(layers[part][matrix], field)[1]
        # Gradients of 0.01 to 1, in float32.
        np.testing.assert_allclose(found.T, wanted, rtol=1e-3, atol=2e-6)
        compared += 1
    assert compared == 2 * len(load_adapters_of(name)) + (name == "peft_dora") * 4


def load_adapters_of(name: str) -> list:
    leaves = jax.tree.leaves(load_adapters(BASE, FIXTURES / name), is_leaf=is_adapter)
    return [x for x in leaves if is_adapter(x)]


def test_dropout_is_read_but_outputs_have_none():
    assert {x.dropout for x in load_adapters_of("peft_lora")} == {0.1}
    assert {x.scale for x in load_adapters_of("peft_lora")} == {4.0}
    assert {x.scale for x in load_adapters_of("peft_rslora")} == {1.0}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_peft_saved(name, tmp_path):
    """peft itself read such directories with equal logits when this was written."""
    save_adapters(load_adapters(BASE, FIXTURES / name), tmp_path / "new", base_model="llama")
    ours, theirs = (
        load_file(d / "adapter_model.safetensors") for d in (tmp_path / "new", FIXTURES / name)
    )
    assert ours.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])
    config, wanted = (
        json.loads((d / "adapter_config.json").read_text())
        for d in (tmp_path / "new", FIXTURES / name)
    )
    if name == "peft_rslora":  # written as the plain scale that it is
        wanted["lora_alpha"] = 4
    if name == "peft_patterns":  # by the names of matrices
        patterns = {"v_proj": 1, "up_proj": 2}, {"v_proj": 5, "down_proj": 1.5}
        wanted["rank_pattern"], wanted["alpha_pattern"] = patterns
    wanted["target_modules"] = sorted(wanted["target_modules"])
    assert config == {key: wanted[key] for key in config}


def test_gradnorm_lorp_is_written_as_dora(tmp_path):
    def create(weight, key):
        node = GradNormLoRP.create(weight, key, rank=2)
        b = 0.1 * jax.random.normal(key, node.b.shape)
        return GradNormLoRP(node.base, node.a, b, 2 * node.magnitude)

    params = adapt(BASE, create, jax.random.key(0), pattern="mlp")
    save_adapters(params, tmp_path)
    again = load_adapters(BASE, tmp_path)
    assert isinstance(again["layers"]["mlp"]["up"], DoRA)
    ids = jnp.arange(12)[None]
    np.testing.assert_allclose(logits(again, ids), logits(params, ids), atol=2e-4)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(FIXTURES / "peft_dora", tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"peft_type": None}, "peft_type=None"),
        ({"bias": "all"}, "bias='all' is not supported, only 'none'"),
        ({"rank_pattern": {"v_proj": 8}}, r"lora_A.weight is \(16, 2\) in .* must be \(16, 8\)"),
        ({"rank_pattern": {"0.self_attn.v_proj": 8}}, "r=2 to 8 in its layers; adapters here have"),
        ({"rank_pattern": {"v_proj": 1.5}}, r"rank_pattern\['v_proj'\]=1.5 must be a number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\] must be an object"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\('"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"r": None}, "r=None must be an integer of at least 1"),
        ({"r": 0}, "r=0 must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a finite number"),
        ({"lora_dropout": 1}, "lora_dropout=1 must be at least 0 and below 1"),
        ({"use_rslora": "false"}, "use_rslora='false'"),
        ({"target_modules": {"v_proj": 1}}, "target_modules=.* must be str or a list"),
        *[({"init_lora_weights": x}, f"init_lora_weights='{x}'.*convert") for x in CHANGE_THE_BASE],
        ({"lora_bias": True}, "lora_bias=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"trainable_token_indices": [0]}, "trainable_token_indices="),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config="),
        ({"monteclora_config": {}}, "monteclora_config={} is not supported; convert"),
        ({"use_mora": True}, "use_mora=True is not known here and could change"),
        ({"layers_pattern": "blocks"}, "layers_pattern='blocks'"),
        ({"target_modules": ["up_proj", "down_proj", "gate_proj"]}, "v_proj has tensors in .* not"),
        ({"target_modules": None}, r"q_proj has no tensors in .*_config.json targets it"),
        ({"target_modules": "all-linear"}, r"q_proj has no tensors in .*_config.json targets it"),
        ({"target_modules": r".*\.(v|up|down)_proj"}, "gate_proj has tensors in .* not"),
        ({"exclude_modules": ["layers.1.mlp.up_proj"]}, r"1\.mlp\.up_proj has tensors in .* not"),
        ({"exclude_modules": ".*up_proj"}, r"0\.mlp\.up_proj has tensors in .* not"),
        ({"target_modules": "("}, r"target_modules has '\(': missing \)"),
        ({"exclude_modules": "*"}, r"exclude_modules has '\*': nothing to repeat"),
        ({"lora_alpha": 10**400}, "lora_alpha=.* must be a finite number"),
        ({"layers_to_transform": 0}, r"layers\.1\.self_attn\.v_proj has tensors in .* not"),
        ({"layers_to_transform": [1]}, r"layers\.0\.self_attn\.v_proj has tensors in .* not"),
        ({"r": 3}, r"v_proj.lora_A.weight is \(16, 2\).* must be \(16, 3\)"),
        ({"use_dora": False}, "has a, b, magnitude, but LoRA has a, b"),
    ],
)
def test_other_kinds_of_adapters_are_refused(checkpoint, changes, message):
    file = checkpoint / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_adapters(BASE, checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}, "peft_version": None},
        {"init_lora_weights": False, "use_rslora": None, "exclude_modules": ["lm_head"]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers", "modules_to_save": []},
        {"target_modules": r"model\.layers\.\d+\.(self_attn\.v|mlp\.(up|gate|down))_proj"},
    ],
)
def test_settings_that_do_not_change_the_weights_are_accepted(checkpoint, changes):
    before = load_adapters(BASE, checkpoint)
    file = checkpoint / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    jax.tree.map(np.testing.assert_array_equal, load_adapters(BASE, checkpoint), before)


def test_tensors_that_do_not_fit_are_refused(checkpoint):
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    with pytest.raises(ValueError, match=r"has no .*layers\.1\.mlp\.up_proj.*in some layers only"):
        load_adapters(BASE, checkpoint)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": np.ones((2, 16))}, file)
    with pytest.raises(ValueError, match=r"1 tensors that belong to no matrix.*lm_head\.lora_A"):
        load_adapters(BASE, checkpoint)
    save_file({**tensors, name: tensors[name].astype(np.int8)}, file)
    with pytest.raises(ValueError, match=r"up_proj\.lora_A\.weight in .* has dtype I8"):
        load_adapters(BASE, checkpoint)
    file.write_bytes(b"short")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_adapters(BASE, checkpoint)


def test_adapters_are_put_on_matrices_of_floats_only(checkpoint):
    integers = jax.tree.map(lambda w: w.astype(jnp.int8), BASE)
    for params, found in ((load_adapters(BASE, checkpoint), "DoRA"), (integers, "int8")):
        with pytest.raises(ValueError, match=rf"layers/.* is {found}, not a matrix of floats"):
            load_adapters(params, checkpoint)


def test_what_has_no_place_in_the_format_is_refused(tmp_path):
    def adapted(create, params=BASE, pattern="mlp"):
        return adapt(params, create, jax.random.key(0), pattern=pattern)

    def lora(rank, dropout=0.0):
        return lambda weight, key: LoRA.create(weight, key, rank, dropout=dropout)

    for params, message in (
        (BASE, "params have no adapters: save the model"),
        (
            adapted(
                lambda w, key: DoRA.create(w, key, 2),
                adapted(lora(2), pattern="up"),
                pattern="down",
            ),
            "of 2 kinds",
        ),
        (adapted(lora(2, 0.1), adapted(lora(2), pattern="up"), pattern="down"), "or dropouts"),
        (adapted(lambda w, key: LowRank.create(w, key, 2)), "LowRank at layers/mlp/.*; merge"),
    ):
        with pytest.raises(ValueError, match=message):
            save_adapters(params, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_adapters(adapted(lora(2)), tmp_path / "new")
    with pytest.raises(ValueError, match="already has adapters"):
        save_adapters(adapted(lora(2)), tmp_path / "new")
