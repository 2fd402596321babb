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
from train.config.source import short_name
from train.data.tokenizer import load_tokenizer
from train.memory.cards import EXTRA, Card, can_compile, card_of_size, devices, find_card
from train.memory.plan import CONTEXT, SIZES, MemoryPlan, compiled_steps, estimate, plan, stored
from train.memory.program import count
from train.run.cli import run
from train.run.plots import plot_plan
from train.step.mesh import make_mesh, parse_mesh
from train.step.programs import Programs, make_programs, model_config


@dataclasses.dataclass(frozen=True)
class Plan(Pretrain):
    """Print the device memory that the training step of `train.pretrain` with these flags takes.

    The step is compiled for the GPU of --gpu, else for this machine's; where that is a CPU, a plan
    in bfloat16 is an estimate of what a GPU takes. Flags that change nothing in the step are
    accepted, so that a run's command can be planned as it is.
    """

    gpu: str | None = None
    """GPU to compile for, which need not be here: a name such as rtx-4090, or a file with XLA's
    description of one. Needs the extra gpu-target."""

    compare: tuple[str, ...] = ()
    """Other values of --optimizer to plan as well."""
    card: float | None = None
    """Size of a card in GiB: finds how the model can be trained on it, by the method that gives up
    least, and the largest batch for that. Compiled for the smallest known card that is as large,
    or for that of --gpu."""
    json: bool = False
    """Print the plan as JSON; with --gpu also what the compiled program does."""
    dump: str | None = None
    """File for the text of the compiled program; it must not exist yet."""
    plot: str | None = None
    """File for a picture of the plan, such as plan.png."""


ESTIMATE = (
    "an estimate, by the compiler for this machine's CPU: --gpu NAME has the GPU's own compiler "
    "plan the step"
)

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


def programs_of(config: Resolved, card: Card | None = None) -> Programs:
    """What a run computes with, without its data; for a card, or this machine's devices."""
    model = model_config(config, load_tokenizer(config.tokenizer, config.end_token))
    number = math.prod(parse_mesh(config.mesh).values())
    there = None if card is None else devices(card, number)
    return make_programs(config, model, make_mesh(config.mesh, there))


def planned(
    config: Resolved, card: Card | None = None, dump: str | None = None
) -> tuple[MemoryPlan, dict[str, Any]]:
    """The plan of a step, and what its program does if it is compiled for a card.

    The program's text is written to `dump`. Raises ValueError if it cannot be compiled.
    """
    programs = programs_of(config, card)
    if card is None and config.dtype == "bfloat16" and _on_a_cpu(programs):
        if dump is not None:
            raise ValueError("--dump with an estimate, in bfloat16 on a CPU: name a GPU with --gpu")
        return estimate(config, programs), {}
    try:
        compiled = compiled_steps(programs)
    except RuntimeError as error:
        if card is None:
            raise
        raise ValueError(
            f"the step cannot be compiled for {card.kind}: {str(error)[:300]}; {EXTRA}"
        ) from error
    # What most steps run: without a refresh.
    one, text = plan(config, programs, compiled), compiled[-1].as_text() or ""
    if dump is not None:
        with open(dump, "x") as file:
            file.write(text)
    if card is None:
        return one, {}
    peak = card.peak_flops(config.dtype)
    done = count(text, card.bandwidth, peak or math.inf).as_json()
    return one, done if peak else {**done, "floor_seconds": None}


def main(config: Plan) -> int:
    """Prints the plan; returns the exit code: 0; 1 if nothing fits the card."""
    if config.dump is not None:
        _check_dump(config)
    if config.card is not None:
        return _for_card(config, config.card)
    card = None if config.gpu is None else find_card(config.gpu)
    names = dict.fromkeys((config.optimizer, *config.compare))
    settings = {name: _resolved(config, optimizer=name) for name in names}
    name = short_name(settings[config.optimizer].model)
    found = {name: planned(one, card, config.dump) for name, one in settings.items()}
    plans = {name: one for name, (one, _) in found.items()}
    if config.plot is not None:
        sizes = {name: one.parts() for name, one in plans.items()}
        plot_plan(sizes, Path(config.plot), f"{name}: memory of one device")
    if config.json:
        texts = {name: {**one.as_json(), **does} for name, (one, does) in found.items()}
        print(json.dumps(texts if len(texts) > 1 else next(iter(texts.values())), indent=1))
    else:
        print_plans(name, plans)
        for name, (_, does) in found.items():
            if does:
                print(f"{name}: {_in_words(does)}")
    return 0


def _check_dump(config: Plan) -> None:
    """Raises ValueError unless the file can be written when the program is compiled."""
    assert config.dump is not None
    if config.compare or config.card is not None:
        raise ValueError("--dump writes one program: leave out --compare and --card")
    path = Path(config.dump)
    if path.exists() or path.is_symlink():
        raise ValueError(f"--dump {config.dump!r} is there already: choose another name")
    if not path.parent.is_dir():
        raise ValueError(f"--dump {config.dump!r}: there is no folder {str(path.parent)!r}")


def _on_a_cpu(programs: Programs) -> bool:
    return programs.mesh.devices.flat[0].platform == "cpu"


def _in_words(does: Mapping[str, Any]) -> str:
    """What a program does, in a line."""
    least = does["floor_seconds"]
    sent = (
        f"{kind} {x['count']:,} ({x['bytes'] / 1e9:,.3f} GB)"
        for kind, x in does["collectives"].items()
    )
    return ", ".join(
        (
            f"{does['kernels']:,} kernels",
            f"{does['bytes_moved'] / 1e9:,.1f} GB moved",
            f"{does['products_flops'] / 1e12:,.2f} TFLOP of products",
            "least time unknown" if least is None else f"at least {least * 1e3:,.1f} ms",
            *sent,
        )
    )


def print_plans(title: str, plans: Mapping[str, MemoryPlan]) -> None:
    """Prints a table with a row for each plan."""
    from rich.console import Console
    from rich.table import Table

    compiled_for = next(iter(plans.values())).device
    table = Table(title=f"{title}: memory of one device ({compiled_for}), GB")
    table.add_column("", no_wrap=True)
    for name in ("weights", "bases", "moments", "grads", "acts", "temps", "peak", "GiB card"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in plans.items():
        bases, moments = one.states["projections"], one.states["moments"]
        rest = one.temporaries + one.batch + one.states["counters"]
        sizes = one.weights, bases, moments, one.gradients, one.activations, rest, one.peak
        card = next((str(size) for size in SIZES if one.fits(size)), "none")
        table.add_row(name, *(f"{size / 1e9:,.3f}" for size in sizes), card)
    Console(width=max(Console().width, 105)).print(table)  # no number is truncated
    if any(one.estimate for one in plans.values()):
        print(ESTIMATE)


def _resolved(config: Plan, **changes: Any) -> Resolved:
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(Pretrain)}
    return resolve(Pretrain(**{**own, **changes}))


def _for_card(config: Plan, size: float) -> int:
    """Prints the first recipe that fits the card, with its largest batch."""
    if not (math.isfinite(size) and size > 0):
        raise ValueError(f"--card {size:g}: expected the size of a card in GiB, such as 12")
    if config.compare or config.plot:
        raise ValueError("--card finds one plan: leave out --compare and --plot")
    for name in sorted({key for recipe in RECIPES.values() for key in recipe}):
        if getattr(config, name) != getattr(Plan, name):
            raise ValueError(f"{flag(name)} with --card, which chooses it: leave out one of them")
    gpu = None
    if config.gpu is not None:
        gpu = find_card(config.gpu)
    elif can_compile():
        gpu = card_of_size(size)
    for name, recipe in RECIPES.items():
        found = _largest(config, recipe, size, gpu)
        if found is None:
            print(f"{name}: does not fit {size:g} GiB", file=sys.stderr, flush=True)
            continue
        resolved, one = found
        chosen = {"model": resolved.model, **recipe, "batch_size": resolved.batch_size}
        if resolved.init is not None:
            chosen["init"] = resolved.init
        command = "python -m train.pretrain " + shlex.join(_flags({**chosen, "accumulate": 1}))
        if config.json:
            print(json.dumps({"recipe": name, "command": command, **one.as_json()}, indent=1))
        else:
            print_plans(
                f"{short_name(resolved.model)} by the recipe {name!r}", {resolved.optimizer: one}
            )
            print(command)
        return 0
    return 1


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield flag(name)
        if value is not True:
            yield str(value)


def _largest(
    config: Plan, recipe: Mapping[str, Any], size: float, gpu: Card | None
) -> tuple[Resolved, MemoryPlan] | None:
    """The plan with the largest batch that fits; None if a single sequence does not."""

    def asked(batch_size: int) -> Resolved:
        return _resolved(config, **recipe, batch_size=batch_size, accumulate=1)

    def with_batch(batch_size: int) -> tuple[Resolved, MemoryPlan]:
        resolved = asked(batch_size)
        return resolved, planned(resolved, gpu)[0]

    room = size * 2**30 - CONTEXT
    weights, states = stored(programs_of(asked(1), gpu))
    if weights + sum(states.values()) > room:
        return None
    best = with_batch(1)
    if best[1].peak > room:
        return None
    # A sequence takes nearly the same in a batch of any size: about three compilations, not ten.
    guess, found, first = 8, with_batch(8), True
    while True:
        each = max(1, (found[1].peak - best[1].peak) / (guess - 1))
        most = int(1 + (room - best[1].peak) // each)
        fits = found[1].peak <= room
        if fits and (most <= guess or not first):
            return found
        guess, first = most if fits else min(most, guess - 1), False
        if guess <= 1:
            return best
        found = with_batch(guess)


def load_plan(path: str) -> Plan:
    """Reads a run's config.json as the settings of a plan."""
    return Plan(**vars(load(path)))


if __name__ == "__main__":
    run(main, Plan, "python -m train.plan", load=load_plan)
