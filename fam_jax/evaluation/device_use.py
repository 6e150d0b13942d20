"""How many programs JAX compiles, and how much memory devices need."""

import functools
from typing import Any

import jax

# The event that JAX records for every program, whether XLA compiles it or a cache on disk has it.
_EVENT = "/jax/core/compile/backend_compile_duration"
_counts = {"programs": 0}


@functools.cache
def _listen() -> None:
    def count(event: str, duration_secs: float, **_: Any) -> None:
        _counts["programs"] += event == _EVENT

    jax.monitoring.register_event_duration_secs_listener(count)


class DeviceUse:
    """Counts from its creation on."""

    def __init__(self) -> None:
        _listen()
        self._before = _counts["programs"]

    def figures(self) -> dict[str, int | None]:
        """Return what was needed so far.

        Returns:
          programs: programs compiled since creation, small ones such as indexing an array included.
          peak_device_bytes: most bytes in use at one time on a device of this process, since it began; None where the
          devices do not tell, as CPUs.
        """
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        known = [int(peak) for peak in peaks if peak is not None]
        return {
            "programs": _counts["programs"] - self._before,
            "peak_device_bytes": max(known, default=None),
        }
