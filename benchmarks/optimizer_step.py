"""An optimizer step alone: ours, `optax.contrib.galore` and `optax.adamw`, in turns in one run.

    python -m benchmarks.optimizer_step --model llama-60m
    python -m benchmarks.optimizer_step --model llama-7b --one-leaf-at-a-time --dtype bfloat16

On the projected matrices of a LLaMA: stacked over the layers as the model has them, and as separate
leaves, since `optax.contrib.galore` refuses stacked ones. A step is `update` and `apply_updates`,
jitted, with params and state donated; with `--update-only` it is `update` alone, nothing donated.
Needs jax, flax and optax alone; runs on a CPU or a GPU.
"""

import argparse
import ast
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from galore_optax import GaLoreDimensionNumbers, galore
from models.llama.config import SIZES, weight_table
from train.config.defaults import DEFAULTS

PARTS = ("ordinary", "refresh", "energy", "memory", "compilations", "int4")
OURS, SEPARATE = "galore-optax, stacked", "galore-optax, separate"
PEER, ADAMW = "optax.contrib.galore, separate", "optax.adamw, stacked"
ADAMW_SEPARATE = "optax.adamw, separate"
NEVER = 1_000_000  # a gap: after the first step no refresh is due
Tree = Any  # of arrays; a dict from names to stacks or matrices
Shapes = dict[str, tuple[int, ...]]


# What is stepped: gradients, and the sides.


def projected_shapes(model: str, layers: int | None) -> Shapes:
    """Shape (layers, in, out) of each stack of matrices that GaLore projects."""
    table = weight_table(SIZES[model])["layers"]
    stacks = {**table["attention"], **table["mlp"]}
    return {name: (layers or w.shape[0], *w.shape[1:]) for name, w in stacks.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def power_law_gradient(shape: tuple[int, ...], decay: float, dtype: str, key: jax.Array):
    """A stack of gradients A diag(1, 2^-decay, 3^-decay, ...) B, with A and B Gaussian."""
    layers, n, m = shape
    k = min(n, m)

    def one(key: jax.Array) -> jax.Array:
        left, right = jax.random.split(key)
        weights = jnp.arange(1, k + 1, dtype=jnp.float32) ** -decay
        a = jax.random.normal(left, (n, k)) * weights
        return (a @ jax.random.normal(right, (k, m)) * 1e-3).astype(dtype)

    return jax.lax.map(one, jax.random.split(key, layers))


def gradients(args: argparse.Namespace, shapes: Shapes, seed: int) -> Tree:
    """Recorded gradients cast to `--dtype`, or power-law ones of these shapes."""
    if args.gradients:
        recorded = np.load(args.gradients[min(seed, len(args.gradients) - 1)])
        return {name: jnp.asarray(recorded[name], args.dtype) for name in shapes}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: power_law_gradient(shape, args.decay, args.dtype, key)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def separate(stacks: Tree) -> Tree:
    """Splits each stack into a leaf per matrix."""
    return {
        f"{name}{i}": matrix for name, stack in stacks.items() for i, matrix in enumerate(stack)
    }


def form(side: str, stacks: Tree) -> Tree:
    """The matrices as this side takes them."""
    return stacks if side.endswith("stacked") else separate(stacks)


def transformation(
    side: str, args: argparse.Namespace, gap: int, inner: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """A side's optimizer with AdamW's rule; with `inner`, GaLore around it at scale 1."""
    rate, decay = 1e-3, args.weight_decay
    if side.startswith("optax.adamw"):
        return optax.adamw(rate, weight_decay=decay)
    if side == PEER:
        if inner is not None:
            return optax.contrib.scale_by_galore(args.rank, gap, 1.0, inner)
        return optax.contrib.galore(rate, args.rank, gap, weight_decay=decay)
    axes = GaLoreDimensionNumbers(1, 2) if side == OURS else None
    options: dict[str, Any] = {
        "update_proj_gap": gap,
        "weight_dimension_numbers": axes,
        **args.galore,
    }
    if inner is not None:
        options["scale"] = 1.0
        return galore(args.rank, inner, **options)
    return galore(args.rank, optax.adamw(rate, weight_decay=decay), **options)


Seconds = np.ndarray  # on the clock, and of CPU time, which other processes disturb less
Step = Callable[[Tree, Any, Tree], tuple[Tree, Any]]  # from params, state and gradients


def compiled_step(tx: optax.GradientTransformation, update_only: bool = False) -> Any:
    """`update` and `apply_updates`, params and state overwritten; or `update` alone.

    In the second case the updates take the place of the new params, also in the next step.
    """
    if update_only:
        return jax.jit(lambda params, state, grads: tx.update(grads, state, params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def without_conditional(step: Step, state: Any, update_only: bool) -> Step:
    """The step with the state's integers as constants: XLA then drops what is not due."""
    leaves, tree = jax.tree.flatten(state)
    known = [np.asarray(x) if x.dtype == jnp.int32 else None for x in leaves]

    @functools.partial(jax.jit, donate_argnums=() if update_only else (0, 1))
    def frozen(params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        pairs = zip(jax.tree.leaves(state), known, strict=True)
        return step(params, tree.unflatten([x if k is None else k for x, k in pairs]), grads)

    return frozen


# What is measured.


class Turns:
    """Steps of several sides, taken in turns and timed, each on its own params and state."""

    def __init__(self) -> None:
        self.steps: dict[str, Callable[[], Any]] = {}

    def add(self, side: str, step: Step, start: tuple[Tree, Any], grads: Tree) -> None:
        """One more side, with its params and state at the start."""
        params, state = start

        def once() -> None:
            nonlocal params, state
            params, state = step(params, state, grads)
            jax.block_until_ready((params, state))

        self.steps[side] = once

    def run(self, rounds: int, warm_up: int) -> dict[str, Seconds]:
        """Median seconds of each side, on the clock and of this process's CPU time."""
        seconds: dict[str, list[Seconds]] = {side: [] for side in self.steps}
        for turn in range(-warm_up, rounds):
            for side, step in self.steps.items():
                start = np.array([time.perf_counter(), time.process_time()])
                step()
                if turn >= 0:
                    end = np.array([time.perf_counter(), time.process_time()])
                    seconds[side].append(end - start)
        return {side: np.median(taken, axis=0) for side, taken in seconds.items()}


def zeros_and_state(tx: optax.GradientTransformation, grads: Tree) -> tuple[Tree, Any]:
    """Params of zeros, and the state for them."""
    params = jax.tree.map(jnp.zeros_like, grads)
    return params, jax.jit(tx.init)(params)


def ordinary(args: argparse.Namespace, stacks: Tree) -> dict[str, Seconds]:
    """Median seconds of a step without a refresh."""
    turns = Turns()
    for side in (OURS, SEPARATE, PEER, ADAMW, ADAMW_SEPARATE):
        tx, grads = transformation(side, args, NEVER), form(side, stacks)
        step = compiled_step(tx, args.update_only)
        params, state = step(*zeros_and_state(tx, grads), grads)  # with the first refresh
        turns.add(side, step, (params, state), grads)
        if side == OURS:
            copies = jax.tree.map(jnp.copy, (params, state))
            frozen = without_conditional(step, state, args.update_only)
            turns.add(f"{OURS}, no conditional", frozen, copies, grads)
    return turns.run(args.rounds, warm_up=3)


def refresh(args: argparse.Namespace, stacks: Tree) -> dict[str, Seconds]:
    """Median seconds of a step that refreshes every subspace."""
    turns = Turns()
    for side in (OURS, SEPARATE, PEER):
        tx, grads = transformation(side, args, 1), form(side, stacks)
        turns.add(side, compiled_step(tx, args.update_only), zeros_and_state(tx, grads), grads)
    return turns.run(args.refresh_rounds, warm_up=1)


def kept_energy(args: argparse.Namespace, side: str, batches: list[Tree]) -> list[np.ndarray]:
    """‖PPᵀG‖²/‖G‖² of each matrix, after a refresh on each of the gradients in turn.

    With the identity as the inner transformation the update is PPᵀG, whatever the side.
    """
    tx = transformation(side, args, 1, optax.identity())
    update, found = jax.jit(tx.update), []
    state = None
    for stacks in batches:
        grads = form(side, stacks)
        params = jax.tree.map(jnp.zeros_like, grads)
        state = tx.init(params) if state is None else state
        updates, state = update(grads, state, params)

        def energy(x: jax.Array) -> np.ndarray:
            return np.square(np.asarray(x, np.float64)).sum((-2, -1)).ravel()

        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True)
        found.append(np.concatenate([energy(u) / energy(g) for u, g in pairs]))
    return found


def compiled(args: argparse.Namespace, side: str, shapes: Shapes) -> tuple[Any, float]:
    """A side's compiled step and the seconds that XLA took for it; nothing is allocated."""
    stacks = {name: jax.ShapeDtypeStruct(s, jnp.dtype(args.dtype)) for name, s in shapes.items()}
    params = stacks if side.endswith("stacked") else jax.eval_shape(separate, stacks)
    tx = transformation(side, args, 200)
    state = jax.eval_shape(tx.init, params)
    lowered = compiled_step(tx).lower(params, state, params)
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


FACTORIZATION = re.compile(r"cholesky\(|custom_call_target=\"[^\"]*(potrf|gesdd|gesvd|geqrf|syev)")


def conditionals(hlo: str) -> tuple[int, int]:
    """How many conditionals a compiled program has, and factorizations outside of any."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)
    always, waiting = {entry}, [entry]
    while waiting:  # what runs at every step: all that is reached without a conditional
        for line in bodies[waiting.pop()]:
            if " conditional(" in line:
                continue
            called = set(re.findall(r"%([\w.-]+)", line)) & bodies.keys()
            waiting += called - always
            always |= called
    outside = [line for name in always for line in bodies[name] if FACTORIZATION.search(line)]
    return hlo.count(" conditional("), len(outside)


def compilations(args: argparse.Namespace, steps: int = 1000) -> int:
    """How many programs XLA compiles in 1,000 steps of `tiny`, refreshes included."""
    small = argparse.Namespace(**{**vars(args), "rank": 32, "gradients": None})
    stacks = gradients(small, projected_shapes("tiny", None), 0)
    tx = transformation(OURS, small, 100)
    params, state = zeros_and_state(tx, stacks)
    jax.block_until_ready((params, state))
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if "backend_compile" in event else None
    )
    step = compiled_step(tx)
    for _ in range(steps):
        params, state = step(params, state, stacks)
    jax.block_until_ready(params)
    return len(events)


def int4_bytes() -> str:
    """Bytes that the device takes for 2²⁸ INT4 numbers, each."""
    device = jax.devices()[0]
    if device.memory_stats() is None:
        return f"not measured: {device.platform} devices do not report bytes in use"
    before = device.memory_stats()["bytes_in_use"]
    codes = jax.block_until_ready(jnp.ones(2**28, jnp.int4))
    taken = device.memory_stats()["bytes_in_use"] - before
    return f"{taken / codes.size:.3f} bytes each (0.5 is packed)"


# The report.


def table(title: str, seconds: dict[str, Seconds], ratios: list[tuple[str, str, str]]) -> None:
    print(f"\n{title}\n\n| side | median ms | of CPU time |\n| --- | --- | --- |")
    for side, (clock, cpu) in seconds.items():
        print(f"| {side} | {clock * 1e3:.2f} | {cpu * 1e3:.2f} |")
    print()
    for above, below, aim in ratios:
        clock, cpu = seconds[above] / seconds[below]
        print(f"- {above} / {below}: {clock:.3f}{aim}; of CPU time {cpu:.3f}")


def report(args: argparse.Namespace) -> None:
    """Measures what `--parts` asks for and prints it as Markdown."""
    device = jax.devices()[0]
    if args.gradients:
        recorded = np.load(args.gradients[0])
        shapes = {name: recorded[name].shape for name in recorded.files}
    else:
        shapes = projected_shapes(args.model, args.layers)
    matrices = sum(s[0] for s in shapes.values())
    print(
        f"{args.gradients[0] if args.gradients else args.model}: {matrices} matrices, rank "
        f"{args.rank}, {args.dtype}; {device.device_kind} ({device.platform}), jax "
        f"{jax.__version__}, optax {optax.__version__}; ours with {args.galore or 'defaults'}"
    )
    groups = [{n: s} for n, s in shapes.items()] if args.one_leaf_at_a_time else [shapes]

    def total(measure: Callable[..., dict[str, Seconds]]) -> dict[str, Seconds]:
        found = [measure(args, gradients(args, group, 0)) for group in groups]
        return {side: np.sum([f[side] for f in found], axis=0) for side in found[0]}

    if "ordinary" in args.parts:
        ratios = [(OURS, PEER, " (aim 1.05)"), (OURS, ADAMW, " (aim 1.2)")]
        ratios += [(SEPARATE, PEER, ""), (SEPARATE, ADAMW_SEPARATE, "")]
        ratios += [(OURS, f"{OURS}, no conditional", "")]
        table("Ordinary step", total(ordinary), ratios)
    if "refresh" in args.parts:
        ratios = [(PEER, OURS, " (aim 8)"), (PEER, SEPARATE, "")]
        table("Step that refreshes every subspace", total(refresh), ratios)
    if "energy" in args.parts:
        print_energy(args, groups)
    if "memory" in args.parts:
        print_memory(args, shapes)
    if "compilations" in args.parts:
        print(f"\nCompilations in 1,000 steps of tiny: {compilations(args)}")
    if "int4" in args.parts:
        print(f"\nINT4: {int4_bytes()}")


def print_energy(args: argparse.Namespace, groups: list[Shapes]) -> None:
    found: dict[str, list[np.ndarray]] = {}
    for group in groups:
        batches = [gradients(args, group, seed) for seed in range(2)]
        for side in (OURS, PEER):
            parts = kept_energy(args, side, batches)
            known = found.get(side, [np.empty(0)] * 2)
            found[side] = [np.concatenate(pair) for pair in zip(known, parts, strict=True)]
    print("\nKept energy ‖PᵀG‖²/‖G‖², mean over the matrices\n")
    print("| refresh | ours | optax.contrib.galore | ratio: mean | least (aim 0.99) |")
    print("| --- | --- | --- | --- | --- |")
    for name, ours, theirs in zip(
        ("first", "second, a new gradient"), *found.values(), strict=True
    ):
        ratio = ours / theirs
        figures = (ours.mean(), theirs.mean(), ratio.mean(), ratio.min())
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in figures) + " |")


def print_memory(args: argparse.Namespace, shapes: Shapes) -> None:
    width = jnp.dtype(args.dtype).itemsize
    updates = sum(int(np.prod(s)) for s in shapes.values()) * width
    largest = max(s[1] * s[2] for s in shapes.values()) * width
    print(
        f"\nTemporaries of the donated step; updates {updates / 2**20:.1f} MiB and the largest "
        f"matrix {largest / 2**20:.1f}: {(updates + largest) / 2**20:.1f} MiB\n"
    )
    heads = ("side", "temporaries MiB", "of updates and matrix (aim 1)", "conditionals")
    heads += ("factorizations outside of one", "compile s")
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for side in (OURS, SEPARATE, PEER, ADAMW):
        if side == PEER and args.one_leaf_at_a_time:
            continue
        program, seconds = compiled(args, side, shapes)
        taken = program.memory_analysis().temp_size_in_bytes
        counts = conditionals(program.as_text())
        ratio = taken / (updates + largest)
        row = (side, f"{taken / 2**20:.1f}", f"{ratio:.2f}", *counts, f"{seconds:.1f}")
        print(f"| {' | '.join(map(str, row))} |")


def options(pairs: list[str]) -> Iterator[tuple[str, Any]]:
    """`side=both seed=1` as keyword arguments."""
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            yield name, ast.literal_eval(value)
        except (ValueError, SyntaxError):
            yield name, value


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # pyrefly: ignore[missing-attribute]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-60m", choices=[*SIZES])
    parser.add_argument("--rank", type=int, help="by default the paper's for the model")
    parser.add_argument("--layers", type=int, help="instead of the model's, to fit the memory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--update-only", action="store_true", help="time `update`, not donated")
    parser.add_argument("--rounds", type=int, default=20, help="ordinary steps of each side")
    parser.add_argument("--refresh-rounds", type=int, default=3)
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of every side")
    parser.add_argument("--decay", type=float, default=0.75, help="of the power-law spectrum")
    parser.add_argument("--gradients", nargs="+", help="recorded by benchmarks.subspaces (.npz)")
    parser.add_argument("--one-leaf-at-a-time", action="store_true", help="and the times summed")
    parser.add_argument("--galore", nargs="*", default=[], help="ours: subspace=power side=both")
    args = parser.parse_args()
    args.galore = dict(options(args.galore))
    args.rank = args.rank or DEFAULTS[args.model]["rank"]
    report(args)


if __name__ == "__main__":
    main()
