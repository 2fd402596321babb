"""Memory plans: what they are made of, what they find, and what a run does with its own."""

import dataclasses
import json
import shlex

import pytest
from small_run import ADAMW, NO_SUBSPACE, small

from train import plan as plan_module
from train.config.optimizers import OPTIMIZERS
from train.config.resolve import load, resolve
from train.config.settings import Pretrain, to_json
from train.memory import cards
from train.memory.cards import can_compile, find_card
from train.memory.fit import RECIPES, first_fit
from train.memory.plan import MemoryPlan, plan, stored
from train.memory.program import count
from train.plan import Plan, load_plan, main, programs_of
from train.pretrain import main as pretrain
from train.run import training
from train.run.cli import run
from train.step.programs import Programs


def planned(**changes):
    config = resolve(small("unused", **changes))
    return plan(config, programs_of(config))


# These differ from galore-adamw, adamw8bit and racs in the update alone.
ALIKE = {"fira-adamw", "apollo-adamw", "apollo-mini-adamw", "alice", "scale"}
ALIKE |= {"galore-adafactor", "galore-adamw8bit"}


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in ALIKE])
def test_a_plan_adds_up_for_every_optimizer(optimizer):
    options = OPTIMIZERS[optimizer].options
    galore = {} if "rank" in options else NO_SUBSPACE
    if OPTIMIZERS[optimizer].adapter is not None:
        galore = {"rank": 4, "update_proj_gap": 3 if "update_proj_gap" in options else None}
        galore["adapter_pattern"] = "query|up"
    one = planned(optimizer=optimizer, **galore)
    assert sum(one.parts().values()) == one.peak
    assert all(size > 0 for name, size in one.parts().items() if name not in one.states)
    assert (one.states["projections"] > 0) == ("update_proj_gap" in options)


def test_a_layerwise_step_has_one_layers_gradient_and_checkpointing_fewer_activations():
    wide = {"batch_size": 2, "seq_len": 16, **ADAMW}
    whole, layer = planned(**wide), planned(layerwise=True, **wide)
    again = planned(layerwise=True, rematerialize=True, **wide)
    # Two layers; the embedding's and the head's gradients are larger than one's.
    assert layer.gradients < whole.gradients / 2
    assert again.activations < layer.activations
    assert layer.weights == whole.weights


def test_accumulating_keeps_the_activations_of_a_microbatch_and_a_gradient_in_float32():
    whole, parts = planned(**ADAMW), planned(**ADAMW, accumulate=4)
    # All but the head's gradient, which the loss makes in the forward pass.
    assert whole.activations / 4 <= parts.activations < whole.activations / 3
    assert parts.gradients == 2 * whole.gradients


def test_without_a_gpu_bfloat16_is_estimated_in_two_bytes_with_temporaries_of_four(capsys):
    sizes = {"batch_size": 16, "seq_len": 64, "layerwise": True, "rematerialize": True} | ADAMW
    wide, half = (output(capsys, dtype=dtype, **sizes) for dtype in ("float32", "bfloat16"))
    assert half["estimate"]
    assert not wide["estimate"]
    assert half["compiled_for"] == wide["compiled_for"] == "cpu"
    assert half["weight_bytes"] == wide["weight_bytes"] / 2
    assert half["activation_bytes"] == wide["activation_bytes"] / 2
    assert half["temporary_bytes"] == wide["temporary_bytes"]


@pytest.mark.parametrize(
    "optimizer",
    # What other ways back and RACS remember stays in float32, as do Muon's coefficients.
    [
        name
        for name, recipe in OPTIMIZERS.items()
        if "state_dtype" in recipe.options and not recipe.recovers and name not in ("racs", "muon")
    ],
)
@pytest.mark.parametrize("layerwise", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_moments_of_bfloat16_weights_take_four_bytes_and_as_published_two(optimizer, layerwise):
    options = OPTIMIZERS[optimizer].options
    if layerwise and OPTIMIZERS[optimizer].adapter:
        pytest.skip("no layer-wise step")
    own = {} if "rank" in options else NO_SUBSPACE
    if OPTIMIZERS[optimizer].adapter is not None:
        own = {"rank": 4, "update_proj_gap": 3 if "update_proj_gap" in options else None}

    def states(**dtypes):
        settings = small("unused", optimizer=optimizer, layerwise=layerwise, **own, **dtypes)
        return stored(programs_of(resolve(settings)))

    weights, default = states(dtype="bfloat16")
    same, published = states(dtype="bfloat16", state_dtype="bfloat16")
    wide, wide_states = states(dtype="bfloat16", weight_dtype="float32")
    assert weights == same < wide
    assert default["moments"] == 2 * published["moments"] == wide_states["moments"]
    assert 2 * default["projections"] == 2 * published["projections"] == wide_states["projections"]


def test_a_mesh_splits_what_a_device_holds():
    one, eight = planned(**ADAMW), planned(**ADAMW, mesh="fsdp=8")
    assert eight.weights < one.weights / 6
    assert eight.states["moments"] < one.states["moments"] / 6
    assert eight.activations == one.activations // 8


def output(capsys, **settings):
    plan_only = {name: settings.pop(name) for name in ("gpu", "dump") if name in settings}
    own = small("unused", **settings)
    assert main(Plan(**vars(own), **plan_only, json=True)) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_names_of_the_contract(capsys):
    found = output(capsys)
    names = ("weight", "optimizer_state", "gradient", "activation", "temporary", "batch")
    assert sum(found[f"{name}_bytes"] for name in names) == found["peak_bytes"]
    assert found["cards_gib"][0] == 8


def words(*args):
    with pytest.raises(SystemExit) as stop:
        run(main, Plan, "plan", load=load_plan, args=["--model", "tiny", *args])
    return stop.value.code


def test_several_optimizers_stand_side_by_side_in_a_table_and_a_picture(capsys, tmp_path):
    file = tmp_path / "plan.png"
    small_batch = ["--batch-size", "1", "--seq-len", "16"]
    names = ["--optimizer", "adamw8bit", "--compare", "adamw"]
    assert words(*small_batch, *names, "--plot", str(file)) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny: memory of one device (cpu), MiB\n")
    assert all(name in out for name in (" adamw8bit ", " adamw "))
    assert file.read_bytes().startswith(b"\x89PNG")


def pretend(monkeypatch, fits):
    """Has a step take no more than there is if `fits` is true of its settings."""
    compiled = []

    def plan_of(config, programs, card, room, near):
        compiled.append(config)
        states = {"projections": 0, "moments": 0, "counters": 0}
        return MemoryPlan(2**30, states, 0, 0, 0, 0, 2**30 if fits(config) else 12 * 2**30)

    monkeypatch.setattr(plan_module, "can_compile", lambda: False)
    monkeypatch.setattr(plan_module, "plan_to_fit", plan_of)
    monkeypatch.setattr(plan_module, "programs_of", lambda config, card: None)
    monkeypatch.setattr(plan_module, "make_known", lambda config, programs: lambda one: 0)
    return compiled


def command_of(capsys, *args, code=0):
    """The command that the planner prints, parsed by the program that it is for."""
    assert words("--card", "12", "--json", *args) == code
    found = json.loads(capsys.readouterr().out)
    typed = shlex.split(found["command"])
    assert typed[:3] == ["python", "-m", "train.pretrain"]
    seen = []
    with pytest.raises(SystemExit) as stop:
        run(seen.append, Pretrain, "train", load=load, args=typed[3:])
    assert not stop.value.code
    return resolve(seen[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_for_each_recipe_is_parsed_and_trains_by_it(recipe, capsys, monkeypatch):
    wanted = resolve(Pretrain(**RECIPES[recipe]))

    def fits(config):
        return all(getattr(config, k) == getattr(wanted, k) for r in RECIPES.values() for k in r)

    pretend(monkeypatch, fits)
    found = command_of(capsys)
    assert dataclasses.replace(found, accumulate=1) == wanted


def test_a_card_keeps_what_the_user_said(capsys, monkeypatch):
    pretend(monkeypatch, lambda config: config.batch_size // config.accumulate <= 3)
    said = ["--data", "c4", "--data-dir", "/my data", "--steps", "1e3", "--out", "a b"]
    said += ["--optimizer", "galore-adafactor", "--seed", "7", "--batch-size", "24"]
    said += ["--stochastic-rounding", "False"]
    found = command_of(capsys, *said)
    kept = (found.data, found.data_dir, found.steps, found.out, found.optimizer, found.seed)
    assert kept == ("c4", "/my data", 1000, "a b", "galore-adafactor", 7)
    assert (found.batch_size, found.accumulate) == (24, 8)
    assert not found.stochastic_rounding


def test_a_card_keeps_a_config_json(capsys, monkeypatch, tmp_path):
    pretend(monkeypatch, lambda config: config.layerwise)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(resolve(Pretrain(rank=7, steps=30)))))
    found = command_of(capsys, "--config", str(file))
    assert (found.rank, found.steps, found.optimizer) == (7, 30, "galore-adamw")
    assert found.layerwise


def test_without_room_for_the_default_batch_the_batch_gets_smaller_and_a_given_one_stays(
    capsys, monkeypatch
):
    pretend(monkeypatch, lambda config: config.layerwise and config.batch_size <= 5)
    assert command_of(capsys).batch_size == 4  # the largest that divides the default
    assert words("--card", "12", "--batch-size", "6") == 1
    assert "10 GB card: does not fit" in capsys.readouterr().err


def test_another_optimizer_than_asked_is_offered_not_substituted(capsys, monkeypatch):
    pretend(monkeypatch, lambda config: config.optimizer == "galore-adamw8bit")
    assert command_of(capsys, "--optimizer", "adamw", code=1).optimizer == "galore-adamw8bit"
    assert words("--card", "12", "--optimizer", "adamw") == 1
    out, err = capsys.readouterr()
    assert "--optimizer adamw does not fit 12 GiB" in err
    assert "--optimizer adamw does not fit; this does:\npython -m train.pretrain" in out


def test_a_setting_that_some_recipes_refuse_leaves_these_out(capsys, monkeypatch):
    pretend(monkeypatch, lambda config: True)
    found = command_of(capsys, "--rank", "8", "--rematerialize")
    assert (found.optimizer, found.rank, found.rematerialize) == ("galore-adamw", 8, True)


def test_few_steps_are_compiled_to_find_a_batch():
    compiled = []

    def planned(config):
        compiled.append(config.batch_size)
        return MemoryPlan(0, {}, 0, 0, 0, 0, 700 + 10 * config.batch_size)

    def known(config):
        return 600 + 8 * config.batch_size

    tried = [resolve(Pretrain(batch_size=2**n, accumulate=1)) for n in range(9, -1, -1)]
    assert first_fit(tried, 900, known, planned).config.batch_size == 16
    assert compiled == [32, 16]
    compiled.clear()
    assert first_fit(tried, 620, known, planned) is None
    assert compiled == [1]


@pytest.mark.parametrize(
    ("near", "lean_peak", "wanted"),
    [(True, 13, ["lean"]), (True, 11, ["lean", "whole"]), (False, 13, ["whole"])],
)
def test_a_step_that_hardly_fits_is_refused_by_its_program_without_a_refresh(
    near, lean_peak, wanted, monkeypatch
):
    compiled = []

    def compiled_steps(programs):
        compiled.append(programs.train_step)
        return [lean_peak if programs.train_step == "lean" else 10]

    def plan_of(config, programs, peaks):
        return MemoryPlan(0, {}, 0, 0, 0, 0, max(peaks))

    monkeypatch.setattr(plan_module, "compiled_steps", compiled_steps)
    monkeypatch.setattr(plan_module, "plan", plan_of)
    fields = dict.fromkeys(f.name for f in dataclasses.fields(Programs))
    programs = Programs(**{**fields, "train_step": "whole", "step_without_refresh": "lean"})
    found = plan_module.plan_to_fit(resolve(small("unused")), programs, None, 12, near)
    assert compiled == wanted
    assert found.peak == (max(lean_peak, 10) if near else 10)


def test_the_plan_of_a_card_is_drawn(capsys, monkeypatch, tmp_path):
    pretend(monkeypatch, lambda config: True)
    assert words("--card", "12", "--plot", str(tmp_path / "plan.png")) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--card", "-1"], "--card -1: expected the size"),
        (["--card", "12", "--compare", "adamw"], "leave out --compare"),
        (["--card", "12", "--mesh", "data=3", "--batch-size", "4"], "choose a multiple of 3"),
        (["--card", "142"], "--card 142: no card is as large"),
        (["--gpu", "rtx-1"], "--gpu 'rtx-1': expected one of rtx-3060-12gb"),
        (["--dump", "x", "--compare", "adamw"], "--dump writes one program"),
        (["--dump", "README.md"], "--dump 'README.md' is there already"),
        (["--dump", "nowhere/x"], "--dump nowhere/x cannot be written (No such file or directory)"),
        (
            ["--plot", "nowhere/x.png"],
            "--plot nowhere/x.png cannot be written (No such",
        ),
        (["--plot", "x.xyz"], "--plot 'x.xyz': expected a name that ends in ."),
        (["--dump", "x", "--dtype", "bfloat16"], "--dump with an estimate"),
        (["--compare", "sgd"], "--optimizer 'sgd': choose one of"),
        (["--batch-size", "3", "--accumulate", "2"], "--batch-size 3 with --accumulate 2"),
    ],
)
def test_wrong_use_ends_with_one_line(args, message, capsys):
    assert words(*args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_nothing_fits_a_card_without_room(capsys, monkeypatch):
    pretend(monkeypatch, lambda config: True)
    assert words("--seq-len", "16", "--card", "0.5") == 1
    assert "10 GB card: does not fit" in capsys.readouterr().err


def test_a_run_says_its_plan_and_is_refused_where_it_will_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "device_memory", lambda device: 1000)
    with pytest.raises(OSError, match=r"would take .* GiB of 0\.0: try a smaller"):
        pretrain(small(tmp_path / "run"))
    assert "at its peak" in capsys.readouterr().out
    assert not (tmp_path / "run" / "config.json").exists()


needs_wheels = pytest.mark.skipif(not can_compile(), reason="the extra gpu-target is not installed")
DONE = ("kernels", "bytes_moved", "products_flops", "floor_seconds", "collectives")


@needs_wheels
def test_a_plan_for_a_card_says_what_its_program_does_and_writes_it(capsys, tmp_path):
    file = tmp_path / "step.txt"
    found = output(capsys, gpu="rtx-4090", dump=str(file), dtype="bfloat16", **ADAMW)
    assert found["compiled_for"] == "NVIDIA GeForce RTX 4090"
    assert not found["estimate"]
    text = file.read_text()
    card = find_card("rtx-4090")
    again = count(text, card.bandwidth, card.peak_flops("bfloat16")).as_json()
    assert {name: found[name] for name in DONE} == {name: again[name] for name in DONE}
    assert found["collectives"] == {}
    assert "__cudnn$fmha" in text  # chosen by the card, not by this CPU


@needs_wheels
def test_a_mesh_of_cards_sends_something_and_attends_with_cudnn(capsys, tmp_path):
    file = tmp_path / "step.txt"
    settings = {"dtype": "bfloat16", "mesh": "data=2,fsdp=2", **ADAMW}
    found = output(capsys, gpu="h100", dump=str(file), **settings)
    assert found["collectives"]["all-gather"]["bytes"] > 0
    assert "__cudnn$fmha" in file.read_text()


@needs_wheels
@pytest.mark.slow
def test_a_card_of_unknown_speed_has_no_floor(capsys, tmp_path):
    file = tmp_path / "mine.txtpb"
    file.write_text(find_card("rtx-4090").target.replace("RTX 4090", "RTX 9999"))
    found = output(capsys, gpu=str(file), **ADAMW)
    assert found["floor_seconds"] is None
    assert found["kernels"] > 0


@needs_wheels
def test_a_target_that_xla_refuses_is_wrong_use(capsys, tmp_path):
    file = tmp_path / "mine.txtpb"
    file.write_text(find_card("rtx-4090").target + "colour: 3\n")
    assert words("--gpu", str(file)) == 2
    error = capsys.readouterr().err
    assert "XLA refuses the target of NVIDIA GeForce RTX 4090" in error
    assert error.count("\n") == 1


def test_a_card_without_the_wheels_is_wrong_use(capsys, monkeypatch):
    monkeypatch.setattr(cards, "is_installed", lambda module: False)
    assert words("--gpu", "rtx-4090") == 2
    assert capsys.readouterr().err == (
        "error: compiling for NVIDIA GeForce RTX 4090 needs NVIDIA's compiler: "
        "install the extra gpu-target (Linux on x86-64): pip install -e '.[train,gpu-target]'\n"
    )
