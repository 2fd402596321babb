"""LLaMA checkpoints against those that transformers wrote (fixtures/make_llama.py)."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paths import FIXTURES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from galore_optax import LoRA, quantize_weights
from models.hugging_face.files import write_tensors
from models.hugging_face.llama import load_llama, save_llama

NAMES = [
    *("llama", "llama_grouped", "llama_bfloat16", "llama_tied", "llama_sharded", "llama_head_dim"),
    *("llama_biased", "llama_llama3", "llama_linear", "llama_dynamic", "mistral"),
]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(FIXTURES / "llama", tmp_path / "checkpoint"))


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}))


def tensors(directory: Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    expected = np.load(FIXTURES / name / "expected.npz")
    logits = load_llama(FIXTURES / name)(jnp.asarray(expected["token_ids"], jnp.int32))
    assert np.std(expected["logits"]) > 0.3
    # The project's promise: two float32 programs of the same function.
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-4)


def test_bfloat16_weights_stay_as_they_are():
    model = load_llama(FIXTURES / "llama_bfloat16", dtype=jnp.bfloat16)
    theirs = tensors(FIXTURES / "llama_bfloat16")["model.layers.1.mlp.up_proj.weight"]
    ours = model.layers["mlp"]["up"][...]
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours[1].T, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_transformers_saved(name, tmp_path):
    """transformers itself read such directories with equal logits when this was written."""
    source = FIXTURES / name
    dtype = jnp.bfloat16 if name == "llama_bfloat16" else jnp.float32
    save_llama(load_llama(source, dtype=dtype), tmp_path / "saved")
    ours, theirs = tensors(tmp_path / "saved"), tensors(source)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype
        np.testing.assert_array_equal(ours[key], theirs[key])
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    for key, value in json.loads((source / "config.json").read_text()).items():
        same = key not in ("architectures", "model_type") or name != "mistral"
        if key in config and same:
            assert config[key] == value, key
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == jnp.dtype(dtype).name


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match=rf"{tmp_path} cannot be written: .*Is a directory"):
        write_tensors(tmp_path, {"a": np.zeros(4, np.float32)})


def test_ids_of_special_tokens_are_kept_and_their_files_can_be_read_as_the_umask_says(checkpoint):
    edit(checkpoint / "config.json", bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None)
    out, before = checkpoint.parent / "saved", os.umask(0o027)
    try:
        save_llama(load_llama(checkpoint), out)
    finally:
        os.umask(before)
    config = json.loads((out / "config.json").read_text())
    ids = {name: config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert ids == {"bos": 1, "eos": [2, 3], "pad": None}
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    edit(checkpoint / "config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match="eos_token_id='</s>': must be an integer or a list"):
        load_llama(checkpoint)


def test_shards_hold_at_most_the_bytes_asked_for_and_read_back(tmp_path):
    model = load_llama(FIXTURES / "llama_grouped")
    save_llama(model, tmp_path, max_shard_bytes=4096)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(a.nbytes for a in load_file(file).values()) <= 4096 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    everything = tensors(tmp_path)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in everything.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert index["weight_map"].keys() == everything.keys()
    again = load_llama(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    assert again.config == model.config


def test_fields_of_the_configuration_can_be_set(checkpoint):
    model = load_llama(checkpoint, dtype="bfloat16", param_dtype="float32", rematerialize=True)
    assert model.config.rematerialize
    assert (model.config.dtype, model.config.param_dtype) == (jnp.bfloat16, jnp.float32)
    with pytest.raises(ValueError, match="rematerialise=True is not a field"):
        load_llama(checkpoint, rematerialise=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_rotary_frequencies_in_a_checkpoint_must_follow_from_the_configuration(checkpoint, dtype):
    content = tensors(checkpoint)
    without = nnx.state(load_llama(checkpoint))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(content | {name: np.array([1, 0.01], dtype)}, checkpoint / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_llama(checkpoint)), without)
    save_file(content | {name: np.array([1, 0.02], dtype)}, checkpoint / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"inv_freq has other frequencies than rope_theta=10000\.0"
    ):
        load_llama(checkpoint)
    past = name.replace("layers.0", "layers.2")
    save_file(content | {past: np.array([1, 0.01], dtype)}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.2\."):
        load_llama(checkpoint)


@pytest.mark.parametrize("name", ["llama_head_dim", "llama_biased", "llama_llama3", "mistral"])
def test_cached_decoding_gives_the_logits_of_transformers(name):
    expected = np.load(FIXTURES / name / "expected.npz")
    model, ids = load_llama(FIXTURES / name), jnp.asarray(expected["token_ids"], jnp.int32)
    first, cache = model.decode(ids[:, :7], model.init_cache(2, 12))
    rest, _ = model.decode(ids[:, 7:], cache)
    logits = jnp.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-4)


def test_dynamic_scaling_begins_past_the_length_that_the_model_was_made_for():
    model = load_llama(FIXTURES / "llama_dynamic")
    plain = load_llama(FIXTURES / "llama_dynamic", rope_scaling=None)
    assert (plain.config.max_length, model.config.max_length) == (64, 64)
    ids = jnp.asarray(np.load(FIXTURES / "llama_dynamic" / "expected.npz")["token_ids"])
    np.testing.assert_allclose(model(ids[:, :16]), plain(ids[:, :16]), atol=1e-5)
    assert jnp.max(jnp.abs(model(ids) - plain(ids))) > 1


def test_a_tied_head_is_the_embedding_and_no_weight_of_its_own():
    model = load_llama(FIXTURES / "llama_tied")
    assert "head" not in nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert model.config.tied
    np.testing.assert_array_equal(model.head_matrix(), model.embedding[...])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"architectures=\['MistralForCausalLM'\]"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported, only None"),
        ({"sliding_window": "removed"}, "sliding_window=4096"),  # transformers' default
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"num_key_value_heads": "removed"}, "kv_heads=8 must divide heads=4"),
        ({"num_key_value_heads": None}, r"k_proj\.weight has shape \(16, 16\).*\(32, 16\)"),
    ],
)
def test_what_only_some_mistrals_have_is_refused(tmp_path, changes, message):
    directory = Path(shutil.copytree(FIXTURES / "mistral", tmp_path / "mistral"))
    edit(directory / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_llama(directory)


def test_a_head_beside_a_tied_embedding_must_be_a_copy(checkpoint):
    edit(checkpoint / "config.json", tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings=True, but .*\.safetensors has a lm_h"
    ):
        load_llama(checkpoint)
    content = tensors(checkpoint)
    copy = content | {"lm_head.weight": content["model.embed_tokens.weight"]}
    save_file(copy, checkpoint / "model.safetensors")
    model = load_llama(checkpoint)
    np.testing.assert_array_equal(model.head_matrix(), content["model.embed_tokens.weight"])
    del copy["model.embed_tokens.weight"]
    save_file(copy, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.embed_tokens"):
        load_llama(checkpoint)


def test_keys_without_effect_on_the_logits_are_passed_over(checkpoint):
    before = nnx.state(load_llama(checkpoint))
    edit(
        checkpoint / "config.json",
        **{
            "num_labels": 3,
            "unsloth_version": "2024.9",
            "pretraining_tp": 2,
            "eos_token_id": [2, 3],
        },
        **{"rope_scaling": {"type": "default", "rope_theta": 10_000}, "rope_theta": 10_000.0},
        **{"dtype": "float16", "torch_dtype": "float16", "hidden_act": "swish", "head_dim": None},
        **{"quantization_config": None, "auto_map": {}, "partial_rotary_factor": 1},
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_llama(checkpoint)), before)


def test_scaling_is_read_where_transformers_4_wrote_it(tmp_path):
    directory = Path(shutil.copytree(FIXTURES / "llama_llama3", tmp_path / "checkpoint"))
    config = json.loads((directory / "config.json").read_text())
    rope = config["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    old = {
        "rope_parameters": "removed",
        "rope_theta": theta,
        "rope_scaling": {**rope, "type": kind},
    }
    edit(directory / "config.json", **old)
    assert load_llama(directory).config == load_llama(FIXTURES / "llama_llama3").config


def test_two_sources_of_weights_are_refused(checkpoint):
    """transformers reads model.safetensors, the index's shards, or an adapter's base."""
    index = checkpoint / "model.safetensors.index.json"
    shards = FIXTURES / "llama_sharded"
    shutil.copy(shards / index.name, index)
    for shard in shards.glob("*.safetensors"):
        shutil.copy(shard, checkpoint)
    with pytest.raises(
        ValueError, match=r"has model.safetensors.index.json and model.safetensors,"
    ):
        load_llama(checkpoint)
    index.unlink()
    with pytest.raises(ValueError, match=r"has model.safetensors and model-00001-of-00007\.safe"):
        load_llama(checkpoint)
    for shard in checkpoint.glob("model-*"):
        shard.unlink()
    names = dict.fromkeys(tensors(checkpoint), "model.safetensors")
    index.write_text(json.dumps({"weight_map": names}))
    load_llama(checkpoint)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has model.safetensors.index.json and adapter_config"):
        load_llama(checkpoint)


def test_an_index_and_its_shards_must_agree(tmp_path):
    directory = Path(shutil.copytree(FIXTURES / "llama_sharded", tmp_path / "checkpoint"))
    index, name = directory / "model.safetensors.index.json", "model.norm.weight"
    files = json.loads(index.read_text())["weight_map"]
    first, last = min(files.values()), max(files.values())
    for file, message in (
        (None, rf"{name} is in .*index\.json has no such tensor"),
        (first, rf"{name} is not in {first}, but .*index\.json says {first}"),
    ):
        changed = {k: v for k, v in (files | {name: file}).items() if v}
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            load_llama(directory)
    index.write_text(json.dumps({"weight_map": files}))
    twice = load_file(directory / first) | {name: np.zeros(16, np.float32)}
    save_file(twice, directory / first)
    with pytest.raises(ValueError, match=rf"{name} is in {first}, but .* says {files[name]}"):
        load_llama(directory)
    save_file(load_file(directory / last), directory / "model-00001-of-00009.safetensors")
    with pytest.raises(ValueError, match=r"index.json and model-00001-of-00009"):
        load_llama(directory)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, jnp.float8_e4m3fn])
def test_tensors_of_quantized_numbers_are_refused(checkpoint, dtype):
    content = tensors(checkpoint)
    content["model.layers.1.mlp.up_proj.weight"] = np.ones((24, 16), dtype)
    save_file(content, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight in .* has dtype (I8|U8|I32|F8_E4M3)"):
        load_llama(checkpoint)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_a_number_that_is_not_finite_is_refused(checkpoint, dtype, number):
    content = tensors(checkpoint)
    content["model.layers.1.mlp.up_proj.weight"] = np.ones((24, 16), dtype)
    content["model.layers.1.mlp.up_proj.weight"][23, 15] = number
    save_file(content, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight in .* has a NaN or an infinity"):
        load_llama(checkpoint)


def test_a_key_that_is_there_twice_is_refused(checkpoint):
    text = (checkpoint / "config.json").read_text()
    text = text.replace("{", '{"rms_norm_eps": 0.1,', 1)
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match="'rms_norm_eps' is there twice"):
        load_llama(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"model_type": "mistral"}, "sliding_window=4096"),
        ({"model_type": "removed"}, "model_type=None"),
        ({"attention_bias": True}, r"8 tensors are missing: .*k_proj\.bias"),
        ({"mlp_bias": True}, r"6 tensors are missing: .*down_proj\.bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 8}, r"q_proj\.weight has shape \(16, 16\).*\(32, 16\)"),
        ({"head_dim": 3}, "head_dim=3: must be even"),
        ({"head_dim": 4.0}, "head_dim=4.0: must be an integer"),
        ({"hidden_size": "removed"}, "hidden_size=None: must be an integer"),
        ({"intermediate_size": 28}, r"gate_proj.weight has shape \(24, 16\).*\(28, 16\)"),
        ({"num_hidden_layers": 3}, r"9 tensors are missing: model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"9 tensors are unexpected: model\.layers\.1\."),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            r"rope_parameters\.rope_type='llama3' has no factor",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn' is not supp"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2': must be a num"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5: must be finite"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "low_freq_factor": 1.0}},
            r"low_freq_factor=1\.0 is not supported",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"rope_parameters": "removed", "rope_scaling": {"type": "longrope", "factor": 2.0}},
            r"rope_scaling\.type='longrope'",
        ),
        ({"rope_parameters": ["default"]}, r"rope_parameters=\['default'\]"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta=None: must be a number"),
        ({"rope_parameters": "removed", "rope_theta": None}, "rope_theta=None: must be a number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': must be a number"),
        ({"num_attention_heads": "6"}, "num_attention_heads='6': must be an integer"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True: must be an integer"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            r"rope_parameters\.rope_type='default' and rope_scaling\.rope_type='linear'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "type": "linear"}},
            r"rope_parameters\.rope_type='default' and rope_parameters\.type='linear'",
        ),
        (
            {"rope_scaling": {"type": "default", "factor": 4.0}},
            r"rope_scaling\.factor=4\.0 is not supported; convert",
        ),
        (  # transformers reads rope_scaling alone, and then takes 10,000
            {
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            r"rope_parameters\.rope_theta is not in rope_scaling",
        ),
        ({"hidden_size": 10**400}, "must be positive and finite, below 2"),
        (
            {"rope_theta": 500.0},
            r"itself: rope_theta=500\.0 and rope_parameters\.rope_theta=10000\.0; delete",
        ),
        (
            {"rope_scaling": {"rope_theta": 500.0}},
            r"rope_parameters\.rope_theta=10000\.0 and rope_scaling\.rope_theta=500\.0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            {"partial_rotary_factor": 1.0, "rope_scaling": {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor=1\.0 and rope_scaling\.partial_rotary_factor=0\.5",
        ),
        ({"torch_dtype": "float16"}, "dtype='float32' and torch_dtype='float16'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be positive and finite"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ({"attention_bias": 0}, "attention_bias=0 is not supported, only False"),
        ({"architectures": ["MistralForCausalLM"]}, r"architectures=\['MistralForCausalLM'\]"),
        ({"auto_map": {"AutoModel": "model.Mine"}}, "auto_map="),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"sliding_window": 4}, "sliding_window=4 is not supported, only None"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0 is not known"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "'gptq'} is not supported; convert",
        ),
    ],
)
def test_another_architecture_is_refused(checkpoint, changes, message):
    edit(checkpoint / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_llama(checkpoint)


def test_an_absent_or_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/config\.json cannot be read"):
        load_llama(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_llama(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_llama(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_llama(checkpoint)
    (checkpoint / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"is not valid JSON: maximum recursion"):
        load_llama(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must contain a JSON object"):
        load_llama(checkpoint)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"vocab_size": 10**12}, r"embed_tokens.weight has shape .* config.json says \(10000000"),
        ({"intermediate_size": 10**12}, "mlp.* has shape .* but config.json says"),
        ({"num_hidden_layers": 10**12}, "config.json says 10000.* layers, and there are"),
    ],
)
def test_no_memory_is_taken_for_sizes_that_only_config_json_claims(checkpoint, claim, message):
    edit(checkpoint / "config.json", **claim)
    with pytest.raises(ValueError, match=message):
        load_llama(checkpoint)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, []])
def test_an_index_that_names_no_files_is_refused(checkpoint, content):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"index\.json (has no weight_map|must contain a JSON object)"
    ):
        load_llama(checkpoint)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/model.safetensors", ".", ""])
def test_an_index_names_no_file_of_another_folder(tmp_path, file):
    directory = Path(shutil.copytree(FIXTURES / "llama_sharded", tmp_path / "checkpoint"))
    index = directory / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": files | {"model.norm.weight": file}}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in '.*': not the name of a file"):
        load_llama(directory)


def test_pickled_weights_are_refused_with_how_to_convert_them(tmp_path):
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with pytest.raises(ValueError, match=r"model\.bin, which could run any code .*save_pretrained"):
        load_llama(tmp_path)


def changed(change):
    """A model of which the matrices called up are changed."""
    graph, state = nnx.split(load_llama(FIXTURES / "llama"), nnx.Param)
    params = nnx.to_pure_dict(state)
    params["layers"]["mlp"]["up"] = change(params["layers"]["mlp"]["up"])
    return nnx.merge(graph, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: LoRA.create(w, jax.random.key(0), 2), "mlp/up is a LoRA, not an array; merge"),
        (lambda w: quantize_weights(w, True), "mlp/up is a QuantizedArray, not an array; merge"),
        (lambda w: w.astype(jnp.int8), r"mlp/up is int8\[2, 16, 24\]; it must be of floats"),
        (lambda w: w[:, :, :20], r"mlp/up is float32\[2, 16, 20\]; .* shape \[2, 16, 24\]"),
    ],
)
def test_weights_that_are_no_floats_of_the_model_are_not_saved(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        save_llama(changed(change), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_dtype_in_config_json_is_that_of_the_weights(tmp_path):
    save_llama(changed(lambda w: w.astype(jnp.bfloat16)), tmp_path / "one")
    graph, state = nnx.split(load_llama(FIXTURES / "llama"), nnx.Param)
    state = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state)
    save_llama(nnx.merge(graph, state), tmp_path / "all")
    for name, dtype in (("one", "float32"), ("all", "bfloat16")):
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == dtype


def test_saving_overwrites_nothing(checkpoint):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(ValueError, match="already has a model"):
        save_llama(load_llama(checkpoint), checkpoint)
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_failed_save_leaves_no_model_behind(tmp_path, monkeypatch):
    model = load_llama(FIXTURES / "llama")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        save_llama(model, tmp_path, max_shard_bytes=4096)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_llama(model, tmp_path, max_shard_bytes=0)
