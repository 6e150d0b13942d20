"""Write the metrics of a run to a JSONL file and to TensorBoard."""

import json
import math
import time
from typing import Any, Self

from etils import epath
from tensorboardX import SummaryWriter

from fam_jax.config.strict_json import dump_json
from fam_jax.training.bucket_sync import Mirror

# Seconds between uploads of a run's metrics to its bucket; every checkpoint uploads them too.
UPLOAD_SECONDS = 60.0


class MetricsWriter:
    """Write `metrics.jsonl` and TensorBoard event files to a run's folder; a context manager."""

    def __init__(self, workdir: epath.Path, *, resume_step: int):
        """Open the files, and drop the lines that an interrupted run wrote after `resume_step`."""
        self._mirror = Mirror(workdir)
        self._uploaded_at = time.monotonic()
        path = self._mirror.fetch("metrics.jsonl")
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(self._mirror.local / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line of JSON; numbers also go to TensorBoard. Values that are not finite become null."""
        self._file.write(dump_json({"step": step, **values}) + "\n")
        for name, value in _scalars(values):
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)
        if time.monotonic() - self._uploaded_at > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make sure that everything written so far survives if the process is killed."""
        self._events.flush()
        self._mirror.upload()
        self._uploaded_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()
        self._mirror.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a truncated line


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((prefix + name, float(value)))
    return found
