"""LLaMA's sizes: the papers' numbers of params, operations, and what is refused."""

import dataclasses

import jax
import pytest
from flax import nnx

from models.llama.config import SIZES, count_params, flops_per_token
from models.llama.model import Llama


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("llama-60m", 58.07),
        ("llama-130m", 134.1),
        ("llama-350m", 368.0),
        ("llama-1b", 1339),
        ("llama-7b", 6738),
    ],
)
def test_sizes_have_the_papers_number_of_params(name, millions):
    config = SIZES[name]
    abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    created = sum(x.size for x in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
    # The published figures are rounded to four digits.
    assert created / 1e6 == pytest.approx(millions, rel=2e-4)
    assert count_params(config) == created


def test_flops_follow_from_the_products():
    c = SIZES["llama-60m"]
    matrices = 4 * c.width**2 + 3 * c.width * c.mlp_width
    products = c.layers * (matrices + 2 * 256 * c.width) + c.width * c.vocab_size
    # Two operations a multiplication, and the backward pass has two products for each.
    assert flops_per_token(c, 256) == 6 * products


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width=128 with heads=3"),
        ({"heads": 128, "kv_heads": 128}, "even integer"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"layers": 0}, "layers=0: must be at least 1"),
        ({"attention": "flash"}, "attention='flash': must be one of xla, cudnn"),
        ({"batch_shards": 0}, "batch_shards=0: must be at least 1"),
        ({"dtype": "int8"}, "dtype=int8: must be a float type"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES["tiny"], **changes)
