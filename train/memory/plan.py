"""What a training step will take of a device's memory, found without allocating it."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import PyTree

from galore_optax import join, state_bytes
from galore_optax.layerwise.backward import forward
from galore_optax.memory import tree_bytes
from galore_optax.quantization.array import dequantized, is_quantized
from galore_optax.quantization.weights import sources, with_sources
from models.llama.axes import dimension_numbers
from train.config.settings import ResolvedText, ResolvedTraining
from train.config.weights import split_params
from train.step import layerwise
from train.step.mesh import batch_shards
from train.step.programs import Programs, make_programs, projected_shapes

# Bytes of a card that a program cannot use: the CUDA context's.
CONTEXT = 0.6 * 2**30
SIZES = (8, 10, 12, 16, 24, 40, 48, 80, 141)  # of cards, GiB
# On a CPU freed memory stays in the arenas that glibc has for each thread: a step of llama-130m had
# 3.37 to 3.48 GB resident, and 3.07 with one arena (MALLOC_ARENA_MAX=1).
_ARENAS = 100_000_000


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    weights: int
    states: dict[str, int]  # the optimizer's, by kind: `galore_optax.memory.state_bytes`
    gradients: int  # the most that exist at once
    activations: int  # what a microbatch's forward pass keeps for its backward pass
    temporaries: int  # all else: within a layer, updates, a new basis, a CPU allocator's arenas
    batch: int
    peak: int  # the sum, from the compiled step and the allocator
    device: str = ""  # the kind that the step was compiled for
    estimate: bool = False  # whether that is another kind than the one that will run it

    def parts(self) -> dict[str, int]:
        """The summands by name."""
        rest = ("gradients", "activations", "temporaries", "batch")
        return {"weights": self.weights, **self.states, **{k: getattr(self, k) for k in rest}}

    def fits(self, card: float) -> bool:
        """Whether a card of this many GiB is enough."""
        return self.peak <= card * 2**30 - CONTEXT

    def as_json(self) -> dict[str, Any]:
        """The plan under the names that docs/memory.md documents."""
        return {
            "weight_bytes": self.weights,
            "optimizer_state_bytes": sum(self.states.values()),
            "optimizer_state": self.states,
            "gradient_bytes": self.gradients,
            "activation_bytes": self.activations,
            "temporary_bytes": self.temporaries,
            "batch_bytes": self.batch,
            "peak_bytes": self.peak,
            "cards_gib": [size for size in SIZES if self.fits(size)],
            "compiled_for": self.device,
            "estimate": self.estimate,
        }


def stored(programs: Programs) -> tuple[int, dict[str, int]]:
    """Bytes on one device of the weights and, by kind, of the optimizer's state.

    Besides its kinds, `unsent` are the errors of sums in 8 bits, if there are any.
    """
    abstract = programs.abstract
    states = state_bytes(_on_one_device(abstract.optimizer))
    if abstract.unsent is not None:
        states["unsent"] = _bytes(abstract.unsent)
    return _bytes(abstract.params), states


def make_known(config: ResolvedTraining, programs: Programs) -> Callable[[ResolvedTraining], int]:
    """Makes the function to the bytes of a step's peak that are known before it is compiled.

    These are all but temporaries. It is for settings that differ from `config`, whose programs are
    given, in batch and microbatches.
    """
    weights, states = stored(programs)
    row = _activations(dataclasses.replace(config, batch_size=1, accumulate=1), programs)

    def known(one: ResolvedTraining) -> int:
        kept = _gradients(one, programs) + rows_in_memory(one) * row
        return weights + sum(states.values()) + kept

    return known


def rows_in_memory(config: ResolvedTraining) -> int:
    """Sequences whose activations exist at once, over all devices."""
    # A layer-wise step runs all microbatches through a layer before the next layer.
    return config.batch_size // (1 if config.layerwise else config.accumulate)


def plan(
    config: ResolvedTraining,
    programs: Programs,
    compiled: Sequence[jax.stages.Compiled] | None = None,
) -> MemoryPlan:
    """The memory that the training step will take of a device of the mesh.

    `compiled` are its programs, of which the largest counts; None compiles them here.
    """
    device = programs.mesh.devices.flat[0]
    compiled = compiled_steps(programs) if compiled is None else compiled
    peak = max(map(_peak, compiled, [device] * len(compiled)))
    weights, states = stored(programs)
    batch = _bytes(programs.batch)
    rest = max(0, peak - weights - sum(states.values()) - batch)
    # XLA may keep less than it is asked to.
    gradients = min(_gradients(config, programs), rest)
    activations = min(_activations(config, programs), rest - gradients)
    temporaries = rest - gradients - activations
    kind = device.device_kind
    return MemoryPlan(weights, states, gradients, activations, temporaries, batch, peak, kind)


def _peak(compiled: jax.stages.Compiled, device: jax.Device) -> int:
    """Bytes of a device that a program takes, arguments and results included."""
    memory: Any = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes
    peak = memory.argument_size_in_bytes + temporary
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return peak + (min(_ARENAS, temporary) if device.platform == "cpu" else 0)


def estimate(config: ResolvedText, programs: Programs) -> MemoryPlan:
    """The memory that a step in bfloat16 would take of a GPU, by the compiler for this CPU.

    That compiler computes bfloat16 in float32 and keeps the converted arrays, many times what a GPU
    takes. So temporaries are those of the step in float32, all else is as stored.
    """
    model = dataclasses.replace(programs.model, dtype="float32", param_dtype="float32")
    wide = dataclasses.replace(config, dtype="float32", weight_dtype="float32")
    temporaries = plan(wide, make_programs(wide, model, programs.mesh)).temporaries
    weights, states = stored(programs)
    gradients, activations = _gradients(config, programs), _activations(config, programs)
    batch = _bytes(programs.batch)
    return MemoryPlan(
        weights,
        states,
        gradients,
        activations,
        temporaries,
        batch,
        peak=weights + sum(states.values()) + gradients + activations + temporaries + batch,
        device=programs.mesh.devices.flat[0].device_kind,
        estimate=True,
    )


def compiled_steps(programs: Programs) -> list[jax.stages.Compiled]:
    """The training step, compiled for the devices of its mesh, and the one without a refresh."""
    steps = [programs.train_step, programs.step_without_refresh]
    shapes = programs.abstract, programs.batch
    return [step.lower(*shapes).compile() for step in steps if step is not None]


def device_memory(device: jax.Device) -> int:
    """Bytes that a program can have: all of its allocator's, or of the machine's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gradients(config: ResolvedTraining, programs: Programs) -> int:
    """Bytes of the gradients that exist at once: all, or the largest part that is updated."""
    trained, _ = split_params(config, programs.abstract.params)

    def size(name: str) -> int:
        numbers = [
            _bytes(x.codes) * 8 // x.code.bits if is_quantized(x) else _bytes(x) // x.dtype.itemsize
            for x in jax.tree.leaves(trained[name], is_leaf=is_quantized)
        ]
        # Microbatches' are summed in float32.
        summed = 4 * _share_summed(config, {name: trained[name]}) if config.accumulate > 1 else 0
        return int(sum(numbers) * (jnp.dtype(config.weight_dtype).itemsize + summed))

    if not config.layerwise:
        return sum(map(size, trained))
    layers = jax.tree.leaves(trained["layers"])[0].shape[0]
    rest = [size(name) for name in trained if name != "layers"]
    return max([size("layers") // layers, *rest])


def _share_summed(config: ResolvedTraining, part: PyTree) -> float:
    """The size of the sum of gradients as a share of a gradient's."""
    in_subspace = config.accumulate_in_subspace or config.compress_gradients
    if not (in_subspace and jax.tree.leaves(dimension_numbers(part))):
        return 1
    trees = projected_shapes(config, part), jax.eval_shape(dequantized, part)
    summed, whole = (sum(x.size for x in jax.tree.leaves(tree)) for tree in trees)
    return summed / whole


def _activations(config: ResolvedTraining, programs: Programs) -> int:
    """Bytes that the forward pass of a microbatch keeps for the backward pass."""
    rows = config.batch_size // config.accumulate
    batch = {
        k: x.update(shape=(rows, *x.shape[1:]), sharding=None) for k, x in programs.batch.items()
    }
    params = jax.tree.map(lambda x: x.update(sharding=None), programs.abstract.params)
    if config.layerwise:
        assert isinstance(config, ResolvedText)
        mode = config.sequences
        model = layerwise.layered_llama(programs.model, programs.mesh)

        def kept(params: Any, batch: Any) -> Any:
            batches = jax.tree.map(lambda x: x[None], batch)
            tokens = jnp.sum(batch["weights"])
            batches = layerwise.with_sequences(programs.model, mode, batches, tokens)
            passed = forward(model, params, batches, checkpoint=config.rematerialize)
            return passed.kept, passed.last
    else:

        def kept(params: Any, batch: Any) -> Any:
            trained, frozen = split_params(config, params)

            def loss(own: Any) -> Any:
                # An encoder keeps what it drops.
                own_batch = {**batch, "key": jax.random.key(0)}
                return programs.loss(join(with_sources(trained, own), frozen), own_batch)

            return jax.vjp(loss, sources(trained))[1]

    traced = jax.make_jaxpr(kept)(params, batch).jaxpr
    given = set(traced.invars)
    # By variable, since one may be kept for several uses.
    made = {v: v.aval for v in traced.outvars if not isinstance(v, Literal) and v not in given}
    size = sum(aval.size * aval.dtype.itemsize for aval in made.values())
    microbatches = rows_in_memory(config) // rows
    return microbatches * size // batch_shards(programs.mesh)


def _bytes(tree: PyTree) -> int:
    """Bytes of a tree's arrays on one device."""
    return tree_bytes(_on_one_device(tree))


def _on_one_device(tree: PyTree) -> PyTree:
    """The `ShapeDtypeStruct`s of one device's parts of the arrays."""

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(one, tree)
