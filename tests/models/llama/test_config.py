"""LLaMA's sizes: the papers' numbers of params, operations, and what is refused."""

import dataclasses

import jax
import pytest
from flax import nnx

from models.llama.config import SIZES, count_params, flops_per_token
from models.llama.model import Llama
from models.llama.rope import RopeScaling


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


def test_a_tied_embedding_counts_once_as_weight_and_its_product_still():
    c = SIZES["llama-60m"]
    tied = dataclasses.replace(c, tied=True)
    assert count_params(c) - count_params(tied) == c.vocab_size * c.width
    assert flops_per_token(tied, 256) == flops_per_token(c, 256)


def test_heads_of_their_own_width_and_biases_are_counted():
    c = dataclasses.replace(SIZES["tiny"], head_dim=64, kv_heads=2)
    biased = dataclasses.replace(c, attention_bias=True, mlp_bias=True)
    created = nnx.eval_shape(lambda: Llama(biased, rngs=nnx.Rngs(0)))
    sizes = [x.size for x in jax.tree.leaves(nnx.state(created, nnx.Param))]
    assert count_params(biased) == sum(sizes)
    outputs = 4 * 64 + 2 * 2 * 64 + c.width + 2 * c.mlp_width + c.width
    assert count_params(biased) - count_params(c) == c.layers * outputs
    assert flops_per_token(biased, 32) == flops_per_token(c, 32)
    added = flops_per_token(c, 33) - flops_per_token(c, 32)
    assert added == 12 * c.layers * 4 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "yarn"}, "kind='yarn': must be one of linear, dynamic, llama3"),
        ({"factor": 0.5}, "factor=0.5: must be finite and at least 1"),
        ({"original_length": 8}, "original_length=8: must be None with kind='linear'"),
        ({"kind": "dynamic"}, "original_length=None: must be a positive number"),
        (
            dict(kind="llama3", original_length=8, low_freq_factor=4.0, high_freq_factor=4.0),
            "high_freq_factor=4.0: must be above low_freq_factor=4.0",
        ),
    ],
)
def test_impossible_scalings_of_the_frequencies_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "linear", "factor": 2.0} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 3}, "head_dim=3: must be even and at least 2"),
        (
            {"head_dim": 2, "rope_scaling": RopeScaling("dynamic", 2.0, 8)},
            "head_dim=2: must be even and at least 4 with dynamic rope_scaling",
        ),
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
