"""Shardings: of the optimizer's state from the params', and of products of sharded matrices.

JAX's explicit sharding puts the sharding into an array's type and carries it through every
operation. So the sharding of a whole optimizer state follows from tracing `tx.init` on sharded
abstract params: moments keep the axis that is not projected, the basis the one that is, and the
rank is replicated.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float


def _explicit_mesh(*arrays: Array) -> jax.sharding.AbstractMesh | None:
    """The mesh in the arrays' types, if any of its axes is explicit."""
    for x in arrays:
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _spec(x: Array) -> tuple[Any, ...]:
    """The sharding in the type of `x`, one entry for each axis."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def matmul(
    a: Float[Array, "*batch n k"], b: Float[Array, "*batch k m"]
) -> Float[Array, "*batch n m"]:
    """The product, also where explicit sharding wants to be told the sharding of the result.

    Rows keep the sharding of `a`, columns that of `b` (unless the rows use its mesh axes already);
    a sharded contraction becomes a sum over devices.
    """
    mesh = _explicit_mesh(a, b)
    if mesh is None:
        return jnp.matmul(a, b)
    *batch, rows, _ = _spec(a)
    columns = _spec(b)[-1]
    used = {axis for entry in (*batch, rows) for axis in _mesh_axes(entry)}
    if used & set(_mesh_axes(columns)):
        columns = None
    return jnp.matmul(a, b, out_sharding=NamedSharding(mesh, PartitionSpec(*batch, rows, columns)))


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def sharded_like(
    x: Float[Array, "*batch n k"], like: Float[Array, "*batch n m"]
) -> Float[Array, "*batch n k"]:
    """`x`, its batch and row axes sharded as those of `like` where the mesh's axes are explicit."""
    mesh = _explicit_mesh(like)
    if mesh is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*_spec(like)[:-1], None)))


def first_element(x: Float[Array, "..."]) -> Float[Array, ""]:
    """`x[0, ..., 0]`, also of an array with explicit sharding, which cannot be sliced as it is."""
    mesh = _explicit_mesh(x)
    if mesh is not None:
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    return x[(0,) * x.ndim]


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, param_shardings: optax.Params
) -> optax.OptState:
    """Shardings for `tx.init(params)`, of any transformation, without allocating anything.

    Args:
        tx: The transformation.
        params: Tree of arrays or of `jax.ShapeDtypeStruct`.
        param_shardings: The same tree of `jax.sharding.NamedSharding`, all over one mesh (with
            automatic or explicit axes).

    Returns:
        A tree like `tx.init(params)` of `NamedSharding` over that mesh.

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
    mesh = jax.tree.leaves(param_shardings)[0].mesh
    explicit = Mesh(
        mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def abstract(param: Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        placed = NamedSharding(explicit, sharding.spec)
        return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=placed)

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return NamedSharding(mesh, spec)

    with jax.set_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(abstract, params, param_shardings))
    return jax.tree.map(on_mesh, state)
