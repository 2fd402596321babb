"""Messages say what was given, and never print the contents of an array."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
    Staggered,
    adamw8bit,
    apply_updates,
    cast_state,
    galore,
    galore_adamw,
    quantize_state,
    quantize_weights,
    state_shardings,
    unstacked,
    without_refresh,
)

ADAM, ARRAY = optax.adam(0.01), jnp.linspace(0.0, 1.0, 12).reshape(3, 4)
TREE = {"w": ARRAY, "names": ["a" * 1000]}
INIT = {"w": jnp.ones((8, 16))}

WRONG = {
    "rank": lambda x: galore(x, ADAM),
    "inner": lambda x: galore(4, x),
    "gap": lambda x: galore(4, ADAM, update_proj_gap=x),
    "staggered": lambda x: galore(4, ADAM, update_proj_gap=Staggered(x)),
    "scale": lambda x: galore(4, ADAM, scale=x),
    "side": lambda x: galore(4, ADAM, side=x),
    "subspace": lambda x: galore(4, ADAM, subspace=x),
    "moments": lambda x: galore(4, ADAM, moments=x),
    "bits": lambda x: galore(4, ADAM, projection_bits=x),
    "numbers": lambda x: galore(4, ADAM, weight_dimension_numbers=x).init(INIT),
    "learning rate": lambda x: galore_adamw(x, 4),
    "b1": lambda x: adamw8bit(0.01, b1=x),
    "state": quantize_state,
    "state bits": lambda x: quantize_state(ADAM, x),
    "unsigned": lambda x: quantize_state(ADAM, unsigned=x),
    "dtype": lambda x: cast_state(ADAM, x),
    "weight bits": lambda x: quantize_weights(INIT, bits=x),
    "block": lambda x: quantize_weights(INIT, block=x),
    "which": lambda x: quantize_weights(INIT, x),
    "key": lambda x: apply_updates(INIT, INIT, x),
    "tx": without_refresh,
    "unstacked": lambda x: unstacked(x, lambda _: None),
    "axes": lambda x: unstacked(ADAM, x),
    "param axes": lambda x: unstacked(ADAM, lambda _: {"w": x}).init(INIT),
    "shardings": lambda x: state_shardings(ADAM, INIT, {"w": x}),
}


@pytest.mark.parametrize("value", [ARRAY, np.asarray(ARRAY), TREE], ids=["jax", "numpy", "tree"])
@pytest.mark.parametrize("name", WRONG)
def test_no_message_prints_an_array(name, value):
    text = ""
    try:
        WRONG[name](value)
    except Exception as error:
        text = str(error)
    assert "0.09" not in text
    assert "array(" not in text.lower()
    assert len(text) < 600
