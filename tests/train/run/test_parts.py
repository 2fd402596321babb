"""What a run prints of its programs before it compiles them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from small_run import small

from galore_optax import quantize_weights
from train.config.resolve import resolve
from train.run.parts import log_programs, trained_params


@pytest.mark.parametrize(
    ("dtypes", "model", "optimizer"),
    [
        ({}, "32 params, float32, 128 bytes; random", "state of 16 bytes, rank"),
        (
            {"dtype": "bfloat16", "weight_dtype": "float32", "state_dtype": "bfloat16"},
            "32 params, bfloat16 with float32 weights, 128 bytes; random",
            "state of 16 bytes, moments in bfloat16, rank",
        ),
        ({"dtype": "bfloat16"}, "32 params, bfloat16, 128 bytes", "moments in float32, rank"),
    ],
)
def test_dtypes_that_differ_are_named(dtypes, model, optimizer):
    lines = logged(**dtypes)
    assert lines[0] == "sharding: norm is whole"
    assert model in lines[1]
    assert optimizer in lines[2]


def test_trained_params_are_counted_without_the_scales_of_quantized_ones():
    matrix = jax.ShapeDtypeStruct((2, 64, 48), jnp.float32)
    params = {"layers": {"mlp": {"up": matrix}}, "norm": jax.ShapeDtypeStruct((64,), jnp.float32)}
    quantized = jax.eval_shape(lambda x: quantize_weights(x, bits=8), params)
    config = resolve(small("unused", optimizer="q-galore-adamw8bit", train="layers"))
    assert trained_params(config, quantized) == 2 * 64 * 48


def test_a_resumed_run_has_the_weights_of_a_checkpoint(tmp_path):
    assert logged(out=str(tmp_path), resume=True)[1].endswith("; random")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert logged(out=str(tmp_path), resume=True)[1].endswith("; weights of a checkpoint")


def logged(out: str = "unused", **settings) -> list[str]:
    shapes = {"layers": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    state = {"mu": jax.ShapeDtypeStruct((4,), jnp.float32)}
    programs = SimpleNamespace(
        abstract=SimpleNamespace(params=shapes, optimizer=state), notes=["norm is whole"]
    )
    lines: list[str] = []
    config = resolve(small(out, **settings))
    log_programs(config, programs, "tiny", "random", lines.append)  # pyrefly: ignore
    return lines
