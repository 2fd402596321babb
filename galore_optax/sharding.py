"""Shardings of an optimizer's state from those of the params, and of the arrays in between.

JAX's explicit sharding makes the sharding part of an array's type. So a whole state's sharding
follows from tracing `tx.init` on sharded abstract params: moments keep the axis that is not
projected, the basis the one that is, and the rank is replicated. Projections and refreshes run
under automatic axes: XLA shards their products without gathering a weight or a gradient.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from galore_optax import checks


def with_automatic_axes(
    fun: Callable[..., Any], out_specs: Callable[[Mesh | AbstractMesh], Any], *args: Any
) -> Any:
    """Returns `fun(*args)`, computed with the arguments' explicit mesh axes made automatic.

    Explicit types cannot express all of a projection and a refresh (a matrix of a sharded stack,
    merged axes, a factorization); XLA's partitioner can.

    Args:
        fun: A function of trees. It must not close over arrays with explicit types.
        out_specs: From the mesh to a tree of `PartitionSpec`s like the result.
        *args: Trees, which may have leaves that are not arrays.
    """
    leaves, tree = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    first = next((x for x in arrays.values() if explicit_axes(x)), None)
    if first is None:
        return fun(*args)
    mesh = jax.typeof(first).sharding.mesh
    if not isinstance(first, jax.core.Tracer) and isinstance(first.sharding, NamedSharding):
        mesh = first.sharding.mesh  # outside of jit the mesh must have devices

    def call(arrays: dict[int, Array]) -> Any:
        return fun(*tree.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)]))

    out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs(mesh))
    return jax.sharding.auto_axes(call, axes=explicit_axes(first), out_sharding=out)(arrays)


def explicit_axes(x: Array) -> tuple[str, ...]:
    """Returns the explicit mesh axes in an array's type."""
    return jax.typeof(x).sharding.mesh.explicit_axes


def specs(tree: Any) -> Any:
    """Returns the `PartitionSpec`s in the types of a tree's arrays."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def axis_specs(x: Array) -> list[tuple[str, ...]]:
    """Returns for each axis of an array the explicit mesh axes that split it."""
    entries = tuple(specs(x)) + (None,) * (x.ndim - len(specs(x)))
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]


def sharded_like(tree: Any, like: Any) -> Any:
    """Shards each array as the one in `like` if that has explicit mesh axes.

    A state then keeps its type from step to step, which `jax.lax.scan` requires. Its containers may
    have other types than those of `like`: optax lets an update return a tuple for a list.
    """

    def sharded(x: Any, y: Any) -> Any:
        explicit = isinstance(y, jax.Array) and explicit_axes(y)
        return jax.sharding.reshard(x, jax.typeof(y).sharding) if explicit else x

    leaves, structure = jax.tree.flatten(tree)
    others = jax.tree.leaves(like)
    if len(leaves) != len(others):  # as those of `optax.monitor` after its first update
        return tree
    return structure.unflatten(map(sharded, leaves, others))


def varying_alike(tree: Any, but: Sequence[str] = ()) -> Any:
    """Makes arrays vary over each mesh axis of `jax.shard_map` over which one of them varies.

    The branches of a conditional must agree in that, as must a loop's carry before and after it.
    Arrays are not made to vary over the axes `but`, over which they are summed.
    """
    if not within_shard_map():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    own = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    missing = [tuple(frozenset().union(*own) - axes - {*but}) for axes in own]
    pairs = zip(leaves, missing, strict=True)
    return structure.unflatten(
        [jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in pairs]
    )


def sum_of_all(tree: Any, axes: Sequence[str]) -> Any:
    """The sums over the devices along mesh axes of `jax.shard_map`; the tree if there is none."""
    # Array by array, so that in a traced update no array seems to depend on another one.
    return jax.tree.map(lambda x: jax.lax.psum(x, tuple(axes)), tree) if axes else tree


def within_shard_map() -> bool:
    """Whether `jax.shard_map` runs on each device what is traced now."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def zeros_like(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns zeros, sharded as `x` is and varying over the same axes of `jax.shard_map`."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    placed = sharding if isinstance(sharding, NamedSharding) else None
    return jnp.zeros_like(x, dtype, shape, device=placed)


def first_element(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns `x[0, ..., 0]`."""
    return with_automatic_axes(lambda x: x[(0,) * x.ndim], lambda _: PartitionSpec(), x)


def explain_sharding_errors(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner` so that an operation without a type under explicit mesh axes says what to do.

    Its axes stay explicit, as arrays may be that it closes over (`optax.inject_hyperparams`).
    """

    # No context manager, whose generator cannot be pickled.
    def explained(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if type(error).__name__ != "ShardingTypeError":  # JAX has no public name for it
                    raise
                raise ValueError(
                    "inner: it has an operation that explicit mesh axes cannot express; give the "
                    "mesh automatic axes, jax.make_mesh(..., axis_types=(AxisType.Auto,) * n), or "
                    f"call the update within jax.sharding.auto_axes ({error})"
                ) from error

        return wrapped

    return optax.GradientTransformationExtraArgs(explained(inner.init), explained(inner.update))


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, param_shardings: optax.Params
) -> optax.OptState:
    """Returns the tree of the shardings of `tx.init(params)`, without allocating anything.

    A leaf of the state is sharded along the axes that it shares with a param. Where `galore` gives
    the layers of a stack to its inner one by one, moments of a stack that is sharded along its
    layers are sharded along the side that is not projected instead.

    Args:
        tx: Any transformation.
        params: Tree of arrays or of `jax.ShapeDtypeStruct`.
        param_shardings: The same tree of `jax.sharding.NamedSharding` over one mesh, with automatic
            or explicit axes. An axis that they do not divide is not split in the state.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from galore_optax import galore, state_shardings
        >>> mesh = jax.make_mesh((1,), ("fsdp",))
        >>> params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
        >>> tx = galore(8, optax.adam(1e-3))
        >>> rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
        >>> tuple(state_shardings(tx, params, {"w": rows}).bases["w"].spec)
        ('fsdp', None)
    """
    for path, sharding in jax.tree.leaves_with_path(param_shardings):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"param_shardings: {checks.said(sharding)} at {jax.tree_util.keystr(path)} must "
                "be a "
                "jax.sharding.NamedSharding, as for each param"
            )
    meshes = {sharding.mesh for sharding in jax.tree.leaves(param_shardings)}
    if len(meshes) != 1:
        raise ValueError(
            f"param_shardings: they are over {len(meshes)} meshes; give NamedShardings over one"
        )
    (mesh,) = meshes
    types = dict.fromkeys(mesh.axis_names, AxisType.Explicit)
    explicit = mesh.abstract_mesh.update_axis_types(types)

    def divides(size: int, axes: Any) -> bool:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    def abstract(param: Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        pairs = zip(param.shape, sharding.spec, strict=False)
        spec = PartitionSpec(*(axes if divides(size, axes) else None for size, axes in pairs))
        placed = NamedSharding(explicit, spec)
        return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=placed)

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return NamedSharding(mesh, spec)

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(abstract, params, param_shardings))
    return jax.tree.map(on_mesh, state)
