"""The memory that a run will take, without taking it: `python -m train.plan`."""

import dataclasses
import gc
import json
import math
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from train.config.flags import Optimizer
from train.config.glue import GlueTask, ResolvedFinetune
from train.config.resolve import load, resolve
from train.config.settings import Pretrain, Resolved, ResolvedTraining, flag
from train.config.source import short_name
from train.data.tokenizer import load_tokenizer
from train.memory import glue
from train.memory.cards import EXTRA, Card, can_compile, card_of_size, devices, find_card
from train.memory.fit import FULL, RECIPES, Fit, first_fit, splits
from train.memory.plan import CONTEXT, SIZES, MemoryPlan, compiled_steps, estimate, make_known, plan
from train.memory.program import count, in_words
from train.memory.units import unit_of
from train.run.cli import run
from train.run.directory import check_can_be_written
from train.run.plots import check_picture, plot_plan
from train.step.mesh import make_mesh, parse_mesh
from train.step.programs import Programs, make_programs, model_config, vocabulary_note


@dataclasses.dataclass(frozen=True)
class Plan(Pretrain):
    """Print the device memory that the training step of `train.pretrain` with these flags takes.

    The step is compiled for the GPU of --gpu, else for this machine's; where that is a CPU, a plan
    in bfloat16 is an estimate of what a GPU takes. Flags that change nothing in the step are
    accepted, so that a run's command can be planned as it is.
    """

    task: GlueTask | None = None
    """Task of GLUE: plans its fine-tuning by `train.finetune`, of RoBERTa-base or the encoder in
    --init, for batches of --seq-len tokens, instead of a pre-training."""
    optimizer: Optimizer | None = None  # pyrefly: ignore
    """Optimizer to plan. Default: galore-adamw; with --card the one that gives up least."""
    gpu: str | None = None
    """GPU to compile for, which need not be here: a name such as rtx-4090, or a file with XLA's
    description of one. Needs the extra gpu-target."""

    compare: tuple[str, ...] = ()
    """Other values of --optimizer to plan as well."""
    card: float | None = None
    """Size of a card in GiB: finds how the model can be trained on it, by the method that gives up
    least. All other flags stay; microbatches get smaller. Compiled for the smallest known card that
    is as large, or for that of --gpu."""
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


def programs_of(config: Resolved | ResolvedFinetune, card: Card | None = None) -> Programs:
    """What a run computes with, without its data; for a card, or this machine's devices."""
    number = math.prod(parse_mesh(config.mesh).values())
    mesh = make_mesh(config.mesh, None if card is None else devices(card, number))
    if isinstance(config, ResolvedFinetune):
        return glue.programs_of(config, mesh)
    model = model_config(config, load_tokenizer(config.tokenizer, config.end_token))
    return make_programs(config, model, mesh)


def planned(
    config: Resolved | ResolvedFinetune, card: Card | None = None, dump: str | None = None
) -> tuple[MemoryPlan, dict[str, Any]]:
    """The plan of a step, and what its program does if it is compiled for a card.

    The program's text is written to `dump`. Raises ValueError if it cannot be compiled.
    """
    programs = programs_of(config, card)
    if card is None and _is_estimated(config, programs):
        if dump is not None:
            raise ValueError("--dump with an estimate, in bfloat16 on a CPU: name a GPU with --gpu")
        if isinstance(config, ResolvedFinetune):
            raise ValueError("--task in bfloat16 on a CPU: name a GPU with --gpu")
        return estimate(config, programs), {}
    compiled = _compiled(programs, card)
    # What most steps run: without a refresh.
    one, text = plan(config, programs, compiled), compiled[-1].as_text() or ""
    if dump is not None:
        with open(dump, "x", encoding="utf-8") as file:
            file.write(text)
    if card is None:
        return one, {}
    peak = card.peak_flops(config.dtype)
    done = count(text, card.bandwidth, peak or math.inf).as_json()
    return one, done if peak else {**done, "floor_seconds": None}


def plan_to_fit(
    config: Resolved, programs: Programs, card: Card | None, room: float, near: bool
) -> MemoryPlan:
    """The plan of a step, from the program that refreshes subspaces.

    `near` says that it may not be within `room` bytes. Then the program without a refresh, which
    compiles in half the time and takes about as much, may show that, and else counts, too.
    """
    if card is None and _is_estimated(config, programs):
        return estimate(config, programs)
    whole = dataclasses.replace(programs, step_without_refresh=None)
    lean = programs.step_without_refresh
    compiled = []
    if near and lean is not None:
        compiled = _compiled(dataclasses.replace(whole, train_step=lean), card)
        if (one := plan(config, programs, compiled)).peak > room:
            return one
    return plan(config, programs, compiled + _compiled(whole, card))


def _is_estimated(config: ResolvedTraining, programs: Programs) -> bool:
    return config.dtype == "bfloat16" and programs.mesh.devices.flat[0].platform == "cpu"


def _compiled(programs: Programs, card: Card | None) -> list[jax.stages.Compiled]:
    try:
        return compiled_steps(programs)
    except RuntimeError as error:
        if card is None:
            raise
        raise ValueError(
            f"the step cannot be compiled for {card.kind}: {str(error)[:300]}; {EXTRA}"
        ) from error


def main(config: Plan) -> int:
    """Prints the plan; returns the exit code: 0; 1 if nothing fits the card."""
    _check_files(config)
    if config.card is not None:
        return _for_card(config, config.card)
    card = None if config.gpu is None else find_card(config.gpu)
    names = dict.fromkeys((config.optimizer or Pretrain.optimizer, *config.compare))
    resolved = _resolved if config.task is None else _fine_tuning
    settings = {name: resolved(config, optimizer=name) for name in names}
    first = next(iter(settings.values()))
    found = {name: planned(one, card, config.dump) for name, one in settings.items()}
    plans = {name: one for name, (one, _) in found.items()}
    if config.plot is not None:
        sizes = {name: one.parts() for name, one in plans.items()}
        plot_plan(sizes, Path(config.plot), _title(first))
    if config.json:
        texts = {name: {**one.as_json(), **does} for name, (one, does) in found.items()}
        print(json.dumps(texts if len(texts) > 1 else next(iter(texts.values())), indent=1))
    else:
        print_plans(first, _name(first), plans)
        for name, (_, does) in found.items():
            if does:
                print(f"{name}: {in_words(does)}")
    return 0


def _check_files(config: Plan) -> None:
    """Raises ValueError unless the files can be written when the steps are compiled."""
    if config.plot is not None:
        check_picture(config.plot, "--plot")
        check_can_be_written(Path(config.plot), "--plot")
    if config.dump is None:
        return
    if config.compare or config.card is not None:
        raise ValueError("--dump writes one program: leave out --compare and --card")
    path = Path(config.dump)
    if path.exists() or path.is_symlink():
        raise ValueError(f"--dump {config.dump!r} is there already: choose another name")
    check_can_be_written(path, "--dump")


def print_plans(
    config: Resolved | ResolvedFinetune, title: str, plans: Mapping[str, MemoryPlan]
) -> None:
    """Prints a table with a row for each plan."""
    from rich.console import Console
    from rich.table import Table

    compiled_for = next(iter(plans.values())).device
    unit, size_of_unit = unit_of(max(one.peak for one in plans.values()))
    print(f"{title}: memory of one device ({compiled_for}), {unit}")  # a Table's would be wrapped
    table = Table()
    table.add_column("", no_wrap=True)
    names = "weights", "bases", "moments", "grads", "acts", "temps", "peak", "card, GiB"
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in plans.items():
        bases, moments = one.states["projections"], one.states["moments"]
        rest = one.temporaries + one.batch + one.states["counters"]
        sizes = one.weights, bases, moments, one.gradients, one.activations, rest, one.peak
        card = next((str(size) for size in SIZES if one.fits(size)), "none")
        table.add_row(name, *(f"{size / size_of_unit:,.3f}" for size in sizes), card)
    Console(width=max(Console().width, 105)).print(table)  # no number is truncated
    if isinstance(config, Resolved):
        tokenizer = load_tokenizer(config.tokenizer, config.end_token)
        if note := vocabulary_note(model_config(config, tokenizer), tokenizer):
            print(note)
    if any(one.estimate for one in plans.values()):
        print(ESTIMATE)


def _name(config: Resolved | ResolvedFinetune) -> str:
    if isinstance(config, ResolvedFinetune):
        return f"{glue.encoder(config.init)[1]} on {config.task}"
    return short_name(config.model)


def _title(config: Resolved | ResolvedFinetune) -> str:
    """The title of a picture, with the sizes of a step."""
    parts = f" in {config.accumulate} microbatches" if config.accumulate > 1 else ""
    batch = f"batch {config.batch_size} x {config.seq_len} tokens{parts}"
    return f"{_name(config)}, {batch}: memory of one device"


def _resolved(config: Plan, **changes: Any) -> Resolved:
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(Pretrain)}
    return resolve(Pretrain(**{**own, **changes}))


def _fine_tuning(config: Plan, **changes: Any) -> ResolvedFinetune:
    names = ["task", *(f.name for f in dataclasses.fields(Pretrain))]
    return glue.settings({**{name: getattr(config, name) for name in names}, **changes})


def _for_card(config: Plan, size: float) -> int:
    """Prints the first recipe that fits the card; returns 1 if none has the optimizer asked for."""
    if not (math.isfinite(size) and size > 0):
        raise ValueError(f"--card {size:g}: expected the size of a card in GiB, such as 12")
    for name in ("compare", "task"):
        if getattr(config, name):
            raise ValueError(f"--card finds one plan of a pre-training: leave out {flag(name)}")
    gpu = None
    if config.gpu is not None:
        gpu = find_card(config.gpu)
    elif can_compile():
        gpu = card_of_size(size)
    found = _search(config, size, gpu, config.optimizer)
    other = found is None and config.optimizer is not None
    if other:
        said = f"--optimizer {config.optimizer} does not fit {size:g} GiB"
        print(f"{said}; looking for another one", file=sys.stderr, flush=True)
        found = _search(config, size, gpu, None)
    if found is None:
        return 1
    name, method, (resolved, one) = found
    command = _command(config, method, resolved)
    model = short_name(resolved.model)
    if config.plot is not None:
        plot_plan({resolved.optimizer: one.parts()}, Path(config.plot), _title(resolved))
    if config.json:
        said = {"recipe": name, "command": command, "as_asked": not other}
        print(json.dumps({**said, **one.as_json()}, indent=1))
    else:
        print_plans(resolved, f"{model} by the recipe {name!r}", {resolved.optimizer: one})
        if other:
            print(f"--optimizer {config.optimizer} does not fit; this does:")
        print(command)
    return 1 if other else 0


def _search(
    config: Plan, size: float, gpu: Card | None, optimizer: str | None
) -> tuple[str, dict[str, Any], Fit] | None:
    """The name and settings of the first recipe that fits, and its plan.

    What the user set stays; recipes that it contradicts are left out. Only `optimizer` is tried, if
    given.
    """
    methods: dict[str, dict[str, Any]] = {}
    errors: list[ValueError] = []
    for name, recipe in RECIPES.items():
        own = {k: v for k in recipe if (v := getattr(config, k)) != getattr(Plan, k)}
        own = {**recipe, **own, "optimizer": optimizer or recipe["optimizer"]}
        if own in methods.values() or (optimizer is None and own["optimizer"] == config.optimizer):
            continue  # the latter has been tried
        try:
            _resolved(config, **own)
        except ValueError as error:
            errors.append(error)
        else:
            methods[name if own == recipe else shlex.join(_flags(own))] = own
    if not methods and errors:
        raise errors[0]
    for name, own in methods.items():
        if (found := _fit(config, own, size, gpu)) is not None:
            return name, own, found
        print(f"{name}: does not fit {size:g} GiB", file=sys.stderr, flush=True)
    return None


def _fit(config: Plan, method: Mapping[str, Any], size: float, gpu: Card | None) -> Fit | None:
    """The method's settings that fit, of the batch asked for or the largest below the default."""
    batch = _resolved(config, **method).batch_size
    axes = parse_mesh(config.mesh)
    shards = axes.get("data", 1) * axes.get("fsdp", 1)
    pairs = splits(batch, config.accumulate, shards, config.batch_size is not None)
    tried = [_resolved(config, **method, batch_size=b, accumulate=a) for b, a in pairs]
    smallest = tried[-1] if tried else _resolved(config, **method)
    programs = programs_of(smallest, gpu)  # refused if no batch can be split as asked
    known, room = make_known(smallest, programs), size * 2**30 - CONTEXT

    def planned(one: Resolved) -> MemoryPlan:
        own = programs if one == smallest else programs_of(one, gpu)
        return plan_to_fit(one, own, gpu, room, near=known(one) > FULL * room)

    return first_fit(tried, room, known, planned)


def _command(config: Plan, method: Mapping[str, Any], found: Resolved) -> str:
    """The command that trains by the method, with all else that the user set."""
    base = load(config.config) if config.config else Pretrain()
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(Pretrain)}
    said = {name: value for name, value in own.items() if value != getattr(base, name)}
    sizes = {"batch_size": found.batch_size, "accumulate": found.accumulate}
    return f"python -m train.pretrain {shlex.join(_flags({**said, **method, **sizes}))}"


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield flag(name)
        if value is not True:
            yield str(value)


def load_plan(path: str) -> Plan:
    """Reads a run's config.json as the settings of a plan."""
    return Plan(**vars(load(path)))


if __name__ == "__main__":
    gc.disable()  # tracing makes no cycles to speak of, and looking for them takes a fifth of it
    # Python would hear Ctrl-C only after a compilation, and there is nothing to save.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run(main, Plan, "python -m train.plan", load=load_plan)
