"""`--init` and `--model PATH`: training goes on from weights of transformers or of another run."""

import dataclasses
import json
import os
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_run import ADAMW, MICRO, losses, small
from tokenizer_file import write_byte_level as write_tokenizer

from galore_optax import quantize_weights
from galore_optax.adapters.base import is_adapter, merge
from galore_optax.quantization.array import dequantized
from models.hugging_face.llama import load_llama, save_llama
from models.llama.config import TokenIds
from models.llama.model import Llama
from train.config.finetune_lm import load_finetuning, resolve_finetuning
from train.config.resolve import load, resolve
from train.config.settings import FinetuneLM, Pretrain, to_json
from train.export import Export
from train.export import main as export
from train.pretrain import main
from train.run.assemble import assemble
from train.run.cli import run
from train.run.initial import initial_state
from train.step.mesh import put_batch
from train.step.ordinary import summed_loss
from train.step.programs import make_forward

TIED = dataclasses.replace(MICRO, tied=True, attention_bias=True, vocab_size=300, head_dim=12)
DATA = {Pretrain: ["builtin"], FinetuneLM: ["a.jsonl"]}
OWN = {"model": None, "tokenizer": None, "steps": 3, "warmup_steps": 1, "eval_every": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model as transformers stores it, with a tokenizer of bytes beside it."""
    out = tmp_path_factory.mktemp("hugging") / "face"
    save_llama(Llama(TIED, rngs=nnx.Rngs(1)), out)
    write_tokenizer(out / "tokenizer.json")
    return out


def begun(folder: Path, **changes):
    """The parts of a run that begins with a folder's weights, and its first state."""
    config = resolve(small("unused", init=str(folder), **OWN | changes))
    parts = assemble(config, lambda _: None)
    return parts, initial_state(config, parts)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_first_loss_is_that_of_the_loaded_model_and_training_lowers_it(folder, tmp_path):
    config = small(tmp_path / "run", init=str(folder), **OWN | {"steps": 4, "eval_every": 4})
    assert main(config) == 0
    found = losses(tmp_path / "run")
    parts, _ = begun(folder)
    model = load_llama(folder)
    assert parts.tokenizer.vocab_size == 257
    assert parts.model.vocab_size == 300
    graph, params = nnx.split(model, nnx.Param)
    batch, _ = next(parts.data.batches())
    forward = make_forward(graph, "packed")
    loss = summed_loss(forward, nnx.to_pure_dict(params), put_batch(parts.mesh, batch))
    np.testing.assert_allclose(found["loss", 1], loss / batch["weights"].sum(), rtol=1e-5)
    assert found["loss", 4] < found["loss", 1]
    # And back again, with all that the config said, and the ids of the tokenizer.
    export(Export(run=str(tmp_path / "run"), out=str(tmp_path / "out")))
    ids = TokenIds(bos=256, eos=256)
    config = dataclasses.replace(model.config, token_ids=ids)
    assert load_llama(tmp_path / "out").config == config
    # A run that begins with this one's weights begins with its tokenizer and its loss.
    parts, state = begun(tmp_path / "run", steps=8)
    assert parts.tokenizer.content.endswith("</s>")
    trained = nnx.to_pure_dict(nnx.state(load_llama(tmp_path / "out"), nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, state.params, trained)


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": "data=2,fsdp=2,tensor=2"},
        {"optimizer": "q-galore-adamw8bit", "embedding_bits": 8},
        {"optimizer": "qlora-adamw", "update_proj_gap": None},
        {"weight_dtype": "bfloat16"},
    ],
    ids=["mesh", "quantized", "adapters", "bfloat16"],
)
def test_weights_are_stored_as_the_run_stores_them(folder, changes):
    parts, state = begun(folder, **changes)
    for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(parts.abstract), strict=True):
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype)
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
    assert jax.tree.structure(state) == jax.tree.structure(parts.abstract)
    params = nnx.to_pure_dict(nnx.state(load_llama(folder), nnx.Param))
    up, ours = params["layers"]["mlp"]["up"], state.params["layers"]["mlp"]["up"]
    if "embedding_bits" in changes:
        expected = quantize_weights(up, True, bits=8)
        np.testing.assert_array_equal(dequantized(ours), dequantized(expected))
    elif is_adapter(ours):
        assert jnp.max(jnp.abs(dequantized(merge({"x": ours})["x"]) - up)) < 0.02
    else:
        np.testing.assert_array_equal(ours, up.astype(ours.dtype))


def test_a_config_json_of_transformers_gives_the_sizes_alone(folder, tmp_path):
    path = str(folder / "config.json")
    settings = OWN | {"model": path, "tokenizer": "bytes"}
    config = resolve(small(tmp_path, **settings, rank=None))
    assert config.rank == MICRO.width // 4
    parts = assemble(config, lambda _: None)
    assert (parts.model.tied, parts.model.vocab_size, parts.model.head_width) == (True, 300, 12)
    assert "head" not in parts.abstract.params
    assert parts.made_with["sizes of the model"]["tie_word_embeddings"] is True
    named = resolve(Pretrain(model=path, steps=3))
    assert Path(named.out) == Path("runs/face-galore-adamw")
    with pytest.raises(ValueError, match="--steps has no default for face"):
        resolve(Pretrain(model=path))


def test_a_resolved_config_resolves_to_itself(folder):
    config = resolve(small("out", init=str(folder), **OWN))
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(Pretrain)}
    assert resolve(Pretrain(**fields)) == config


@pytest.mark.parametrize("kind", [Pretrain, FinetuneLM])
def test_other_weights_beside_a_config_json_bring_their_own_model_and_tokenizer(
    folder, tmp_path, kind, monkeypatch
):
    other = tmp_path / "other"
    save_llama(Llama(dataclasses.replace(TIED, mlp_width=40), rngs=nnx.Rngs(1)), other)
    write_tokenizer(other / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    read, resolved = load, resolve
    if kind is FinetuneLM:
        read = load_finetuning
        resolved = partial(resolve_finetuning, count_steps=lambda *_: 3)

    def begun_with(*args: str):
        found = []
        with pytest.raises(SystemExit):
            run(lambda x: found.append(resolved(x)), kind, "train", load=read, args=args)
        return found[0]

    own = "--init", str(folder), "--tokenizer", "bytes", "--steps", "3", "--rank", "4"
    before = begun_with(*own, "--learning-rate", "0.1", "--data", *DATA[kind])
    (tmp_path / "config.json").write_text(json.dumps(to_json(before)))
    again = "--config", "config.json"
    for same in ((), ("--init", os.path.relpath(folder))):
        assert to_json(begun_with(*again, *same)) == to_json(before)
    after = begun_with(*again, "--init", "other")
    assert after.model == str(other / "config.json")
    assert after.tokenizer == str(other / "tokenizer.json")
    assert begun_with(*again, "--init", "other", "--tokenizer", "bytes").tokenizer == "bytes"
    changed = {"init": str(other), "model": after.model, "tokenizer": after.tokenizer}
    assert to_json(after) == to_json(before) | changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tiny"}, "--model tiny has width=128, but the model in --init .*face has wid"),
        ({"init": "nowhere"}, r"--init .*nowhere has no config\.json: name a folder"),
        ({"model": "nowhere.json"}, r"--model .*nowhere\.json: there is no such file"),
        ({"seq_len": 65}, "--seq-len 65: face takes at most 64"),
        ({"rank": 32}, "no matrix of face; choose at most 31"),
    ],
)
def test_what_contradicts_the_weights_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(small("out", **{"init": str(folder), **OWN} | changes))


def test_a_run_of_an_encoder_is_named_as_that(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "mrpc", "optimizer": "adamw"}')
    with pytest.raises(ValueError, match=r"is of a run of train.finetune, not of train.pretrain"):
        resolve(small("unused", init=str(tmp_path), **OWN))


def test_a_model_named_beside_init_may_have_its_sizes(folder):
    path = str(folder / "config.json")
    assert resolve(small("out", init=str(folder), **OWN | {"model": path})).model == path


def test_a_tokenizer_must_be_there_and_fit_the_vocabulary(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    write_tokenizer(copy / "tokenizer.json", 400)
    with pytest.raises(ValueError, match=r"copy/tokenizer\.json has 400 ids, .*vocab_size=300"):
        begun(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"copy has no tokenizer\.json: give the model's with --t"):
        begun(copy)
    assert begun(copy, tokenizer="bytes")[0].tokenizer.content == "bytes"
    (copy / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"neither transformers' .* nor a run's"):
        begun(copy)


def test_weights_that_do_not_fit_are_refused_before_a_step_is_compiled(folder, tmp_path, capsys):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors")
    config = small(tmp_path / "run", init=str(copy), **OWN | ADAMW)
    with pytest.raises(ValueError, match=r"1 tensors are missing: model\.norm\.weight"):
        main(config)
    assert "compiling" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
