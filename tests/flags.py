"""XLA flags of the tests.

Compilation takes most of the time of most tests, and no test runs long enough to need the optimizations. These flags
compile a gradient of a tiny model about six times faster than the defaults.
"""

QUICK = (
    "--xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def xla_flags(devices: int = 1) -> str:
    """Return XLA_FLAGS for a process with that many simulated CPU devices and fast compilation."""
    return f"{QUICK} --xla_force_host_platform_device_count={devices}"
