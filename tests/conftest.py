"""Settings of all tests: CPU with eight simulated devices, exact matmuls, reproducible Hypothesis runs."""

import os

DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read once, when JAX starts its first backend.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# Compilation makes the first example far slower than the others, so there is no deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
