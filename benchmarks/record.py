"""Write the record of a benchmark: its results, and the facts needed to judge and repeat them."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fam_jax.config.strict_json import dump_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
ROOT = Path(__file__).resolve().parent.parent


def write_record(path: Path, benchmark: str, argv: Sequence[str], settings: Any, results: Any) -> None:
    """Write a JSON file.

    Args:
      path: the file. Its folder is created.
      benchmark: name of the module in benchmarks/.
      argv: command line of the module.
      settings: settings of the measurement, with seeds: dataclasses, dicts, lists and plain values.
      results: results, in values of the same types.
    """
    record = {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *argv]),
        "environment": environment(),
        "settings": settings,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_json(record, indent=1, default=dataclasses.asdict) + "\n")


def environment() -> dict[str, Any]:
    """Return a description of machine, software and time."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        # A value far above the benchmark's own load shows that other programs were running.
        "load_average": list(os.getloadavg()),
        "device": f"{len(jax.devices())} x {device.platform} ({device.device_kind})",
    }


def cpu_model() -> str:
    """Return the name of the processor, or of its architecture if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_revision() -> str | None:
    """Return the commit, with "-dirty" if tracked files have changes; None without git or a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
