"""Choosing an implementation where a program is lowered, by the platform and the devices it is for.

Not where it is traced: a program for a GPU may be made on a machine that has none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from galore_optax.sharding import within_shard_map


def on_one_gpu(kernel: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
    """Returns `kernel(*args)` in a program for a single NVIDIA GPU, else `otherwise(*args)`.

    XLA cannot split a kernel over several devices, and would gather its arguments on each of them.
    Both are functions of trees of arrays, with equal shapes and dtypes of results.
    """
    if within_shard_map():
        return otherwise(*args)
    cuda = partial(_on_one_device, kernel, otherwise)
    return jax.lax.platform_dependent(*args, cuda=cuda, default=otherwise)


def _on_one_device(one: Callable[..., Any], several: Callable[..., Any], *args: Any) -> Any:
    (first, out), (second, _) = (
        jax.make_jaxpr(f, return_shape=True)(*args) for f in (one, several)
    )
    # What the functions close over is an argument, too. These close over no tracers, which
    # `jax.checking_leaks` would find in the program.
    leaves = [*first.consts, *second.consts, *jax.tree.leaves(args)]
    count, total = len(first.consts), len(first.consts) + len(second.consts)
    first, second = first.jaxpr, second.jaxpr

    def of_first(*leaves: Any) -> Any:
        return jaxpr_as_fun(ClosedJaxpr(first, leaves[:count]))(*leaves[total:])

    def of_second(*leaves: Any) -> Any:
        return jaxpr_as_fun(ClosedJaxpr(second, leaves[count:total]))(*leaves[total:])

    return jax.tree.structure(out).unflatten(
        _one_device.bind(*leaves, one=of_first, several=of_second)
    )


_one_device = Primitive("one_device")
_one_device.multiple_results = True


@_one_device.def_impl
def _run(*leaves: Any, **functions: Any) -> Any:
    return jax.jit(partial(_one_device.bind, **functions))(*leaves)


@_one_device.def_abstract_eval
def _shapes(*leaves: Any, one: Any, several: Any) -> Any:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(several, *shapes)]


def _lower(context: Any, *leaves: Any, one: Any, several: Any) -> Any:
    devices = context.module_context.axis_context
    alone = getattr(devices, "num_devices", None) == 1
    chosen = mlir.lower_fun(one if alone else several, multiple_results=True)
    return chosen(context, *leaves)


def _batched(leaves: Any, axes: Any, *, one: Any, several: Any) -> Any:
    one, several = (jax.vmap(f, in_axes=axes, out_axes=0) for f in (one, several))
    made = _one_device.bind(*leaves, one=one, several=several)
    return made, [0] * len(made)


def _differentiated(leaves: Any, tangents: Any, *, one: Any, several: Any) -> Any:
    """That of `several`, for which XLA has no kernels to choose from."""
    moving = [i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero)]

    def function(*own: Any) -> Any:
        given = dict(zip(moving, own, strict=True))
        return several(*(given.get(i, x) for i, x in enumerate(leaves)))

    own, changes = ([x[i] for i in moving] for x in (leaves, tangents))
    return jax.jvp(function, own, changes)


ad.primitive_jvps[_one_device] = _differentiated
mlir.register_lowering(_one_device, _lower)
batching.primitive_batchers[_one_device] = _batched
