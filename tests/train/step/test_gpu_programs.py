"""A step of every optimizer and adapter, and whole training steps, compiled for GPUs.

`gpu_programs.json` has the kernels and bytes of each program: of an optimizer with all subspaces
refreshed too, of a whole step without a refresh, with the bytes that several cards send. This
rewrites it, and prints what changed:

    JAX_PLATFORMS=cpu PYTHONPATH=.:tests python -m tests.train.step.test_gpu_programs
"""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from paths import ROOT

from galore_optax import apply_updates, join, product, split, value_and_grad
from models.llama.axes import dimension_numbers
from models.llama.config import SIZES, LlamaConfig
from train.config.optimizers import OPTIMIZERS, make_optimizer
from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.config.weights import ADAPTERS, stored_weights
from train.memory.cards import Card, can_compile, devices, find_card
from train.memory.program import count
from train.plan import programs_of

TABLE = Path(__file__).with_name("gpu_programs.json")
STEPS = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    **{name: {"optimizer": "adamw", "adapter": name} for name in ("dora", "low-rank")},
    "4 bits": {"optimizer": "q-galore-adamw8bit", "moment_bits": 4, "side": "larger"},
}
WHOLE = {
    "1 card": {"optimizer": "galore-adamw"},
    "4 cards": {"optimizer": "galore-adamw", "mesh": "data=2,fsdp=2"},
    "4 cards, layer-wise": {
        "optimizer": "galore-adamw", "mesh": "data=2,fsdp=2", "layerwise": True,
    },
}  # fmt: skip
# What users of a consumer card are told to run; the rest differs from the H100's in its products.
CONSUMER = ("galore-adamw", "galore-adamw8bit", "q-galore-adamw8bit", "muon", "4 bits")
CASES = [("rtx-3080", case) for case in CONSUMER]
CASES += [("h100", case) for case in (*STEPS, *WHOLE)]
# Bounds of a count as shares of the table's. XLA's versions differ a little; a program that does
# far less than the table says should have its row rewritten.
LESS, MORE = 0.67, 1.1

needs_wheels = pytest.mark.skipif(not can_compile(), reason="the extra gpu-target is not installed")


def settings(**changes):
    SIZES["small"] = LlamaConfig(
        width=128, mlp_width=256, layers=2, heads=2, kv_heads=1, max_length=64
    )
    own = OPTIMIZERS[changes["optimizer"]]
    uses_rank = "rank" in own.options or own.adapter or "adapter" in changes
    return resolve(
        Pretrain(
            model="small",  # pyrefly: ignore
            dtype="bfloat16",
            rank=32 if uses_rank else None,
            batch_size=4,
            accumulate=1,
            seq_len=32,
            steps=4,
            warmup_steps=1,
            learning_rate=0.01,
            **changes,
        )
    )


def program(card_name: str, case: str) -> str:
    """The text of a case's program for a card."""
    card = find_card(card_name)
    if case in WHOLE:
        parts = programs_of(settings(**WHOLE[case]), card)
        lowered = parts.step_without_refresh.lower(parts.abstract, parts.batch)
        return lowered.compile().as_text() or ""
    return step_of_a_stack(card, settings(**STEPS[case]))


def step_of_a_stack(card: Card, config) -> str:
    """A step on a stack of two matrices and their norms, of a size that is quantized."""
    at = SingleDeviceSharding(devices(card, 1)[0])
    tx = make_optimizer(config)

    def init(key):
        weights = {
            "mlp": {"up": jnp.zeros((2, 128, 256), jnp.bfloat16)},
            "mlp_norm": jnp.ones((2, 128), jnp.bfloat16),
        }
        params = stored_weights(config, {"layers": weights}, dimension_numbers, key)
        return params, tx.init(split(params)[0])

    def step(params, state, x, key):
        trained, frozen = split(params)

        def loss(trained):
            own = join(trained, frozen)["layers"]
            return jnp.mean(jax.vmap(product)(x * own["mlp_norm"][:, None], own["mlp"]["up"]) ** 2)

        gradient = value_and_grad(loss)(trained)[1]
        updates, state = tx.update(gradient, state, trained)
        key = key if config.stochastic_rounding else None
        return join(apply_updates(trained, updates, key), frozen), state

    key = jax.eval_shape(lambda: jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16)
    given = jax.tree.map(lambda x: x.update(sharding=at), (*jax.eval_shape(init, key), x, key))
    return jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile().as_text() or ""


def pins(text: str) -> dict[str, int]:
    """What the table has of a program, by name."""
    found, refresh = (count(text, 1.0, 1.0, branch) for branch in (min, max))
    sent = {kind: round(size) for kind, (_, size) in found.collectives.items()}
    return {
        "kernels": found.kernels,
        "bytes": round(found.bytes_moved),
        "kernels with a refresh": refresh.kernels,
        "bytes with a refresh": round(refresh.bytes_moved),
        **sent,
    }


@functools.cache
def outside_check():
    """`hlo_traffic.py`, with which others check the figures, if it is here."""
    file = ROOT.parent / "shared/tools/hlo_traffic.py"
    if not file.is_file():
        return None
    spec = importlib.util.spec_from_file_location("hlo_traffic", file)
    assert spec is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.Traffic


@needs_wheels
@pytest.mark.slow  # for a command of its own in `.ci/run`
@pytest.mark.parametrize(("card", "case"), CASES)
def test_a_program_does_no_more_than_the_table_says(card, case, optimized):
    text = program(card, case)
    pinned, done = json.loads(TABLE.read_text())[card][case], pins(text)
    assert done.keys() == pinned.keys()
    for name, value in done.items():
        assert LESS * pinned[name] <= value <= MORE * pinned[name], f"{name}: {value:,}"
    assert ("__cudnn$fmha" in text) == (case in WHOLE)
    if traffic := outside_check():
        assert (done["bytes"], done["kernels"]) == traffic(text).run()


def test_every_optimizer_and_adapter_is_there():
    adapters = {OPTIMIZERS[x["optimizer"]].adapter or x.get("adapter") for x in STEPS.values()}
    assert adapters >= set(ADAPTERS)
    table = json.loads(TABLE.read_text())
    assert [(card, case) for card, rows in table.items() for case in rows] == CASES


def rewrite() -> None:
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table: dict[str, dict[str, dict[str, int]]] = {}
    for card, case in CASES:
        row = table.setdefault(card, {})[case] = pins(program(card, case))
        print(card, case, before.get(card, {}).get(case), "->", row, flush=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    rewrite()
