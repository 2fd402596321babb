"""By default matrices are projected, and stacks of vectors are not, with a warning."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen

from galore_optax import GaLoreDimensionNumbers, galore


def projected(params):
    """The paths of leaves that are projected by default."""
    tx = galore(0.25, optax.adam(1e-3))
    bases = jax.eval_shape(lambda p: tx.init(p), params).bases
    return sorted(jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(bases))


def tree(**shapes):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x = x + linen.Dense(x.shape[-1])(linen.gelu(linen.Dense(64)(linen.LayerNorm()(x))))
        return x + linen.MultiHeadDotProductAttention(4, use_bias=True)(x), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(100, 16)(ids)
        stack = linen.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="layers")(x, None)
        return linen.Dense(100)(x)


def shapes_of(model, *args):
    return jax.eval_shape(model.init, jax.random.key(0), *args)["params"]


def test_biases_and_norms_of_scanned_layers_are_no_matrices():
    params = shapes_of(Scanned(), jnp.zeros((1, 5), jnp.int32))
    assert params["layers"]["LayerNorm_0"]["scale"].shape == (3, 16)
    with pytest.warns(UserWarning, match="galore") as seen:
        found = projected(params)
    three_axes, two_axes = (str(warning.message) for warning in seen)
    assert three_axes.startswith("galore leaves 9 params with three or more axes")
    assert two_axes.startswith("galore takes 5 params with two axes for stacks of vectors")
    assert found == ["['Dense_0']['kernel']", "['Embed_0']['embedding']"]


@pytest.mark.filterwarnings("ignore:galore")
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (tree(kernel=(4, 8, 32), bias=(4, 32), norm=(4, 8), head=(8, 100)), ["['head']"]),
        # All of a subtree with such a bias is stacked, whatever its width.
        (
            tree(layers={"kernel": (4, 8, 32), "bias": (4, 32), "norm": (4, 6)}, head=(8, 6)),
            ["['head']"],
        ),
        (tree(cls=(1, 1, 8), offset=(1, 8), w=(8, 32)), ["['w']"]),
        (tree(experts=(4, 8, 32), bias=(4, 32), router=(8, 4)), ["['router']"]),
        # Attention's kernels, with heads on an axis, do not make others stacks.
        (
            tree(query=(32, 4, 8), out=(4, 8, 32), up=(32, 128), down=(128, 32), square=(32, 32)),
            ["['down']", "['square']", "['up']"],
        ),
        (tree(query=(32, 4, 8), key=(32, 8), value=(32, 8)), ["['key']", "['value']"]),
        (tree(conv=(3, 3, 16, 32), dense=(32, 10)), ["['dense']"]),
        (tree(gates=(2, 16, 64), linear=(64, 16)), ["['linear']"]),
    ],
)
def test_a_leaf_is_a_stack_of_vectors_only_beside_as_many_matrices_of_its_width(params, expected):
    assert projected(params) == expected


def test_the_matrices_of_a_block_with_heads_are_projected_and_its_biases_are_not():
    block = shapes_of(Block(), jnp.zeros((1, 5, 32)), None)
    assert block["MultiHeadDotProductAttention_0"]["query"]["bias"].shape == (4, 8)
    with pytest.warns(UserWarning, match=r"stacks of vectors|leaves 4 params"):
        assert projected(block) == ["['Dense_0']['kernel']", "['Dense_1']['kernel']"]


def test_dimension_numbers_that_are_given_say_what_is_projected():
    params = tree(kernel=(4, 8, 32), bias=(4, 32))
    tx = galore(2, optax.adam(1e-3), weight_dimension_numbers=GaLoreDimensionNumbers())
    bases = jax.eval_shape(lambda p: tx.init(p), params).bases
    assert bases["bias"].shape == (4, 2)
