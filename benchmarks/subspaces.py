"""The energy of a real gradient that each kind of subspace keeps, and of the next batch's.

    python -m benchmarks.subspaces --data c4 --data-dir DIR --out DIR2

Trains a LLaMA as `python -m train.pretrain` does and stops every `gap` steps, where GaLore
refreshes its subspaces: there each method finds a basis of the batch's gradient, which then also
projects the next batch's, at the same weights. The energy that bases keep of a gradient G is
‖PᵀG‖²/‖G‖², and ‖PᵀGQ‖²/‖G‖² with both sides projected (Frobenius norms). DIR2 gets
`subspaces.npz`, which the documentation's pictures are drawn from, and the gradients, a file for
each stop, which `benchmarks.optimizer_step --gradients` takes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax.projection.subspace import SUBSPACES
from train.config.resolve import resolve
from train.config.settings import Pretrain, Resolved
from train.run.assemble import Parts, assemble
from train.step.mesh import put_batch
from train.step.ordinary import loss_and_gradient

SIDES = ("smaller", "larger", "both")
Gradients = dict[str, Float[Array, "layers n m"]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compares the subspaces of real gradients over a training run."""

    out: Path
    """Folder for subspaces.npz and the gradients."""
    data: Literal["builtin", "c4"] = "builtin"
    """As in train.pretrain."""
    data_dir: str | None = None
    """As in train.pretrain: a data set written by `python -m train.prepare_c4`."""
    tokenizer: str = "bytes"
    """`bytes` or a tokenizer.json."""
    model: str = "tiny"
    """Model to train."""
    optimizer: str = "galore-adamw"
    """Optimizer of the run, with its defaults."""
    steps: int = 600
    """Steps of the run."""
    batch_size: int = 16
    """Sequences in a step."""
    seq_len: int = 128
    """Tokens in a sequence."""
    gap: int = 100
    """Steps from one stop to the next; also GaLore's `update_proj_gap`, where GaLore trains."""
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    """Dimensions of the subspaces."""
    seed: int = 0
    """Seed of the run and of the random subspaces."""


def recorded(config: Comparison) -> Iterator[tuple[int, Gradients, Gradients]]:
    """Step, gradient and the next batch's gradient at every stop of a training run."""
    settings = resolve(
        Pretrain(
            model=config.model,  # pyrefly: ignore[bad-argument-type]
            data=config.data,
            data_dir=config.data_dir,
            tokenizer=config.tokenizer,
            optimizer=config.optimizer,  # pyrefly: ignore[bad-argument-type]
            update_proj_gap=config.gap if config.optimizer.startswith("galore") else None,
            steps=config.steps,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            data_parts=1,  # the order of the text of before
            seed=config.seed,
        )
    )
    parts = assemble(settings, print)
    gradient = gradient_of_matrices(parts, settings)
    state = parts.init(jax.random.key(config.seed))
    with closing(parts.data.batches()) as stream:
        batches = (put_batch(parts.mesh, batch) for batch, _ in stream)
        for step, (batch, following) in enumerate(itertools.pairwise(batches)):
            if step % config.gap == 0:
                yield step, gradient(state.params, batch), gradient(state.params, following)
            if step == config.steps:
                return
            state, _ = parts.train_step(state, batch)


def gradient_of_matrices(parts: Parts, settings: Resolved):
    """A function of params and a batch: the gradients of the matrices that GaLore projects."""

    @jax.jit
    def gradient(params, batch) -> Gradients:
        _, grads, _ = loss_and_gradient(parts.loss, params, batch)
        return {**grads["layers"]["attention"], **grads["layers"]["mlp"]}

    return gradient


@functools.partial(jax.jit, static_argnums=0)
def find(
    method: str, gradients: Array, left: Array, right: Array, keys: PRNGKeyArray
) -> tuple[Float[Array, "layers n r"], Float[Array, "layers m r"]]:
    """Bases of both sides of each matrix of a stack, from the present ones.

    A loop over the stack, not a batch: LAPACK calls with a batch of matrices deadlock on the CPU.
    """

    def one(matrix):
        gradient, left, right, key = matrix
        gradient = gradient / jnp.max(jnp.abs(gradient))
        subspace = SUBSPACES[method]
        return subspace(gradient, left, key), subspace(gradient.T, right, key)

    return jax.lax.map(one, (gradients, left, right, keys))


@jax.jit
def energies(
    gradients: Float[Array, "layers n m"],
    left: Float[Array, "layers n r"],
    right: Float[Array, "layers m r"],
) -> Float[Array, "layers sides"]:
    """Share of each gradient's energy that its bases keep, for each of `SIDES`."""
    whole = jnp.sum(gradients**2, (1, 2))
    from_left, from_right = left.mT @ gradients, gradients @ right
    kept = [jnp.sum(x**2, (1, 2)) for x in (from_left, from_right, from_left @ right)]
    n, m = gradients.shape[1:]
    smaller, larger = (kept[0], kept[1]) if n <= m else (kept[1], kept[0])
    # As in `galore`, a tie goes to the input.
    return jnp.stack([smaller, kept[0] if n == m else larger, kept[2]], 1) / whole[:, None]


def start(gradients: Array, rank: int) -> tuple[Array, Array]:
    """Coordinate bases, from which the methods that improve on a present basis begin."""
    layers, n, m = gradients.shape
    left, right = jnp.eye(n, rank), jnp.eye(m, rank)
    return jnp.tile(left, (layers, 1, 1)), jnp.tile(right, (layers, 1, 1))


def compare(config: Comparison) -> dict[str, Any]:
    """Energies of every method, rank and side at every stop, as named arrays.

    Returns:
        `steps`, `methods`, `ranks`, `sides`; of axes (step, method, rank, side) and averaged over
        the matrices `this`, `next` (on the next batch) and `old` (of the basis of the stop before,
        NaN at the first); `least` like `this`, of the matrix that loses most; `spectrum` (step,
        matrix size): mean share of the energy in the leading 1, 2, ... directions.
    """
    key = jax.random.key(config.seed)
    methods, bases = tuple(SUBSPACES), {}
    steps, spectra = [], []
    found: dict[str, list[np.ndarray]] = {"this": [], "next": [], "old": [], "least": []}
    config.out.mkdir(parents=True, exist_ok=True)
    for step, gradients, following in recorded(config):
        np.savez(config.out / f"gradients-{step}.npz", **jax.device_get(gradients))
        steps.append(step)
        spectra.append(mean_spectrum(gradients))
        shape = (len(methods), len(config.ranks), len(SIDES))
        stop = {name: np.full((*shape, 0), np.nan) for name in found}
        for name, stack in gradients.items():
            parts = {kind: np.full((*shape, len(stack)), np.nan) for kind in found}
            for i, j in itertools.product(range(len(methods)), range(len(config.ranks))):
                own = (name, i, j)
                before = bases.get(own) or start(stack, config.ranks[j])
                keys = jax.random.split(jax.random.fold_in(key, step), len(stack))
                bases[own] = find(methods[i], stack, *before, keys)
                parts["this"][i, j] = energies(stack, *bases[own]).T
                parts["next"][i, j] = energies(following[name], *bases[own]).T
                if len(steps) > 1:
                    parts["old"][i, j] = energies(stack, *before).T
            stop = {kind: np.concatenate([stop[kind], parts[kind]], -1) for kind in stop}
        stop["least"] = stop["this"]
        for kind in found:
            reduce = np.min if kind == "least" else np.mean
            found[kind].append(reduce(stop[kind], axis=-1))
        print(f"step {step}: done", flush=True)
    return {
        "steps": np.array(steps),
        "methods": np.array(methods),
        "ranks": np.array(config.ranks),
        "sides": np.array(SIDES),
        "spectrum": np.array(spectra),
        **{kind: np.array(stops) for kind, stops in found.items()},
    }


def mean_spectrum(gradients: Gradients) -> np.ndarray:
    """Share of the energy in the leading 1, 2, ... singular directions, mean over all matrices."""
    shares = []
    for stack in gradients.values():
        energy = np.linalg.svd(np.asarray(stack), compute_uv=False) ** 2
        shares.append(np.cumsum(energy, 1) / energy.sum(1, keepdims=True))
    return np.concatenate(shares).mean(0)


def print_tables(result: dict[str, Any]) -> None:
    """Markdown: by side and rank over all stops, and over the run at one rank."""
    methods, ranks = result["methods"], result["ranks"]
    heads = [f"r = {rank}: this | next" for rank in ranks]
    for s, side in enumerate(result["sides"]):
        print(f"\nside={side}, mean over the matrices and the {len(result['steps'])} stops\n")
        print(f"| subspace | {' | '.join(heads)} |\n{'| --- ' * (1 + 2 * len(ranks))}|")
        for i, method in enumerate(methods):
            this, following = (result[kind][:, i, :, s].mean(0) for kind in ("this", "next"))
            pairs = zip(this, following, strict=True)
            print(f"| {method} | {' | '.join(f'{a:.3f} | {b:.3f}' for a, b in pairs)} |")
    j = len(ranks) // 2
    print(f"\nOver the run, side=smaller, r = {ranks[j]}: this (next) [basis of the stop before]\n")
    print(f"| step | {' | '.join(methods)} |\n{'| --- ' * (1 + len(methods))}|")
    for t, step in enumerate(result["steps"]):
        cells = [tuple(result[k][t, i, j, 0] for k in ("this", "next", "old"))
                 for i in range(len(methods))]  # fmt: skip
        row = " | ".join(f"{a:.3f} ({b:.3f}) [{c:.3f}]" for a, b, c in cells)
        print(f"| {step} | {row} |")


def main(config: Comparison) -> None:
    """Trains, compares, writes subspaces.npz and prints tables in Markdown."""
    result = compare(config)
    np.savez(config.out / "subspaces.npz", **result)
    print_tables(result)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Comparison))
