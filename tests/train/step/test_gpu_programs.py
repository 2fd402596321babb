"""A small training step of every optimizer and adapter, compiled for two cards: what it does there.

`gpu_programs.json` has the kernels and bytes of each, with all subspaces refreshed too, and on
several cards the bytes that are sent. This rewrites it, and prints what changed:

    JAX_PLATFORMS=cpu PYTHONPATH=.:tests python -m tests.train.step.test_gpu_programs
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import pytest
from paths import ROOT

from models.llama.config import SIZES, LlamaConfig
from train.config.optimizers import OPTIMIZERS
from train.config.resolve import resolve
from train.config.settings import Pretrain
from train.memory.cards import can_compile, find_card
from train.memory.program import count
from train.plan import RECIPES, programs_of

CARDS = ("rtx-3080", "h100")
TABLE = Path(__file__).with_name("gpu_programs.json")
# Large enough that moments are stored in 8 bits.
SIZE = LlamaConfig(width=128, mlp_width=256, layers=2, heads=2, kv_heads=1, max_length=64)
TEN_GB = {k: v for k, v in RECIPES["10 GB card"].items() if k != "rematerialize"}
CASES = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "dora": {"optimizer": "adamw", "adapter": "dora"},
    "low-rank": {"optimizer": "adamw", "adapter": "low-rank"},
    "galore-adamw8bit, layer-wise": {"optimizer": "galore-adamw8bit", "layerwise": True},
    "10 GB card": TEN_GB,
    "4 cards": {"optimizer": "galore-adamw", "mesh": "data=2,fsdp=2"},
    "4 cards, layer-wise": {
        "optimizer": "galore-adamw",
        "mesh": "data=2,fsdp=2",
        "layerwise": True,
    },
}
# Bounds of a count as shares of the table's. XLA's versions differ a little; a program that does
# far less than the table says should have its row rewritten.
LESS, MORE = 0.67, 1.1


def compiled(case: str, card_name: str, folder: Path) -> str:
    """The text of a case's program for a card.

    Kernels of earlier cases are taken from the folder: a compilation takes a few seconds, not 15.
    """
    SIZES["small"] = SIZE
    settings = {"rank": 32} if uses_rank(case) else {}
    config = resolve(
        Pretrain(
            model="small",  # pyrefly: ignore
            dtype="bfloat16",
            batch_size=4,
            accumulate=1,
            seq_len=32,
            steps=4,
            warmup_steps=1,
            learning_rate=0.01,
            **{**settings, **CASES[case]},
        )
    )
    card = find_card(card_name)
    programs = programs_of(config, card)
    lowered = programs.train_step.lower(programs.abstract, programs.batch)
    options = {
        "xla_gpu_kernel_cache_file": str(folder / card_name),
        "xla_gpu_enable_llvm_module_compilation_parallelism": True,  # the cache needs it
    }
    text = lowered.compile(compiler_options=options).as_text()
    assert text is not None
    return text


def pins(text: str) -> dict[str, int]:
    """What the table has of a program, by name."""
    found, refresh = (count(text, 1.0, 1.0, branch) for branch in (min, max))
    sent = {kind: round(size) for kind, (_, size) in found.collectives.items()}
    return {
        "kernels": found.kernels,
        "bytes": round(found.bytes_moved),
        # Of an ordinary step only this has the optimizer: a conditional skips what is not finite.
        "kernels with a refresh": refresh.kernels,
        "bytes with a refresh": round(refresh.bytes_moved),
        **sent,
    }


def uses_rank(case: str) -> bool:
    own = OPTIMIZERS[CASES[case]["optimizer"]]
    return "rank" in own.options or own.adapter is not None or "adapter" in CASES[case]


def traffic(text: str) -> tuple[int, int] | None:
    """Bytes and kernels by the outside check, if it is here."""
    file = ROOT.parent / "shared/tools/hlo_traffic.py"
    if not file.is_file():
        return None
    spec = importlib.util.spec_from_file_location("hlo_traffic", file)
    assert spec is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    moved, kernels = tool.Traffic(text).run()
    return round(moved), kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.skipif(not can_compile(), reason="the extra gpu-target is not installed")
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_does_no_more_than_the_table_says(case, card, folder, optimized):
    text = compiled(case, card, folder)
    assert "__cudnn$fmha" in text
    pinned, done = json.loads(TABLE.read_text())[card][case], pins(text)
    assert traffic(text) in (None, (done["bytes"], done["kernels"]))
    assert done.keys() == pinned.keys()
    for name, value in done.items():
        assert LESS * pinned[name] <= value <= MORE * pinned[name], f"{name}: {value:,}"


def test_the_table_has_every_case():
    assert json.loads(TABLE.read_text()).keys() == set(CARDS)
    assert all(rows.keys() == CASES.keys() for rows in json.loads(TABLE.read_text()).values())


def rewrite() -> None:
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    rows: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for card in CARDS:
            rows[card] = {}
            for case in CASES:
                row = rows[card][case] = pins(compiled(case, card, Path(folder)))
                print(card, case, before.get(card, {}).get(case), "->", row, flush=True)
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    rewrite()
