"""optax's own tests of its contributed optimizers, run over GaLore's.

They are in optax's wheel, as `optax/contrib/_common_test.py`. Their functions are called as they
are, with our optimizers in the place of those in its table.
"""

import itertools
from functools import partial

import jax.numpy as jnp
import optax
import pytest
from optax.contrib import _common_test as suite

from galore_optax import galore, galore_adafactor, galore_adamw

pytestmark = pytest.mark.filterwarnings("ignore:galore (projects nothing|leaves 1 params)")


def around(make_inner):
    """A factory of `galore` around an inner, with the arguments that the suite looks for."""

    def factory(learning_rate: optax.ScalarOrSchedule, rank: int, update_proj_gap: int = 200):
        return galore(rank, make_inner(learning_rate), update_proj_gap=update_proj_gap)

    return factory


def adafactor(learning_rate: optax.ScalarOrSchedule, rank: int, update_proj_gap: int = 200):
    """The recipe without `min_dim_size_to_factor`, which the suite would inject as an array."""
    return galore_adafactor(learning_rate, rank, update_proj_gap=update_proj_gap)


OPTIMIZERS = {
    # Decay rates that float32 holds exactly: at others injected ones differ, in optax's Adam too.
    "galore_adamw": (galore_adamw, dict(learning_rate=1e-2, b1=1 - 2**-3, b2=1 - 2**-10)),
    "galore_adafactor": (adafactor, dict(learning_rate=1e-2)),
    "galore_sgd": (around(lambda rate: optax.sgd(rate, momentum=0.9)), dict(learning_rate=1e-3)),
    # A fifth iteration, as it has by itself, takes rounding beyond the suite's tolerance.
    "galore_muon": (around(partial(optax.contrib.muon, ns_steps=4)), dict(learning_rate=1e-2)),
}
FUNCTIONS = [
    suite._setup_parabola,
    suite._setup_rosenbrock,
    suite._setup_matrix_parabola,
    suite._setup_mixed_tensor_target,
]
# What its decorators ask of each test, beside the optimizer and its wrapper.
TESTS = {
    "test_gradient_accumulation": dict(dtype=("bfloat16", "float32")),
    "test_optimizers": dict(target=FUNCTIONS, dtype=("float32",)),
    "test_optimizers_accept_extra_args": dict(wrap=(False,)),
    "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": {},
    "test_optimizers_can_be_wrapped_in_inject_hyperparams": {},
    "test_preserve_dtype": dict(dtype=("bfloat16", "float32")),
    "test_state_shape_dtype_shard_stability": dict(
        dtype=(jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
    ),
}
CASES = [
    pytest.param(
        test,
        dict(zip(options, values, strict=True)),
        id="-".join([test, *(getattr(x, "__name__", str(x)) for x in values)]),
    )
    for test, options in TESTS.items()
    for values in itertools.product(*options.values())
]
# The suite's decorator makes a numbered method for each line of its table.
NUMBERED = {
    name.rstrip("0123456789"): name for name in vars(suite.ContribTest) if name.startswith("test_")
}


def test_every_test_of_the_suite_is_run():
    assert TESTS.keys() == NUMBERED.keys()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("test", "options"), CASES)
def test_passes(monkeypatch, test, options, optimizer):
    factory, arguments = OPTIMIZERS[optimizer]
    monkeypatch.setattr(suite, "_get_opt_factory", lambda name: factory)
    method = getattr(suite.ContribTest, NUMBERED[test])
    method.__wrapped__(
        suite.ContribTest(NUMBERED[test]),
        opt_name=optimizer,
        opt_kwargs=dict(rank=8, **arguments),
        wrapper_name=None,
        wrapper_kwargs=None,
        **options,
    )
