"""Every test runs on the CPU, seen by JAX as eight devices, so that sharded code runs in CI."""

import functools
import gc
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from paths import SHARED_DATA


def _set_up_jax(compiled: str) -> None:
    """For this process, pytest's workers, and the commands that tests run."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # Most of the time of most tests is that of compiling. It takes a fraction of it without most
    # optimizations, with the older of XLA's two code generators, with no program cut into parts to
    # be compiled side by side, without the lines of Python that wrote an operation, and with what
    # is compiled shared.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    faster = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {faster}"
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(start, capture_output=True).returncode:  # so ends XLA at an unknown flag
        os.environ["XLA_FLAGS"] = flags


if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="galore-optax-compiled-")
    _set_up_jax(_compiled.name)

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

# JAX makes a context of MLIR for each program, which takes a tenth of the time: here the programs
# that a thread compiles for one file's tests share one.
_make_context = getattr(mlir, "make_ir_context", None)  # JAX's own: it may be renamed
_context_of_thread = functools.cache(lambda thread: _make_context())
if _make_context is not None:
    mlir.make_ir_context = lambda: _context_of_thread(threading.get_ident())

# Tracing makes many objects that live as long as a file's tests: by default the collector looks
# through them so often that it takes an eighth of the time.
gc.set_threshold(200_000, 20, 20)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the checkout; tests that need it skip, saying so, where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="module", autouse=True)
def _forget():
    """What JAX keeps of a file's functions would slow the garbage collector down in later ones.

    So would all modules: commands collect garbage when they end.
    """
    gc.freeze()
    yield
    jax.clear_caches()
    _context_of_thread.cache_clear()
    gc.collect()
    gc.freeze()


@pytest.fixture
def optimized():
    """For a test of what XLA makes of a program: with all of its optimizations."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
