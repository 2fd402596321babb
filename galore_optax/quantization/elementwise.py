"""Runs elementwise updates on a few rows of large arrays at a time.

Adam's update of one element depends on no other. Where an update's jaxpr shows that, a few rows of
a large low-bit array at a time are dequantized, updated, quantized and written back in place, so
that only their floats are in memory (and in a CPU's cache).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array, Int

from galore_optax.lowering import on_one_gpu
from galore_optax.quantization.array import QuantizedArray, dequantized, is_quantized, stored_like
from galore_optax.quantization.codes import elements, row_major
from galore_optax.quantization.kernel import fits, in_one_kernel
from galore_optax.rows import parts
from galore_optax.sharding import explicit_axes, varying_alike, within_shard_map
from galore_optax.trace.elementwise import Part, arrays, body_of, elementwise_parts

# The most elements in a chunk: enough for a turn of the loop to be worth its start. A CPU takes
# half as many, whose floats stay in its cache (8-bit Adam takes 10% to 30% longer with all, EPYC).
CHUNK = 2**20
# Primitives that Pallas has for Triton: for all floats, and for those of at least 32 bits.
_SIMPLE = {
    "abs", "add", "add_any", "broadcast_in_dim", "convert_element_type", "div", "eq", "ge", "gt",
    "integer_pow", "le", "lt", "max", "min", "mul", "ne", "neg", "select_n", "square",
    "stop_gradient", "sub",
}  # fmt: skip
_WIDE = {
    "and", "ceil", "clamp", "cos", "exp", "exp2", "expm1", "floor", "is_finite", "log", "log1p",
    "logistic", "not", "or", "pow", "rsqrt", "sign", "sin", "sqrt", "tan", "tanh", "xor",
}  # fmt: skip
# Those whose results may be numbers in Triton where an argument is NaN.
_DROP_NAN = {"clamp", "max", "min"}


def chunks(x: Array | QuantizedArray, most: int) -> int:
    """Returns into how many chunks of up to `most` elements to cut an array's rows (axis -2).

    1 where they cannot be cut. Up to 16 devices that they are split over share each chunk.
    """
    # Explicit mesh axes are part of the types in a jaxpr, which do not fit chunks.
    explicit = any(map(explicit_axes, jax.tree.leaves(x)))
    if x.ndim < 2 or explicit or (isinstance(x, QuantizedArray) and x.axis != -1):
        return 1
    return parts(x.shape[-2], -(-x.size // most), shares=16)


def over_chunks(
    begin: Callable,
    stored: dict[int, Any],
    read: dict[int, Any],
    count: Callable,
    end: Callable = lambda new, _: new,
    kernel: Callable[[Any, Any], Any] | None = None,
) -> dict[int, Any]:
    """Overwrites arrays and `QuantizedArray`s of one shape, `stored`, chunk by chunk.

    Args:
        begin: Gets a chunk of `stored`, of `read` and of the elements' numbers, and returns arrays
            that XLA computes once each, however often `end` uses them.
        stored: The arrays to overwrite.
        read: Other arrays of that shape.
        count: Returns the number of chunks for a largest size.
        end: Makes the new chunk of what `begin` returned; its second argument is like the old one.
        kernel: Makes the same of `stored` and `read` in one kernel, on an NVIDIA GPU.
    """
    many, few = count(CHUNK // 2), count(CHUNK)
    stored, read = varying_alike((stored, read))

    def chunked(stored: Any, read: Any) -> Any:
        run = partial(_over_chunks, begin, end)
        if many == few:
            return run(few, stored, read)
        cpu, default = partial(run, many), partial(run, few)
        return jax.lax.platform_dependent(stored, read, cpu=cpu, default=default)

    if kernel is None and few > 1 and not any(map(is_quantized, stored.values())):
        kernel = partial(_over_chunks, begin, end, 1)  # XLA makes one kernel of it
    if kernel is None:
        return chunked(stored, read)
    return on_one_gpu(kernel, chunked, stored, read)


def _over_chunks(begin: Callable, end: Callable, count: int, stored: Any, read: Any) -> Any:
    shape = next(iter(stored.values())).shape
    if count == 1:
        return end(begin(stored, read, elements(shape)), stored)
    leaves = jax.tree.leaves((stored, read), is_leaf=is_quantized)
    per_row = {x.shape[-1] / x.block for x in leaves if is_quantized(x)}
    # Whole blocks in a row, where all quantized arrays agree.
    blocks = int(max(per_row)) if len(per_row) == 1 and max(per_row) % 1 == 0 else 1

    def cut(x: Array) -> Array:
        # Chunk i is the i-th of `count` ranges in each group of rows. Blocks get an axis, so that
        # finding an element's scale needs no division, which XLA does not vectorize.
        rows, columns = x.shape[-2:]
        groups = math.gcd(rows // count, 64)
        each = groups, count, rows // (groups * count)
        return x.reshape(*x.shape[:-2], *each, blocks, columns // blocks)

    of_chunk = list(jax.eval_shape(cut, jax.ShapeDtypeStruct(shape, bool)).shape)
    strides = list(row_major(tuple(of_chunk)))
    of_chunk.pop(-4)
    stride = strides.pop(-4)

    def start(stored: Any, i: Int[Array, ""] | int) -> Any:
        first = jnp.uint32(i) * np.uint32(stride % 2**32)
        return begin(take(stored, i), take(read, i), first + elements(tuple(of_chunk), strides))

    def take(tree: Any, i: Int[Array, ""] | int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, -4, False), tree)

    def put(tree: Any, new: Any, i: Int[Array, ""] | int) -> Any:
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, x.ndim - 4), tree, new
        )

    def turn(i: Int[Array, ""], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        # Chunk i begins while chunk i - 1 ends. Floats in the carry are computed once (otherwise
        # XLA dequantizes again at each use), and a turn writes another chunk than it reads
        # (otherwise XLA copies the whole arrays in each turn).
        stored, floats = carry
        stored = put(stored, end(floats, like), i - 1)
        return stored, start(stored, jnp.minimum(i, count - 1))

    shapes = jax.tree.map(jnp.shape, stored)
    stored, read = jax.tree.map(cut, (stored, read))
    like = jax.eval_shape(lambda: take(stored, 0))
    carry = stored, start(stored, 0)
    new, _ = jax.lax.fori_loop(1, count + 1, turn, carry)
    return jax.tree.map(lambda x, shape: x.reshape(shape), new, shapes)


def updated(
    update: Callable[..., tuple[Any, Any]], updates: Any, state: Any, *rest: Any
) -> tuple[Any, Any]:
    """Returns `update(updates, state, *rest)` for a state with `QuantizedArray`s.

    These are dequantized and quantized again: chunk by chunk where the update, a function from
    trees of arrays to trees like the first two, is elementwise, otherwise whole.
    """
    own, tree = jax.tree.flatten((updates, state), is_leaf=is_quantized)
    others, others_tree = jax.tree.flatten(rest, is_leaf=is_quantized)
    leaves = [*own, *others]

    def flat(leaves: Sequence[Any]) -> list[Any]:
        others = others_tree.unflatten(leaves[len(own) :])
        # By leaves: an update may return containers of other types than it was given.
        return jax.tree.leaves(update(*tree.unflatten(leaves[: len(own)]), *others))

    if not any(is_quantized(x) and (chunks(x, CHUNK // 2) > 1 or fits([x])) for x in own):
        new = flat(dequantized(leaves))
        return tree.unflatten(stored_like(x, y) for x, y in zip(new, own, strict=True))
    arrays = {i: x for i, x in enumerate(leaves) if np.ndim(x)}
    leaves = [varying_alike(arrays).get(i, x) for i, x in enumerate(leaves)]
    whole = [_whole(x) for x in leaves]
    traced = jax.make_jaxpr(flat)(whole)
    parts = [
        part
        for part in map(_Part._make, elementwise_parts(traced.jaxpr))
        if part.chunks(leaves, CHUNK // 2) > 1 or part.fits_a_kernel(leaves)
    ]
    known = _outside(traced, parts, leaves)
    made = {k: x for part in parts for k, x in part.run(known, leaves).items()}
    outputs = enumerate(zip(traced.jaxpr.outvars, own, strict=True))
    return tree.unflatten(
        made[k] if k in made else stored_like(known.of(var), x) for k, (var, x) in outputs
    )


class _Values(dict[Any, Any]):
    """Values of a jaxpr's variables."""

    def of(self, atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else self[atom]

    def evaluate(self, equations: Sequence[Any], shape: tuple[int, ...]) -> None:
        """Evaluates elementwise equations on arrays of another shape than they were traced for."""
        for equation in equations:
            values = [self.of(atom) for atom in equation.invars]
            if (body := body_of(equation)) is not None:
                inside = _Values(zip(body.jaxpr.invars, values, strict=True))
                inside.update(zip(body.jaxpr.constvars, body.consts, strict=True))
                inside.evaluate(body.jaxpr.eqns, shape)
                results = [inside.of(atom) for atom in body.jaxpr.outvars]
            elif equation.primitive.name == "broadcast_in_dim":
                results = [jnp.broadcast_to(values[0], shape)]
            else:
                results = [equation.primitive.bind(*values, **equation.params)]
                if equation.primitive.name in _DROP_NAN:
                    for x in values:
                        results = [jnp.where(x == x, results[0], x)]
            self.update(zip(equation.outvars, results, strict=True))


class _Part(Part):
    """A part that is computed chunk by chunk, or in a kernel."""

    def chunks(self, leaves: Sequence[Any], most: int) -> int:
        quantized = (leaves[j] for j in self.inputs if is_quantized(leaves[j]))
        return min((chunks(x, most) for x in quantized), default=1)

    def fits_a_kernel(self, leaves: Sequence[Any]) -> bool:
        """Whether a GPU's kernel can compute it."""
        own = [leaves[i] for i in self.inputs.keys() | self.outputs.keys()]
        return fits(own) and all(map(_in_triton, self.equations))

    def run(self, known: _Values, leaves: Sequence[Any]) -> dict[int, Any]:
        """Returns the results by index, computed chunk by chunk."""
        stored, read = {}, {j: leaves[j] for j in self.inputs}
        for k, var in self.outputs.items():
            if is_quantized(leaves[k]) or leaves[k].dtype == var.aval.dtype:
                stored[k] = read.pop(k, leaves[k])
            else:
                stored[k] = jnp.zeros_like(leaves[k], var.aval.dtype)

        scalars = [v for v in known if any(v in e.invars for e in self.equations)]

        def new(floats: dict[int, Any], numbers: Sequence[Any]) -> dict[int, Any]:
            values = _Values(zip(scalars, numbers, strict=True))
            values.update({var: floats[j] for j, var in self.inputs.items()})
            values.evaluate(self.equations, next(iter(floats.values())).shape)
            return {k: values.of(var) for k, var in self.outputs.items()}

        def begin(stored: dict[int, Any], read: dict[int, Any], _: Any) -> dict[int, Any]:
            return new(dequantized(stored | read), [known[v] for v in scalars])

        def end(floats: dict[int, Any], like: dict[int, Any]) -> dict[int, Any]:
            return {k: stored_like(x, like[k]) for k, x in floats.items()}

        def kernel(stored: dict[int, Any], read: dict[int, Any]) -> dict[int, Any]:
            return in_one_kernel(new, stored, read, [known[v] for v in scalars])

        fitting = kernel if self.fits_a_kernel(leaves) else None
        return over_chunks(begin, stored, read, partial(self.chunks, leaves), end, fitting)


def _outside(traced: ClosedJaxpr, parts: Sequence[_Part], leaves: Sequence[Any]) -> _Values:
    """Evaluates the scalars that the parts need, and the results that no part computes."""
    jaxpr = traced.jaxpr
    inside = [equation for part in parts for equation in part.equations]
    inputs = {j for part in parts for j in part.inputs}
    outputs = {k for part in parts for k in part.outputs}
    atoms = [atom for k, atom in enumerate(jaxpr.outvars) if k not in outputs]
    atoms += [v for equation in inside for v in equation.invars if not arrays([v])]
    needed = list(dict.fromkeys(v for v in atoms if not isinstance(v, Literal)))
    numbers = set(map(id, inside))
    rest = [equation for equation in jaxpr.eqns if id(equation) not in numbers]
    function = jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(eqns=rest, outvars=needed), traced.consts))
    # The parts' own arguments are not used.
    values = function(*(x if j in inputs else dequantized(x) for j, x in enumerate(leaves)))
    return _Values(zip(needed, values, strict=True))


def _whole(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf, dequantized; with the rest of its type within `shard_map`."""
    kind = jax.typeof(x.codes if is_quantized(x) else x)
    rest = dict(sharding=kind.sharding, manual_axis_type=kind.manual_axis_type)
    return jax.ShapeDtypeStruct(
        jnp.shape(x), jnp.result_type(x), **rest if within_shard_map() else {}
    )


def _in_triton(equation: Any) -> bool:
    """Whether Pallas has an elementwise equation in its Triton dialect."""
    if (body := body_of(equation)) is not None:
        return all(map(_in_triton, body.jaxpr.eqns))
    wide = all(v.aval.dtype.itemsize != 2 for v in (*equation.invars, *equation.outvars))
    name = equation.primitive.name
    return name in _SIMPLE or (wide and name in _WIDE)
