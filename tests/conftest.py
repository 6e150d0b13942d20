"""Settings of all tests: CPU with eight simulated devices, exact matmuls, reproducible Hypothesis runs."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

from tests.flags import xla_flags

DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read once, when JAX starts its first backend.
os.environ["XLA_FLAGS"] = f"{xla_flags(DEVICES)} {os.environ.get('XLA_FLAGS', '')}"

# Compiled programs, shared by the workers of pytest-xdist, which inherit the environment, and the programs that tests
# start.
CACHE = "JAX_COMPILATION_CACHE_DIR"
own_cache = tempfile.mkdtemp(prefix="fam_jax_tests_") if CACHE not in os.environ else None
if own_cache:
    os.environ[CACHE] = own_cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# Tracing makes very many objects and little garbage.
gc.set_threshold(20_000, 20, 20)

# Compilation makes the first example far slower than the others, so there is no deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
# For `make soak`, as --hypothesis-profile=soak: see tests/fuzz/hostile.py.
hypothesis.settings.register_profile("soak", deadline=None, max_examples=10_000, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_unconfigure() -> None:
    """Remove the compiled programs, in the process that made the folder."""
    if own_cache:
        shutil.rmtree(own_cache, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> Iterator[None]:
    """Keep the garbage collector from searching what all earlier modules left, again and again: it takes minutes."""
    yield
    gc.collect()
    gc.freeze()
