"""How much memory a run will take, without taking it: `python -m train.plan`."""

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from train.assemble import Programs, make_programs, model_config
from train.cli import run
from train.config import Pretrain, Resolved, flag, load, resolve
from train.memory_plan import CARDS, CONTEXT, MemoryPlan, held, plan
from train.mesh import make_mesh
from train.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Plan(Pretrain):
    """Say what the training step of `train.pretrain` with these flags will take of a device.

    On a CPU a step in bfloat16 is planned as a GPU runs it, any other as this machine does. Flags
    that change nothing in the step are those of the run to be planned.
    """

    compare: tuple[str, ...] = ()
    """Other values of --optimizer, to stand beside it."""
    card: float | None = None
    """Size of a card in GiB: finds how the model can be trained on it, the method that gives up
    least first, and the largest batch for that."""
    json: bool = False
    """Print the plan as JSON."""
    plot: str | None = None
    """File for a picture of the plan, such as plan.png."""


# Ways to train a model, the one that gives up least first. Each takes less than the one before.
_LAYERWISE = {"layerwise": True, "rematerialize": True}
_Q_GALORE = {"optimizer": "q-galore-adamw8bit", **_LAYERWISE}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "AdamW, checkpointing": {"optimizer": "adamw", "rematerialize": True},
    "GaLore": {"optimizer": "galore-adamw", "rematerialize": True},
    "layer-wise GaLore": {"optimizer": "galore-adamw", **_LAYERWISE},
    "8-bit GaLore": {"optimizer": "galore-adamw8bit", **_LAYERWISE},
    "Q-GaLore": _Q_GALORE,
    "12 GB card": {**_Q_GALORE, "moment_bits": 4},
    "10 GB card": {**_Q_GALORE, "moment_bits": 4, "side": "larger", "embedding_bits": 8},
}


def programs_of(config: Resolved) -> Programs:
    """What a run computes with, without its data."""
    model = model_config(config, load_tokenizer(config.tokenizer))
    return make_programs(config, model, make_mesh(config.mesh), lambda _: None)


def main(config: Plan) -> int:
    """Prints the plan.

    Returns:
        The exit code: 0; 1 where nothing fits the card.

    Raises:
        ValueError: for wrong use.
    """
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(Pretrain)}
    if config.card is not None:
        return _for_card(config, Pretrain(**own))
    plans = {}
    for name in dict.fromkeys((config.optimizer, *config.compare)):
        resolved = resolve(Pretrain(**{**own, "optimizer": name}))
        plans[name] = plan(resolved, programs_of(resolved))
    _show(config, plans)
    return 0


def _show(config: Plan, plans: Mapping[str, MemoryPlan]) -> None:
    if config.plot is not None:
        from train.plots import plot_plan

        plot_plan({name: parts(one) for name, one in plans.items()}, config.plot, config.model)
    if config.json:
        found = {name: one.as_json() for name, one in plans.items()}
        print(json.dumps(found if len(found) > 1 else next(iter(found.values())), indent=1))
        return
    print_plans(config.model, plans)


def parts(one: MemoryPlan) -> dict[str, int]:
    """A plan's summands by name, in bytes."""
    return {
        "weights": one.weights,
        **one.states,
        "gradients": one.gradients,
        "activations": one.activations,
        "temporaries": one.temporaries,
        "batch": one.batch,
    }


def print_plans(title: str, plans: Mapping[str, MemoryPlan]) -> None:
    """A table with a column for each plan."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: memory of one device, GB")
    table.add_column("")
    for name in plans:
        table.add_column(name, justify="right")
    for name in parts(next(iter(plans.values()))):
        table.add_row(name, *(f"{parts(one)[name] / 1e9:,.3f}" for one in plans.values()))
    table.add_section()
    table.add_row("peak", *(f"{one.peak / 1e9:,.3f}" for one in plans.values()))
    fits = [[str(card) for card in CARDS if one.fits(card)] for one in plans.values()]
    table.add_row("cards, GiB", *(", ".join(cards) or "none" for cards in fits))
    Console().print(table)


def _for_card(config: Plan, given: Pretrain) -> int:
    """Prints the first recipe that fits the card, with its largest batch."""
    assert config.card is not None
    for name, recipe in RECIPES.items():
        asked = {
            k: v for k, v in recipe.items() if getattr(given, k) in (None, False, "galore-adamw")
        }
        base = dataclasses.replace(given, **asked, batch_size=1, accumulate=1)
        found = _largest(base, config.card)
        if found is None:
            print(f"{name}: does not fit {config.card:g} GiB", flush=True)
            continue
        resolved, one = found
        print_plans(f"{config.model} by the recipe {name!r}", {resolved.optimizer: one})
        words = {"model": config.model, **asked, "batch_size": resolved.batch_size, "accumulate": 1}
        print("python -m train.pretrain " + shlex.join(_flags(words)))
        return 0
    return 1


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield flag(name)
        if value is not True:
            yield str(value)


def _largest(base: Pretrain, card: float) -> tuple[Resolved, MemoryPlan] | None:
    """The plan with the largest batch that fits; None where not one sequence does."""

    def planned(batch_size: int) -> tuple[Resolved, MemoryPlan]:
        resolved = resolve(dataclasses.replace(base, batch_size=batch_size))
        return resolved, plan(resolved, programs_of(resolved))

    room = card * 2**30 - CONTEXT
    resolved = resolve(base)
    weights, states = held(programs_of(resolved))
    if weights + sum(states.values()) > room:
        return None
    best = planned(1)
    if best[1].peak > room:
        return None
    # What a sequence takes hardly changes with their number: three compilations, not ten.
    several = planned(8)
    each = max(1, (several[1].peak - best[1].peak) / 7)
    guess = int(1 + (room - best[1].peak) // each)
    while guess > 1:
        found = several if guess == 8 else planned(guess)
        if found[1].peak <= room:
            return found
        guess = min(guess - 1, int(guess * 0.95))
    return best


if __name__ == "__main__":
    run(main, Plan, "python -m train.plan", load=load)
