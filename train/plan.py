"""The memory that a run will take, without taking it: `python -m train.plan`."""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.config.resolve import load, resolve
from train.config.settings import Pretrain, Resolved, flag
from train.data.tokenizer import load_tokenizer
from train.memory.plan import CARDS, CONTEXT, MemoryPlan, plan, stored
from train.run.cli import run
from train.run.plots import plot_plan
from train.step.mesh import make_mesh
from train.step.programs import Programs, make_programs, model_config


@dataclasses.dataclass(frozen=True)
class Plan(Pretrain):
    """Print the device memory that the training step of `train.pretrain` with these flags takes.

    On a CPU a step in bfloat16 is planned as a GPU runs it, any other as this machine does. Flags
    that change nothing in the step are accepted, so that a run's command can be planned as it is.
    """

    compare: tuple[str, ...] = ()
    """Other values of --optimizer to plan as well."""
    card: float | None = None
    """Size of a card in GiB: finds how the model can be trained on it, by the method that gives up
    least, and the largest batch for that."""
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
    return make_programs(config, model, make_mesh(config.mesh))


def main(config: Plan) -> int:
    """Prints the plan; returns the exit code: 0; 1 if nothing fits the card."""
    if config.card is not None:
        return _for_card(config, config.card)
    names = dict.fromkeys((config.optimizer, *config.compare))
    settings = {name: _resolved(config, optimizer=name) for name in names}
    plans = {name: plan(one, programs_of(one)) for name, one in settings.items()}
    if config.plot is not None:
        sizes = {name: one.parts() for name, one in plans.items()}
        plot_plan(sizes, Path(config.plot), f"{config.model}: memory of one device")
    if config.json:
        found = {name: one.as_json() for name, one in plans.items()}
        print(json.dumps(found if len(found) > 1 else next(iter(found.values())), indent=1))
    else:
        print_plans(config.model, plans)
    return 0


def print_plans(title: str, plans: Mapping[str, MemoryPlan]) -> None:
    """Prints a table with a row for each plan."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: memory of one device, GB")
    table.add_column("", no_wrap=True)
    for name in ("weights", "bases", "moments", "grads", "acts", "temps", "peak", "GiB card"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in plans.items():
        bases, moments = one.states["projections"], one.states["moments"]
        rest = one.temporaries + one.batch + one.states["counters"]
        sizes = one.weights, bases, moments, one.gradients, one.activations, rest, one.peak
        card = next((str(card) for card in CARDS if one.fits(card)), "none")
        table.add_row(name, *(f"{size / 1e9:,.3f}" for size in sizes), card)
    Console(width=max(Console().width, 105)).print(table)  # no number is truncated


def _resolved(config: Plan, **changes: Any) -> Resolved:
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(Pretrain)}
    return resolve(Pretrain(**{**own, **changes}))


def _for_card(config: Plan, card: float) -> int:
    """Prints the first recipe that fits the card, with its largest batch."""
    if not (math.isfinite(card) and card > 0):
        raise ValueError(f"--card {card:g}: expected the size of a card in GiB, such as 12")
    if config.compare or config.plot:
        raise ValueError("--card finds one plan: leave out --compare and --plot")
    for name in sorted({key for recipe in RECIPES.values() for key in recipe}):
        if getattr(config, name) != getattr(Plan, name):
            raise ValueError(f"{flag(name)} with --card, which chooses it: leave out one of them")
    for name, recipe in RECIPES.items():
        found = _largest(config, recipe, card)
        if found is None:
            print(f"{name}: does not fit {card:g} GiB", file=sys.stderr, flush=True)
            continue
        resolved, one = found
        chosen = {"model": config.model, **recipe, "batch_size": resolved.batch_size}
        command = "python -m train.pretrain " + shlex.join(_flags({**chosen, "accumulate": 1}))
        if config.json:
            print(json.dumps({"recipe": name, "command": command, **one.as_json()}, indent=1))
        else:
            print_plans(f"{config.model} by the recipe {name!r}", {resolved.optimizer: one})
            print(command)
        return 0
    return 1


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield flag(name)
        if value is not True:
            yield str(value)


def _largest(
    config: Plan, recipe: Mapping[str, Any], card: float
) -> tuple[Resolved, MemoryPlan] | None:
    """The plan with the largest batch that fits; None if a single sequence does not."""

    def asked(batch_size: int) -> Resolved:
        return _resolved(config, **recipe, batch_size=batch_size, accumulate=1)

    def planned(batch_size: int) -> tuple[Resolved, MemoryPlan]:
        resolved = asked(batch_size)
        return resolved, plan(resolved, programs_of(resolved))

    room = card * 2**30 - CONTEXT
    weights, states = stored(programs_of(asked(1)))
    if weights + sum(states.values()) > room:
        return None
    best = planned(1)
    if best[1].peak > room:
        return None
    # A sequence takes nearly the same in a batch of any size: about three compilations, not ten.
    guess, found, first = 8, planned(8), True
    while True:
        each = max(1, (found[1].peak - best[1].peak) / (guess - 1))
        most = int(1 + (room - best[1].peak) // each)
        fits = found[1].peak <= room
        if fits and (most <= guess or not first):
            return found
        guess, first = most if fits else min(most, guess - 1), False
        if guess <= 1:
            return best
        found = planned(guess)


def load_plan(path: str) -> Plan:
    """Reads a run's config.json as the settings of a plan."""
    return Plan(**vars(load(path)))


if __name__ == "__main__":
    run(main, Plan, "python -m train.plan", load=load_plan)
