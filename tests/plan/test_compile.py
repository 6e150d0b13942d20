"""The TPU compiler as a guest of this process: no noise, and no signal handlers of its own."""

import signal
import subprocess
import sys

from tests.launch.running import ROOT, environment
from tests.plan.programs import needs_compiler

TERMINATED = """
import os, signal, sys, threading
from fam_jax.plan.compile import topology_devices
if sys.argv[1:] == ["ours"]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(len(topology_devices("v5e:2x2")), len(topology_devices("v5p:2x2x1")), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait(20)
"""
VARIABLES = ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")


def terminated(*arguments: str) -> tuple[int, str, str]:
    """Return the exit code and the output of a process that gets a SIGTERM after it loads the compiler."""
    kept = {name: value for name, value in environment().items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED, *arguments],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@needs_compiler
def test_it_prints_nothing_and_leaves_sigterm_alone() -> None:
    assert terminated() == (-signal.SIGTERM, "4 4\n", "")
    assert terminated("ours") == (7, "4 4\n", "")
