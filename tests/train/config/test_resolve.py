"""Settings: defaults, what is accepted, and how wrong use ends."""

import dataclasses
import json
import os
import re
from typing import get_args

import jax
import jax.numpy as jnp
import optax
import pytest
from paths import FIXTURES

from galore_optax import Adaptive, Staggered
from models.llama.config import SIZES
from train.config.defaults import DEFAULTS
from train.config.finetune_lm import finetuning_folder
from train.config.glue import Finetune, glue_folder
from train.config.optimizers import (
    OPTIMIZERS,
    learning_rate_schedule,
    make_recipe,
)
from train.config.reopen import reopened
from train.config.resolve import load, resolve, settings_file
from train.config.resume import differences
from train.config.settings import FinetuneLM, Pretrain, Resolved, to_json
from train.run import cli
from train.run.help import short_help


def command(*args: str) -> Pretrain:
    """What the command line makes of its flags."""
    seen = []
    with pytest.raises(SystemExit) as stop:
        cli.run(seen.append, Pretrain, "train", load=load, args=args)
    assert stop.value.code is None or stop.value.code == 0
    return seen[0]


def refused(capsys, *args: str) -> str:
    """The line on standard error of a command that ends with 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(resolve, Pretrain, "python -m train.pretrain", load=load, args=args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err


def test_the_names_are_those_of_the_models_and_optimizers():
    assert set(SIZES) - {"micro"} == set(DEFAULTS)
    field = next(f for f in dataclasses.fields(Pretrain) if f.name == "optimizer")
    assert set(get_args(field.type)) == set(OPTIMIZERS)


@pytest.mark.parametrize("model", [*DEFAULTS])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_default_is_accepted(model, optimizer):
    config = resolve(Pretrain(model=model, optimizer=optimizer))
    assert config.batch_size % config.accumulate == 0
    without = ("adamw", "adamw8bit", "adafactor", "racs", "scale", "muon")
    assert (config.rank is None) == (optimizer in without)


def test_the_defaults_of_other_ways_back_are_the_papers_of_every_model():
    found = {
        name: (c.rank, c.scale, c.learning_rate, c.b2)
        for name in ("fira-adamw", "apollo-adamw", "apollo-mini-adamw", "alice", "racs")
        for c in [resolve(Pretrain(model="llama-60m", optimizer=name))]
    }
    assert found == {
        "fira-adamw": (128, 0.25, 0.01, 0.999),
        "apollo-adamw": (128, 1.0, 0.01, 0.999),
        "apollo-mini-adamw": (1, 128**0.5, 0.01, 0.999),
        "alice": (128, 0.3, 0.02, 0.9),
        "racs": (None, 0.05, 0.02, 0.999),
    }
    assert resolve(Pretrain(optimizer="apollo-mini-adamw", rank=4)).rank == 4


def test_microbatches_are_the_largest_that_divide_any_batch():
    assert resolve(Pretrain(model="llama-60m", batch_size=3 * 1021)).accumulate == 1021
    assert resolve(Pretrain(model="llama-60m", batch_size=2**31 - 1)).accumulate == 2**31 - 1
    assert resolve(Pretrain(model="llama-60m", batch_size=512)).accumulate == 512 // 128


def test_the_text_is_cut_into_as_many_parts_of_eight_as_divide_any_batch():
    parts = {size: resolve(Pretrain(batch_size=size)).data_parts for size in (512, 12, 6, 1)}
    assert parts == {512: 8, 12: 4, 6: 2, 1: 1}


def test_the_largest_rank_that_compresses_is_accepted():
    assert resolve(Pretrain(rank=127)).rank == 127


def test_galores_defaults_are_the_papers():
    found = {
        model: (c.rank, c.update_proj_gap, c.learning_rate, c.scale, c.steps, c.batch_size)
        for model in [*DEFAULTS]
        if model != "tiny"
        for c in [resolve(Pretrain(model=model))]
    }
    assert found == {
        "llama-60m": (128, 200, 0.01, 0.25, 10_000, 512),
        "llama-130m": (256, 200, 0.01, 0.25, 20_000, 512),
        "llama-350m": (256, 200, 0.01, 0.25, 60_000, 512),
        "llama-1b": (512, 200, 0.01, 0.25, 100_000, 512),
        "llama-7b": (1024, 500, 0.005, 0.25, 150_000, 512),
    }


def test_warm_up_never_has_a_learning_rate_of_zero_and_none_is_possible():
    rate = learning_rate_schedule(resolve(Pretrain(steps=10, warmup_steps=3, learning_rate=1.0)))
    assert [float(rate(t)) for t in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    rate = learning_rate_schedule(resolve(Pretrain(steps=10, warmup_steps=0, learning_rate=1.0)))
    assert float(rate(0)) == 1.0
    assert float(rate(10)) == pytest.approx(0.1)


def test_schedules_rise_to_the_peak_and_fall_to_their_floor():
    def rates(**own):
        rate = learning_rate_schedule(
            resolve(Pretrain(steps=10, warmup_steps=2, learning_rate=1.0, **own))
        )
        return [float(rate(t)) for t in range(11)]

    rise = [1 / 3, 2 / 3]
    assert rates(schedule="constant") == pytest.approx([*rise, *[1.0] * 9])
    assert rates(schedule="linear", floor=0.2) == pytest.approx(
        [*rise, *(1 - 0.1 * t for t in range(9))]
    )
    wsd = rates(schedule="wsd", floor=0.0, decay_steps=4)
    assert wsd == pytest.approx([*rise, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert rates(floor=0.3)[-1] == pytest.approx(0.3)
    assert rates()[-1] == pytest.approx(0.1)
    alone = learning_rate_schedule(resolve(Pretrain(steps=4, warmup_steps=0, schedule="linear")))
    assert float(alone(0)) == pytest.approx(0.02)


def test_what_is_set_reaches_the_optimizer_and_config_json_repeats_it(tmp_path):
    words = "--b1 0.8 --b2 0.99 --eps 1e-6 --clip-norm none --schedule wsd --moments keep --stagger"
    words += " --subspace svd --side both --adaptive-refresh --update-proj-gap 5"
    config = resolve(command(*words.split()))
    assert config.clip_norm is config.clip is None
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(config)))
    again = resolve(command("--config", str(file)))
    assert dataclasses.replace(again, config=None) == config
    seen = {}

    def recipe(learning_rate, **options):
        seen.update(options)
        return optax.identity()

    row = OPTIMIZERS[config.optimizer]._replace(make=recipe, stacks=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIMIZERS, config.optimizer, row)
        make_recipe(config)
    assert (seen["b1"], seen["b2"], seen["eps"]) == (0.8, 0.99, 1e-6)
    assert (seen["moments"], seen["subspace"], seen["side"]) == ("keep", "svd", "both")
    assert seen["update_proj_gap"] == Adaptive(Staggered(5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_takes_its_products_in_the_dtype_of_the_model(dtype):
    config = resolve(command("--optimizer", "muon", "--moment-bits", "8", "--dtype", dtype))
    params = {"layers": {"mlp": {"up": jax.ShapeDtypeStruct((2, 40, 64), dtype)}}}
    tx = make_recipe(config)
    update = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)
    products = [line for line in update.as_text().splitlines() if "dot_general" in line]
    assert products
    assert all(line.count("bf16>") == 3 * (dtype == "bfloat16") for line in products)


def test_alice_is_given_its_parts():
    params = {"layers": {"mlp": {"up": jnp.ones((2, 40, 64))}}}
    params = jax.eval_shape(lambda: params)

    def sizes(*words):
        config = resolve(command("--optimizer", "alice", "--rank", "8", *words))
        state = jax.eval_shape(make_recipe(config).init, params)
        return [x.size for x in jax.tree.leaves(state.recovery)]

    assert sizes() == [2 * 64, 2, 2 * 8 * 8]
    assert sizes("--tracking", "0") == [2 * 64, 2]
    config = resolve(command("--optimizer", "alice", "--compensation", "0.2", "--leading", "3"))
    assert (config.compensation, config.tracking, config.leading) == (0.2, 0.999, 3)


def test_bfloat16_has_float32_moments_and_weights_rounded_at_random_unless_told():
    def dtypes(**settings):
        c = resolve(Pretrain(**settings))
        return c.dtype, c.weight_dtype, c.state_dtype, c.stochastic_rounding

    low, wide = "bfloat16", "float32"
    assert dtypes() == (wide, wide, wide, False)
    assert dtypes(dtype=low) == (low, low, wide, True)
    assert dtypes(model="llama-7b") == (low, low, wide, True)
    adamw = {"optimizer": "adamw", "model": "llama-7b"}
    assert dtypes(**adamw) == (low, low, low, True)
    assert dtypes(**adamw, dtype=wide) == (wide, wide, wide, False)
    assert dtypes(**adamw, adapter="lora") == (low, low, wide, True)
    assert dtypes(optimizer="adamw", dtype=low) == (low, low, wide, True)
    assert dtypes(dtype=low, weight_dtype=wide) == (low, wide, wide, False)
    published = {"dtype": low, "state_dtype": low, "stochastic_rounding": False}
    assert dtypes(**published) == (low, low, low, False)
    eight = {"optimizer": "galore-adamw8bit", "dtype": low}
    assert dtypes(**eight) == (low, low, None, True)
    lorp = {"optimizer": "gradnorm-lorp-adamw", "dtype": low}
    assert dtypes(**lorp) == (low, low, wide, True)
    assert dtypes(**lorp, moment_bits=8) == (low, low, None, True)
    assert dtypes(optimizer="q-galore-adamw8bit") == (wide, wide, None, True)


def test_an_adapter_comes_with_the_optimizers_name_or_by_itself():
    found = {
        name: resolve(Pretrain(optimizer=name)).adapter  # pyrefly: ignore
        for name in OPTIMIZERS
    }
    assert {name: adapter for name, adapter in found.items() if adapter} == {
        "gradnorm-lorp-adamw": "gradnorm-lorp",
        "lora-adamw": "lora",
        "relora-adamw": "relora",
        "qlora-adamw": "qlora",
    }
    alone = resolve(Pretrain(optimizer="adamw8bit", adapter="dora"))
    assert (alone.rank, alone.dropout, alone.out) == (32, 0.0, "runs/tiny-dora-adamw8bit")
    assert resolve(Pretrain(optimizer="relora-adamw", adapter="relora")).adapter == "relora"
    assert resolve(Pretrain(optimizer="qlora-adamw")).weight_bits == 4
    lorp = resolve(Pretrain(optimizer="gradnorm-lorp-adamw"))
    assert (lorp.rank, lorp.gradient_rank, lorp.restart_every) == (32, 8, 60)


def test_after_a_restart_the_learning_rate_rises_to_where_the_cosine_is():
    options = {"optimizer": "relora-adamw", "steps": 40, "warmup_steps": 3, "learning_rate": 1.0}
    restarted = resolve(Pretrain(**options, restart_every=10, restart_warmup=4))
    never = resolve(Pretrain(**options, restart_every=40))
    assert never.restart_warmup is None
    rate, cosine = (learning_rate_schedule(config) for config in (restarted, never))
    shares = [float(rate(t) / cosine(t)) for t in range(40)]
    rise = [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1]
    assert shares == pytest.approx([1.0] * 10 + rise * 3)


def test_flags_override_a_config_json_and_nothing_else_changes(tmp_path):
    config = resolve(Pretrain(model="llama-60m", rank=7, clip_norm=0.5, deterministic=True))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(config)))
    again = resolve(command("--config", str(file), "--seed", "5"))
    assert again == dataclasses.replace(config, seed=5, config=str(file))
    assert again.out == "runs/llama-60m-galore-adamw"
    # Going on needs no --out, wherever the folder is.
    assert resolve(command("--config", str(file), "--resume")).out == str(tmp_path)


@pytest.fixture
def written(tmp_path) -> str:
    own = {"floor": 0.3, "decay_steps": 30, "moments": "keep", "update_proj_gap": 50}
    config = resolve(Pretrain(schedule="wsd", steps=60, **own))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(config)))
    return str(file)


def test_a_flag_counts_where_a_config_json_says_the_same(written, capsys):
    for again in ((), ("--floor", "0.3")):
        assert resolve(command("--config", written, "--schedule", "linear", *again)).floor == 0.3
    for flags, says in (
        ("--schedule constant --floor 0.3", "--floor 0.3 has no effect"),
        ("--steps 6 --warmup-steps 6", "--warmup-steps 6: expected fewer than --steps 6"),
        ("--steps 50 --moments keep", "--moments keep has no effect"),
        ("--clip-norm none --clip exact", "--clip exact has no effect"),
    ):
        assert says in refused(capsys, "--config", written, *flags.split())


def test_a_run_of_any_command_that_is_resumed_without_out_has_its_own_settings(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    init = str(FIXTURES / "llama")
    for config, folder, name in (
        (Pretrain(optimizer="lora-adamw"), None, "tiny-lora-adamw"),
        (FinetuneLM(init=init, tokenizer="bytes"), finetuning_folder, "llama-galore-adamw"),
        (Finetune(task="rte", optimizer="adamw", adapter="dora"), glue_folder, "rte-dora-adamw"),
    ):
        file = tmp_path / "runs" / name / "config.json"
        resumed = dataclasses.replace(config, resume=True)
        assert settings_file(resumed, folder) is None  # nothing to resume
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        assert settings_file(resumed, folder) == f"runs/{name}/config.json"
        assert settings_file(config, folder) is None


def test_settings_of_a_config_json_without_use_or_room_beside_the_flags_are_left_open(written):
    def of(flags: str) -> Resolved:
        return resolve(command("--config", written, *flags.split()))

    assert (of("--schedule constant").floor, of("--schedule cosine").decay_steps) == (None, None)
    short = of("--steps 20")
    assert (short.warmup_steps, short.decay_steps, short.moments) == (6, 4, None)
    assert of("--clip-norm none").clip is None


def test_config_json_has_every_setting_but_how_it_was_invoked():
    stored = to_json(resolve(Pretrain(optimizer="adamw")))
    how = {"out", "resume", "config", "processes", "process", "coordinator", "launcher"}
    how |= {"profile"}
    assert set(stored) == {f.name for f in dataclasses.fields(Pretrain)} - how
    assert stored["rank"] is stored["scale"] is stored["update_proj_gap"] is None
    assert json.loads(json.dumps(stored)) == stored


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--model llama-2b", "llama-60m"),
        ("--optimizer sgd", "galore-adamw"),
        ("--data pile", "c4"),
        ("--dtype float16", "bfloat16"),
        ("--sequences mixed", "packed"),
        ("--rnak 4", "--rnak"),
        ("--rank four", "--rank four: expected an integer, such as 1000 or 1e3"),
        ("--steps 1.5", "--steps 1.5: expected an integer"),
        ("--steps inf", "--steps inf: expected an integer"),
        ("--scale=much", "--scale much: expected a number"),
        ("--rank", "--rank"),
        ("stray", "stray"),
        ("--rank 0", "--rank 0: expected 1 or more"),
        ("--rank 128", "--rank 128: a rank of 128 or more compresses no matrix of tiny"),
        ("--rank 600 --model llama-60m", "choose at most 511, or an --optimizer without rank"),
        ("--update-proj-gap 0", "--update-proj-gap 0: expected 1 or more"),
        ("--rank 4 --optimizer adamw", "no effect with --optimizer adamw"),
        ("--scale 1 --optimizer adafactor", "choose one of galore-adamw, galore-adamw8bit"),
        ("--weight-decay 0.1 --optimizer adafactor", "choose one of adamw"),
        ("--scale -1", "--scale -1.0: expected a positive number"),
        ("--learning-rate nan", "--learning-rate nan: expected a positive number"),
        ("--learning-rate inf", "expected a positive number"),
        ("--learning-rate 1e39", "--learning-rate 1e+39: expected a positive number, 1.2e-38 to"),
        ("--learning-rate 1e-50", "--learning-rate 1e-50: expected a positive number, 1.2e-38 to"),
        ("--scale 1e300", "expected a positive number, 1.2e-38 to 3.4e+38"),
        ("--weight-decay 1e308", "expected 0 or more, 3.4e+38 at most"),
        ("--clip-norm 0", "expected a positive number"),
        ("--weight-decay -0.1", "expected 0 or more"),
        ("--steps 0", "--steps 0: expected 1 or more"),
        ("--steps 10 --warmup-steps 10", "fewer than --steps 10"),
        ("--batch-size -8", "expected 1 or more"),
        ("--accumulate 0", "expected 1 or more"),
        ("--seq-len 513", "--seq-len 513: tiny takes at most 512 tokens"),
        ("--seed -1", "expected 0 or more"),
        ("--seed 4294967296", "less than 2**32"),
        ("--steps 99999999999999999999", "expected less than 2**31"),
        ("--max-skipped 0", "expected 1 or more"),
        ("--workers -1", "expected 0 or more"),
        ("--data-parts 0", "--data-parts 0: expected 1 or more"),
        ("--data-parts 3", "--data-parts 3: expected a divisor of --batch-size 16"),
        ("--data c4", "needs --data-dir"),
        ("--data-dir x", "no effect with --data builtin"),
        ("--data text", "--data text needs --data-dir, a folder, a file or a pattern"),
        ("--eval-data x", "no effect with --data builtin"),
        ("--config missing.json", "missing.json"),
        ("--adapter vera", "low-rank"),
        ("--adapter lora", "galore-adamw has a rank of its own; choose one of adamw, adamw8bit,"),
        ("--adapter dora --optimizer lora-adamw", "lora-adamw has an adapter of its own"),
        ("--alpha 8", "--alpha 8.0 has no effect with --optimizer galore-adamw"),
        (
            "--alpha 8 --optimizer adamw --adapter low-rank",
            "choose one of --adapter lora, --adapter",
        ),
        ("--restart-every 5 --optimizer lora-adamw", "--adapter relora, --adapter gradnorm-lorp"),
        ("--rank 129 --optimizer lora-adamw", "smaller side of a matrix, 128 in tiny"),
        ("--side both --optimizer fira-adamw", "--side both: --optimizer fira-adamw needs a s"),
        (
            "--accumulate-in-subspace --optimizer alice",
            "--accumulate-in-subspace: --optimizer alice needs whole gradients; leave it out or",
        ),
        ("--moments keep --optimizer apollo-adamw", "--moments keep has no effect with --opt"),
        ("--gradient-rank 8 --optimizer lora-adamw", "choose one of gradnorm-lorp-adamw"),
        ("--compensation 0.2", "or choose one of alice"),
        ("--compensation -1 --optimizer alice", "--compensation -1.0: expected 0 or more"),
        ("--tracking 1 --optimizer alice", "--tracking 1.0: expected a share"),
        ("--leading 33 --optimizer alice", "--leading 33: expected at most --rank 32"),
        (
            "--gradient-rank 8 --rank 8 --optimizer gradnorm-lorp-adamw",
            "below --rank 8, the ad",
        ),
        (
            "--rank 1 --optimizer gradnorm-lorp-adamw",
            "--gradient-rank 1: expected below --rank",
        ),
        ("--dropout 1 --optimizer lora-adamw", "--dropout 1.0: expected a share"),
        ("--adapter-pattern [ --optimizer lora-adamw", "--adapter-pattern [: unterminated"),
        ("--alpha 0 --optimizer lora-adamw", "--alpha 0.0: expected a positive"),
        ("--weight-bits 4 --optimizer relora-adamw", "4-bit weights lose what was learnt"),
        (
            "--restart-warmup 4 --restart-every 40 --steps 40 --optimizer relora-adamw",
            "--restart-warmup 4 has no effect: with --restart-every 40 of --steps 40 there is no",
        ),
        ("--state-dtype float32 --optimizer adamw8bit", "--state-dtype float32 has no effect"),
        (
            "--state-dtype float32 --moment-bits 8 --optimizer gradnorm-lorp-adamw",
            "--state-dtype float32 has no effect: moments have 8 bits, by --moment-bits; leave one",
        ),
        (
            "--stochastic-rounding True --dtype bfloat16 --weight-dtype float32",
            "float32 weights need no rounding; leave it out, or choose --weight-dtype bfloat16",
        ),
        ("--state-dtype float16", "bfloat16"),
        ("--b1 1", "--b1 1.0: expected a share from 0 to below 1"),
        ("--eps 0", "--eps 0.0: expected a positive number"),
        ("--energy-every 5 --optimizer adamw", "adamw has no orthonormal bases of gradients"),
        ("--energy-every 5 --optimizer apollo-adamw", "no orthonormal bases of gradients; leave"),
        ("--energy-every 5 --accumulate-in-subspace", "there is no whole gradient to measure"),
        ("--b2 0.9 --optimizer adafactor", "--b2 0.9 has no effect with --optimizer adafactor"),
        ("--moments keep --optimizer adamw", "--moments keep has no effect"),
        ("--moments keep --steps 50", "there is one refresh, the first; leave it out"),
        ("--stagger --update-proj-gap 1", "--stagger has no effect with --update-proj-gap 1"),
        ("--floor 0.5 --schedule constant", "--floor 0.5 has no effect: --schedule constant"),
        ("--floor 2", "--floor 2.0: expected a share of --learning-rate, from 0 to 1"),
        ("--decay-steps 5", "--decay-steps 5 has no effect: --schedule cosine has no such part"),
        ("--schedule wsd --decay-steps 299", "expected at most --steps 300 together"),
        ("--clip-norm none --clip exact", "--clip exact has no effect: --clip-norm none clips"),
        ("--weight-bits 3 --optimizer qlora-adamw", "--weight-bits 3: choose 4 or 8"),
        (
            "--restart-every 10 --restart-warmup 10 --optimizer relora-adamw",
            "--restart-warmup 10: expected fewer steps than --restart-every 10",
        ),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(capsys, flags, says):
    assert says in refused(capsys, *flags.split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "not a config.json of train.pretrain: it holds no object"),
        ('{"modle": "tiny"}', "unknown modle"),
        ('{"steps": "ten"}', "--steps 'ten': expected int or null"),
        ('{"steps": true}', "--steps True: expected int or null"),
        ('{"model": "llama-2b"}', "choose one of tiny"),
        ('{"optimizer": null}', "--optimizer None: choose one of adamw"),
    ],
)
def test_a_wrong_config_json_is_refused_too(capsys, tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    assert says in refused(capsys, "--config", str(tmp_path / "config.json"))


def printed(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.run(resolve, Pretrain, "python -m train.pretrain", args=args)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_has_every_flag_in_groups_with_its_default_and_is_short(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = printed(capsys, "--help")
    for field in dataclasses.fields(Pretrain):
        assert f"  --{field.name.replace('_', '-')} " in text
    assert "None" not in text
    assert text.count("\nLearning rate, steps and batch:\n") == 1
    assert "[Default" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 2 * len(dataclasses.fields(Pretrain)) + 30


@pytest.mark.parametrize(("kind", "needed"), [(FinetuneLM, 2), (Finetune, 3), (Pretrain, 0)])
def test_help_says_which_flags_are_required(kind, needed):
    assert short_help(kind, "train").count("[required]") == needed


def test_the_long_help_explains_every_flag(capsys):
    text = printed(capsys, "--help-all")
    for field in dataclasses.fields(Pretrain):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "None" not in text
    assert len({len(line) for line in text.splitlines() if line[:1] in set("╭│╰ ")}) == 1


def test_the_version_is_printed(capsys):
    assert re.fullmatch(r"galore-optax [\d.]+\S*, jax [\d.]+\n", printed(capsys, "--version"))


def test_numbers_switches_and_home_folders_are_as_people_type_them():
    words = "--steps 1e3 --batch-size=1.6e1 --seed 7 --learning-rate 1e-2 --clip-norm=none"
    words += " --rematerialize --no-stochastic-rounding --layerwise False --deterministic"
    config = command(*words.split(), "--out", "~/runs/a", "--prompt", "~/x", "--tokenizer=~/t.json")
    assert (config.steps, config.batch_size, config.seed) == (1000, 16, 7)
    assert (config.learning_rate, config.clip_norm) == (0.01, None)
    assert (config.rematerialize, config.stochastic_rounding) == (True, False)
    assert (config.layerwise, config.deterministic) == (False, True)
    home = os.path.expanduser("~")
    assert (config.out, config.tokenizer) == (f"{home}/runs/a", f"{home}/t.json")
    assert config.prompt == "~/x"
    assert resolve(Pretrain(tokenizer="~/t.json")).tokenizer == f"{home}/t.json"


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"moments": "keep"},
        {"schedule": "wsd", "decay_steps": 150},
        {"schedule": "wsd", "warmup_steps": 4, "decay_steps": 10},
        {"optimizer": "relora-adamw"},
    ],
)
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("steps", [5, 60, 100])
def test_a_config_json_with_fewer_steps_keeps_what_has_room_in_them(said, resume, steps, tmp_path):
    before = resolve(Pretrain(**said))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(before)))
    given = {"config": str(file), "resume": resume, "steps": steps}
    opened = reopened(load(file), dataclasses.replace(load(file), **given))
    after = resolve(dataclasses.replace(opened, **given))
    assert after.warmup_steps in (before.warmup_steps, steps // 10)
    assert after.warmup_steps + (after.decay_steps or 0) <= steps
    assert not resume or not differences(to_json(before), to_json(after))
    if resume and before.moments is not None:
        assert after.moments == before.moments  # for when it gets more steps again


def test_moments_of_few_bits_replace_the_dtype_that_a_config_json_has(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(resolve(Pretrain(optimizer="fira-adamw")))))
    after = resolve(command("--config", str(file), "--moment-bits", "8"))
    assert (after.moment_bits, after.state_dtype) == (8, None)


@pytest.mark.parametrize(
    ("before", "after", "rounds"), [("float32", "bfloat16", True), ("bfloat16", "float32", False)]
)
def test_weights_of_another_dtype_than_in_a_config_json_are_rounded_as_without_it(
    before, after, rounds, tmp_path
):
    file, given = tmp_path / "config.json", ("--weight-dtype", after)
    file.write_text(json.dumps(to_json(resolve(Pretrain(weight_dtype=before)))))
    found = resolve(command("--config", str(file), *given))
    assert (found.weight_dtype, found.stochastic_rounding) == (after, rounds)
    assert found == dataclasses.replace(resolve(command(*given)), config=str(file))
    kept = resolve(command("--config", str(file), *given, "--no-stochastic-rounding"))
    assert kept.stochastic_rounding is False
