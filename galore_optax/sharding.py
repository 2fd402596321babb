"""Shardings: of the optimizer's state from the params', and of what happens in between.

JAX's explicit sharding puts the sharding into an array's type and carries it through every
operation. So the sharding of a whole optimizer state follows from tracing `tx.init` on sharded
abstract params: moments keep the axis that is not projected, the basis the one that is, and the
rank is replicated. Projections and refreshes themselves run under automatic axes, whatever the
params' mesh: XLA's partitioner shards their products without gathering a weight or a gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float


def with_automatic_axes(
    fun: Callable[..., Any], out_specs: Callable[[Mesh | AbstractMesh], Any], *args: Any
) -> Any:
    """`fun(*args)`, in which the mesh axes that are explicit in the arguments' types are automatic.

    Explicit types cannot express all that a projection and a refresh do (a matrix taken from a
    sharded stack, merged axes, a factorization); XLA's partitioner can. What `fun` closes over must
    not have such types.

    Args:
        fun: A function of trees of arrays (what else they hold reaches it as it is).
        out_specs: From the mesh to the `PartitionSpec`s of what `fun` gives, a tree like it; not
            asked where no axis is explicit.
        *args: The arguments.
    """
    leaves, tree = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    first = next((x for x in arrays.values() if explicit_axes(x)), None)
    if first is None:
        return fun(*args)
    mesh = jax.typeof(first).sharding.mesh
    if not isinstance(first, jax.core.Tracer) and isinstance(first.sharding, NamedSharding):
        mesh = first.sharding.mesh  # outside of jit only a mesh with its devices will do

    def call(arrays: dict[int, Array]) -> Any:
        return fun(*tree.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)]))

    out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs(mesh))
    return jax.sharding.auto_axes(call, axes=explicit_axes(first), out_sharding=out)(arrays)


def explicit_axes(x: Array) -> tuple[str, ...]:
    """The mesh axes in an array's type."""
    return jax.typeof(x).sharding.mesh.explicit_axes


def specs(tree: Any) -> Any:
    """The `PartitionSpec`s in the types of the arrays of a tree."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def axis_specs(x: Array) -> list[tuple[str, ...]]:
    """For each axis of an array the explicit mesh axes that split it."""
    entries = tuple(specs(x)) + (None,) * (x.ndim - len(specs(x)))
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]


def sharded_like(tree: Any, like: Any) -> Any:
    """A tree of arrays, each sharded as the one of `like` where the mesh's axes are explicit.

    So that what is carried from step to step keeps its type, which `jax.lax.scan` asks for.
    """

    def sharded(x: Any, y: Any) -> Any:
        explicit = isinstance(y, jax.Array) and explicit_axes(y)
        return jax.sharding.reshard(x, jax.typeof(y).sharding) if explicit else x

    return jax.tree.map(sharded, tree, like)


def first_element(x: Float[Array, "..."]) -> Float[Array, ""]:
    """`x[0, ..., 0]`."""
    return with_automatic_axes(lambda x: x[(0,) * x.ndim], lambda _: PartitionSpec(), x)


def explain_sharding_errors(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose operations may have no type under explicit mesh axes: then it says what to do.

    It runs with the axes that the user gave: other than a projection it may close over arrays with
    explicit types, as it does under `optax.inject_hyperparams`.
    """

    def explained(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
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

        return call

    return optax.GradientTransformationExtraArgs(explained(inner.init), explained(inner.update))


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, param_shardings: optax.Params
) -> optax.OptState:
    """Shardings for `tx.init(params)`, of any transformation, without allocating anything.

    A leaf of the state is sharded along the axes that it shares with a param. Of a stack that is
    sharded along its layers the matrices' moments are arrays of their own: they are sharded along
    the side that is not projected instead.

    Args:
        tx: The transformation.
        params: Tree of arrays or of `jax.ShapeDtypeStruct`.
        param_shardings: The same tree of `jax.sharding.NamedSharding`, all over one mesh (with
            automatic or explicit axes). Where they split an axis that does not divide, the state's
            is whole.

    Returns:
        A tree like `tx.init(params)` of `NamedSharding` over that mesh.

    Raises:
        ValueError: If `param_shardings` are no `NamedSharding`s over one mesh.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from galore_optax import galore
        >>> from galore_optax.sharding import state_shardings
        >>> mesh = jax.make_mesh((1,), ("fsdp",))
        >>> params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
        >>> tx = galore(8, optax.adam(1e-3))
        >>> rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
        >>> tuple(state_shardings(tx, params, {"w": rows}).bases["w"].spec)
        ('fsdp', None)
    """
    mesh = _one_mesh(param_shardings)
    explicit = mesh.abstract_mesh.update_axis_types(
        dict.fromkeys(mesh.axis_names, AxisType.Explicit)
    )

    def abstract(param: Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        def divides(size: int, axes: Any) -> bool:
            names = (axes,) if isinstance(axes, str) else axes or ()
            return size % math.prod(mesh.shape[name] for name in names) == 0

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


def _one_mesh(shardings: Any) -> Mesh | AbstractMesh:
    meshes = []
    for path, sharding in jax.tree.leaves_with_path(shardings):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"param_shardings: {sharding!r} at {jax.tree_util.keystr(path)} is no "
                "jax.sharding.NamedSharding; give one for each param"
            )
        meshes.append(sharding.mesh)
    if len(set(meshes)) != 1:
        raise ValueError(
            f"param_shardings: they are over {len(set(meshes))} meshes; give NamedShardings over "
            "one mesh"
        )
    return meshes[0]
