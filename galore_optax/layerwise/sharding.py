"""Shardings of a layer-wise optimizer's state, from those of the weights."""

import warnings

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from galore_optax.layerwise.backward import Params
from galore_optax.layerwise.parts import masked
from galore_optax.layerwise.step import Layerwise, LayerwiseState
from galore_optax.quantization.array import dequantized
from galore_optax.sharding import state_shardings


def layerwise_shardings(
    optimizer: Layerwise, params: Params, param_shardings: Params
) -> LayerwiseState:
    """Returns the shardings of `optimizer.init(params)`, without allocating anything.

    The leaves of `params` are arrays or `jax.ShapeDtypeStruct`s. Their shardings are
    `NamedSharding`s over one mesh of automatic axes; ValueError if one splits the layers' axis.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from galore_optax import Layered, Layerwise, layerwise_shardings
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
        >>> model = Layered(
        ...     lambda params, x: x, lambda own, x, _: x @ own["w"], lambda params, x, _: x.sum()
        ... )
        >>> params = {"layers": {"w": jax.ShapeDtypeStruct((4, 16, 16), jnp.float32)}}
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
        >>> rows = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
        >>> optimizer = Layerwise(model, optax.adam(1e-3))
        >>> state = layerwise_shardings(optimizer, params, {"layers": {"w": rows}})
        >>> tuple(state.layers[0].mu["layers"]["w"].spec)
        (None, 'fsdp', None)
    """
    key = optimizer.model.layers
    stack, rest, _ = optimizer.model.split(params)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack)
    one_at = jax.tree.map(_of_a_layer, param_shardings[key])
    others = masked(params)

    def init(part: Params) -> optax.OptState:
        return optimizer.tx.init({**others, **dequantized(part)})

    tx = optax.GradientTransformation(init, optimizer.tx.update)  # pyrefly: ignore
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a part may lack what the whole has
        layers = state_shardings(tx, {key: one}, {key: one_at})
        rest_at = {
            k: state_shardings(tx, {k: part}, {k: param_shardings[k]}) for k, part in rest.items()
        }
    mesh = jax.tree.leaves(param_shardings)[0].mesh
    whole = NamedSharding(mesh, PartitionSpec())
    stacked = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec)), layers)
    return LayerwiseState(whole, whole, stacked, rest_at)  # pyrefly: ignore[bad-argument-type]


def _of_a_layer(sharding: NamedSharding) -> NamedSharding:
    layers, *spec = (*sharding.spec, None)
    if layers is not None:
        raise ValueError(
            f"param_shardings: {sharding.spec} splits the layers' axis, over which a loop runs; "
            "split another axis"
        )
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
