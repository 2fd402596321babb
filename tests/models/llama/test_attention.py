"""Attention over whole sequences: which implementation, and how many rows at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama.attention import attention_implementation, causal_attention
from models.llama.config import SIZES, LlamaConfig


def test_cpu_attention_is_xlas():
    bfloat16 = dataclasses.replace(SIZES["llama-60m"], dtype="bfloat16")
    assert attention_implementation(bfloat16, jax.devices()[0], 256) == "xla"


@pytest.mark.parametrize(
    ("device", "changes", "length", "name"),
    [
        ("9.0", {"dtype": "bfloat16"}, 256, "cudnn"),
        ("8.0", {"dtype": "float16"}, 256, "cudnn"),
        ("9.0", {"dtype": "float32"}, 256, "xla"),
        ("7.5", {"dtype": "float16"}, 256, "xla"),
        ("9.0", {"dtype": "bfloat16"}, 255, "xla"),
        ("9.0", {"dtype": "bfloat16", "heads": 2, "kv_heads": 2}, 256, "xla"),
    ],
)
def test_cudnn_is_chosen_where_it_can_run(device, changes, length, name):
    class Client:
        platform_version = "PJRT C API\ncuda 12090"
        runtime_type = "tfrt"

    class Device:
        client = Client
        compute_capability = device

    config = dataclasses.replace(SIZES["llama-60m"], **changes)
    assert attention_implementation(config, Device, length) == name


@pytest.mark.parametrize(
    ("kind", "name"), [("NVIDIA H100 80GB HBM3", "cudnn"), ("AMD Instinct MI300X", "xla")]
)
def test_a_device_that_is_only_compiled_for_is_known_by_its_kind(kind, name):
    class Client:
        platform_version = f"PJRT C API\n{kind}"
        runtime_type = "compile_only_runtime"

    class Device:
        client = Client

    bfloat16 = dataclasses.replace(SIZES["llama-60m"], dtype="bfloat16")
    assert attention_implementation(bfloat16, Device, 256) == name


@pytest.mark.parametrize(("shards", "parts"), [(1, 4), (8, 2), (16, None)])
def test_rows_of_a_large_batch_attend_in_parts_as_each_does_alone(shards, parts):
    config = LlamaConfig(width=4, mlp_width=4, layers=1, heads=2, kv_heads=1, batch_shards=shards)
    rows, length = 16, 1024  # 128 MiB of attention weights
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(k, (rows, length, heads, 2))
        for k, heads in zip(keys, (2, 1, 1), strict=True)
    ]
    documents = jnp.arange(length) // (length // 2)
    mask = jnp.broadcast_to(documents[:, None] == documents, (rows, 1, length, length))
    attend = jax.jit(functools.partial(causal_attention, config))
    loops = [
        e
        for e in jax.make_jaxpr(attend)(*arrays, mask).jaxpr.eqns[0].params["jaxpr"].eqns
        if e.primitive.name == "scan"
    ]
    assert [loop.params["length"] for loop in loops] == ([] if parts is None else [parts])
    if parts is not None:
        found = attend(*arrays, mask)
        for row in (0, 7, 15):
            own = [x[row : row + 1] for x in (*arrays, mask)]
            np.testing.assert_allclose(found[row : row + 1], attend(*own), atol=1e-6)
