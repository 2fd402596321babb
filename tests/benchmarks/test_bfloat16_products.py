"""Products with bfloat16 arguments and float32 sums, and the runs that are trained with them."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bfloat16_products
from benchmarks.runs import Table, finished, read_records

# Trains nothing: its summary is what a product of `galore_optax.adapters` is after its arguments.
PROGRAM = """
import json, pathlib, sys
import jax.numpy as jnp
from galore_optax.adapters import base, lora, low_rank
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "config.json").write_text("{}")
rows = jnp.full((1, 1), 1 + 2**-10)
found = [float(module.multiply(rows, rows)[0, 0]) for module in (base, lora, low_rank)]
(out / "summary.json").write_text(json.dumps({"products": found}))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arguments_are_rounded_and_sums_are_not(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (48, 40), (40, 56), (48, 56)
    rows, matrix, cotangent = map(jax.random.normal, keys, shapes)
    rows, cotangent = rows.astype(dtype), cotangent.astype(dtype)

    @jax.jit
    def both(rows, matrix, cotangent):
        product, backward = jax.vjp(bfloat16_products.multiply, rows, matrix)
        return product, *backward(cotangent)

    found = both(rows, matrix, cotangent)
    x, w, g = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (rows, matrix, cotangent))
    wanted = (x @ w, dtype), (g @ w.T, dtype), (x.T @ g, "float32")
    for ours, (expected, kind) in zip(found, wanted, strict=True):
        assert ours.dtype == kind
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "float32" else {"rtol": 2**-8}
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, **tolerance)


def test_a_run_is_trained_with_them_where_its_table_asks_for_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    (tmp_path / "program.py").write_text(PROGRAM)
    exact = Table(tmp_path, tmp_path / "exact")
    assert finished(exact, "program", "a", []) == {"products": [(1 + 2**-10) ** 2] * 3}
    records = tmp_path / "records.jsonl"
    rounded = Table(tmp_path, tmp_path / "rounded", records, bfloat16_products=True)
    assert finished(rounded, "program", "a", ["--seed", 0]) == {"products": [1.0] * 3}
    assert read_records(records)[0]["flags"] == ["--bfloat16-products", "--seed", "0"]
    other = dataclasses.replace(rounded, bfloat16_products=False)
    with pytest.raises(SystemExit, match="its a was trained with --bfloat16-products --seed 0"):
        finished(other, "program", "a", ["--seed", 0])
    other = dataclasses.replace(other, records=None)
    with pytest.raises(SystemExit, match="a was trained with --bfloat16-products --seed 0: name"):
        finished(other, "program", "a", ["--seed", 0])


def test_without_a_program_it_says_how_to_name_one():
    command = [sys.executable, "-m", "benchmarks.bfloat16_products"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "name a program: python -m benchmarks.bfloat16_products train.finetune"
    ]
