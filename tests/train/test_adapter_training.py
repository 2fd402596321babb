"""Pre-training with adapters: what is trained and what is frozen, restarts, stops, exports."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import losses, run_killed, small, trained

from galore_optax.adapters.base import is_adapter, merge
from galore_optax.memory import tree_bytes
from galore_optax.quantization.array import dequantized
from models.hugging_face.llama import load_llama
from models.hugging_face.peft import load_adapters
from train.config.resolve import resolve
from train.config.weights import ADAPTERS_ONLY
from train.export import Export
from train.export import main as export
from train.generate import Generate
from train.generate import main as generate
from train.pretrain import main
from train.run import assemble as assembly
from train.run.assemble import assemble
from train.run.metrics import read_metrics
from train.run.trained import load_trained
from train.run.training import Host, Training
from train.step.programs import abstract_params

# Two matrices of the seven, as compiling takes nearly all of the time here.
FEW = {"adapter_pattern": "query|up"}
NO_GALORE = {"update_proj_gap": None, **FEW}
RUNS = {
    "dora": {"optimizer": "adamw", "adapter": "dora", **NO_GALORE},
    "low-rank": {"optimizer": "adamw8bit", "adapter": "low-rank", **NO_GALORE},
    "qlora": {"optimizer": "qlora-adamw", "rank": 2, **NO_GALORE},
    "weight norm": {"optimizer": "adamw", "adapter": "gradnorm-lorp", **NO_GALORE},
    "relora": {
        "optimizer": "relora-adamw", "restart_every": 5, "restart_warmup": 1, "dropout": 0.1,
        **NO_GALORE,
    },
    "gradnorm": {
        "optimizer": "gradnorm-lorp-adamw", "restart_every": 6, "restart_warmup": 1,
        "moment_bits": 8, "weight_bits": 8, **FEW,
    },
}  # fmt: skip


def few_steps(name: str, steps: int = 3, **changes):
    return trained(steps, **{**RUNS[name], **changes})


def adapters_of(params) -> list:
    return [x for x in jax.tree.leaves(params, is_leaf=is_adapter) if is_adapter(x)]


@pytest.mark.parametrize("name", ["dora", "qlora"])
def test_a_run_samples_from_its_adapters_as_they_are(name, monkeypatch):
    # Merged, 4-bit weights would take four to eight times as much as the memory plan has for them.
    parts = assemble(resolve(small("unused", **RUNS[name])), lambda _: None)
    params, said = parts.init(jax.random.key(0)).params, []
    sample, models = assembly.sample_text, []

    def kept(model, *args, **how):
        models.append(model)
        return sample(model, *args, **how)

    monkeypatch.setattr(assembly, "sample_text", kept)
    parts.sample(params, said.append)
    assert tree_bytes(nnx.state(models[0])) == tree_bytes(params)
    merged = nnx.merge(abstract_params(parts.config, parts.model)[0], merge(params))
    how = {"max_new_tokens": 31 - len("The "), "temperature": 0.5}
    assert said == [f"sample: {sample(merged, parts.tokenizer, 'The ', **how)}"]


@pytest.mark.parametrize("name", ["dora", "low-rank", "qlora", "weight norm"])
def test_frozen_weights_stay_bit_for_bit_and_have_no_moments(name):
    _, first, last, found = few_steps(name)
    assert found[-1] < found[0]
    before, after = adapters_of(first.params), adapters_of(last.params)
    assert len(before) == 2
    for old, new in zip(before, after, strict=True):
        jax.tree.map(np.testing.assert_array_equal, old.base, new.base)
        assert not np.array_equal(old.b, new.b)
    assert not np.array_equal(first.params["head"], last.params["head"])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({**RUNS["qlora"], "train": ADAPTERS_ONLY}, {"layers/attention/query", "layers/mlp/up"}),
        (
            {"optimizer": "galore-adamw8bit", "train": "layers|norm", "freeze": "mlp/|query"},
            {
                "norm", "layers/attention/key", "layers/attention/out", "layers/attention/value",
                "layers/attention_norm", "layers/mlp_norm",
            },
        ),
    ],
)  # fmt: skip
def test_only_what_the_flags_name_changes_and_has_a_gradient_and_moments(settings, kept):
    parts, first, last, _ = trained(2, **settings)
    changed = set()
    flat = (jax.tree.leaves_with_path(x.params, is_leaf=is_adapter) for x in (first, last))
    for (path, old), (_, new) in zip(*flat, strict=True):
        same = all(map(np.array_equal, jax.tree.leaves(old), jax.tree.leaves(new)))
        changed |= set() if same else {jax.tree_util.keystr(path, simple=True, separator="/")}
    assert changed == kept
    whole = sum(x.size for x in jax.tree.leaves(parts.abstract.params))
    assert sum(x.size for x in jax.tree.leaves(parts.abstract.optimizer)) < whole / 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"train": "layer/"},
            "--train layer/ matches no param; these are embedding, head, layers/",
        ),
        ({"freeze": "."}, "leave no param to be trained"),
        ({"freeze": "("}, r"--freeze \(: .*; expected a regular expression"),
        ({"freeze": "head", "layerwise": True}, "--freeze head with --layerwise: it trains all"),
    ],
)
def test_patterns_that_name_nothing_or_leave_nothing_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        assemble(resolve(small("unused", **settings)), lambda _: None)


@pytest.mark.parametrize("optimizer", ["lora-adamw", "gradnorm-lorp-adamw"])
def test_all_matrices_of_the_layers_have_adapters_and_no_moments(optimizer):
    changes = {"optimizer": optimizer, "update_proj_gap": None, "adapter_pattern": None}
    abstract = assemble(resolve(small("unused", **changes)), lambda _: None).abstract
    adapters = adapters_of(abstract.params)
    assert len(adapters) == 7
    assert not {x.base.shape for x in adapters} & {
        x.shape for x in jax.tree.leaves(abstract.optimizer)
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs that nothing interrupted, with restarts."""
    runs = {}
    for name in ("relora", "gradnorm"):
        runs[name] = tmp_path_factory.mktemp("adapters") / name
        assert main(small(runs[name], **RUNS[name])) == 0
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stop"), [("relora", 11), ("gradnorm", 7)])
def test_a_killed_run_repeats_itself_bit_for_bit_restarts_and_dropout_included(
    finished, tmp_path, name, stop
):
    out = tmp_path / "run"
    settings = {"out": str(out), **RUNS[name]}
    assert run_killed(settings, "metrics", stop, "SIGKILL").returncode == -9
    assert main(small(resume=True, **settings)) == 0
    assert losses(out) == losses(finished[name])


def test_a_run_counts_what_it_trains_and_writes_text(finished, capsys):
    summary = json.loads((finished["relora"] / "summary.json").read_text())
    params, trained = summary["params"], summary["trained_params"]
    # For each of 2 layers two pairs of factors of rank 4, in the place of the matrices.
    factors = 2 * 4 * ((32 + 32) + (32 + 48))
    assert trained == params - 2 * (32 * 32 + 32 * 48) + factors
    assert summary["weight_bytes"] == 4 * (params + factors)
    assert summary["optimizer_state_bytes"] == pytest.approx(8 * trained, rel=0.01)
    assert summary["adamw_state_bytes"] == pytest.approx(8 * params, rel=0.01)
    lines = read_metrics(finished["relora"])
    assert [x["eval_loss"] for x in lines if "eval_loss" in x][-1] < 5.2
    assert generate(Generate(run=str(finished["relora"]), prompt="The ", max_new_tokens=5)) == 0
    assert capsys.readouterr().out.startswith("The ")


@pytest.mark.parametrize("name", ["relora", "gradnorm"])
def test_adapters_are_exported_merged_or_alone_with_equal_outputs(finished, tmp_path, name, capsys):
    run, ids = str(finished[name]), jnp.arange(12)[None]
    trained = load_trained(run)
    wanted = nnx.merge(trained.graph, trained.params)(ids)
    assert export(Export(run, str(tmp_path / "merged"))) == 0
    assert export(Export(run, str(tmp_path / "parts"), adapters=True)) == 0
    merged = load_llama(tmp_path / "merged")
    graph, base = nnx.split(load_llama(tmp_path / "parts" / "base"), nnx.Param)
    alone = load_adapters(nnx.to_pure_dict(base), tmp_path / "parts" / "adapters")
    for model in (merged, nnx.merge(graph, alone)):
        np.testing.assert_allclose(model(ids), wanted, atol=1e-4)
    assert capsys.readouterr().out.count("wrote the model to") == 2
    for out in ("merged", "parts"):
        with pytest.raises(ValueError, match="already"):
            export(Export(run, str(tmp_path / out), adapters=out == "parts"))


def test_a_restart_changes_neither_outputs_nor_what_stays_of_the_optimizer():
    parts, _, state, _ = few_steps("relora", 4)
    before = jax.tree.map(jnp.copy, state)
    assert parts.restart is not None
    after = parts.restart(state)
    for old, new in zip(
        jax.tree.leaves(dequantized(merge(before.params))),
        jax.tree.leaves(dequantized(merge(after.params))),
        strict=True,
    ):
        np.testing.assert_allclose(old, new, atol=1e-6)
    assert all(float(jnp.abs(x.b).max()) == 0 for x in adapters_of(after.params))
    (_, old), (_, new) = before.optimizer.inner_state, after.optimizer.inner_state
    np.testing.assert_array_equal(old[0].mu["head"], new[0].mu["head"])
    for x in adapters_of(new[0].mu):
        # Of each matrix a hundredth is kept, rounded up.
        assert 0 < np.mean(x.a != 0) < 0.02
    assert int(new[0].count) == 4


@pytest.mark.parametrize(
    ("skipped_steps", "restarts"),
    [((), [5, 10]), ((3,), [6, 11]), ((5, 6), [7, 12]), ((1,), [6, 11])],
)
def test_restarts_count_the_steps_that_were_not_skipped(skipped_steps, restarts):
    """As the learning rate does, although a step's metrics are read one step later."""
    run = Training.__new__(Training)
    run.host = Host()
    run.config = SimpleNamespace(restart_every=5)
    skipped = 0

    def report():
        run.host.skipped = skipped

    run.report_pending = report
    found = []
    for step in range(14):
        run.host.step = step
        if run.restart_due():
            found.append(step)
        run.report_pending()  # of the step before this one
        skipped += step + 1 in skipped_steps
    assert found == restarts


@pytest.mark.parametrize("name", ["qlora", "weight norm"])
def test_every_layout_gives_one_devices_losses(name):
    losses = [few_steps(name, mesh=mesh)[-1] for mesh in (None, "fsdp=4,tensor=2")]
    np.testing.assert_allclose(*losses, rtol=2e-5)


def test_a_pattern_without_a_matrix_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="pattern='querry' matches the path of no matrix"):
        main(small(tmp_path / "run", **{**RUNS["dora"], "adapter_pattern": "querry"}))
    assert not (tmp_path / "run").exists()
