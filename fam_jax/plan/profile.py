"""Read the cycles of kernels from the TPU compiler's simulation of the scheduled program (the "static profile").

What the figures mean, found by experiments with libtpu 0.0.42:

- They are cycles of core 0. On a chip with two cores, the grid is split along its first parallel dimension of even
  length, and core 0 takes the first half. Its cycles are those of the chip only if both halves do equal work: a kernel
  that works in the second half of the grid alone has a figure near zero. If no parallel dimension has even length, core
  0 takes the larger share. Without a parallel dimension, the second core is idle.
- The simulator walks loops and grids step by step, so its time and memory grow with the work. Simulate as few heads and
  rows as keep all cores busy, and multiply.
- Branches follow their predicates, exactly for comparisons of program ids. A branch on data counts as never taken, a
  branch on `%` of a program id as always taken.
- The simulator models the latency of HBM transfers, but not the bandwidth of HBM.
- In a small program, the compiler moves operands to fast memory before the kernel starts; in a large one it cannot. The
  kernel then differs, and simulating it takes ten times as long. `HBM_OPERANDS` turns this off.
- Some operations crash the simulator, sometimes after it has written its figure. Profile such kernels one per process.
- The simulator does not support v4.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json
from fam_jax.plan.chips import Chip
from fam_jax.plan.compile import ENVIRONMENT, LIBRARY, require_compiler

# Seconds for one kernel.
LIMIT_S = 240
HBM_OPERANDS = "--xla_msa_enable=false"


class ProfileError(UserError):
    """A kernel has no figure, or an impossible one."""


def run_module(
    module: str, arguments: Sequence[str], *, libtpu_options: Sequence[str] = (), timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` in a new process that can compile for TPUs.

    A new process is needed because libtpu reads its options only once.

    Raises:
      UserError: libtpu is not installed.
      subprocess.TimeoutExpired: after `timeout` seconds.
    """
    require_compiler()
    paths = [str(LIBRARY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | ENVIRONMENT
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    given = [environment.get("LIBTPU_INIT_ARGS", ""), *libtpu_options]
    environment["LIBTPU_INIT_ARGS"] = " ".join(filter(None, given))
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def static_profile(
    module: str,
    arguments: Sequence[str],
    kernels: Sequence[str] = (),
    *,
    libtpu_options: Sequence[str] = (HBM_OPERANDS,),
    timeout: float = 600,
) -> dict[str, int]:
    """Return the cycles of core 0 for every HLO operation of the programs that `python -m module` compiles.

    Args:
      module: a module that compiles for a TPU, for instance with :func:`fam_jax.plan.compile_on`, and runs nothing.
      arguments: command line of the module.
      kernels: names of kernels that must have a figure, without the number that XLA may append (".1"). If empty, the
        result has all operations that the simulator reaches.
      libtpu_options: flags of libtpu.
      timeout: seconds for each process.

    Returns:
      {HLO name without its number: cycles}; the top of this file says what they mean.

    Raises:
      ProfileError: the module fails, or one of `kernels` has no figure.
      UserError: libtpu is not installed.
    """

    def attempt(*only: str) -> tuple[dict[str, int], subprocess.CompletedProcess[str]]:
        with tempfile.TemporaryDirectory() as folder:
            options = [*libtpu_options, f"--xla_jf_dump_static_llo_profile_to={folder}"]
            options += [f"--xla_jf_dump_only_matching_hlo={name}" for name in only]
            result = run_module(module, arguments, libtpu_options=options, timeout=timeout)
            return read_profiles(Path(folder)), result

    found, result = attempt()
    if result.returncode and not (kernels and _simulator_died(result)):
        raise ProfileError(f"static profile of {module}: {failure(result)}")
    for name in kernels:
        if name not in found:
            again, result = attempt(name)
            if name not in again:
                raise ProfileError(f"static profile of {name}: missing; {failure(result)}")
            found[name] = again[name]
    return found


def kernel_cycles(module: str, task: Mapping[str, Any], kernel: str, macs: float, chip: Chip) -> int | None:
    """Return the cycles of the kernel that `python -m module TASK` compiles; None if it has no figure.

    Args:
      module: as in :func:`static_profile`.
      task: the module's argument, passed as JSON.
      kernel: name of the kernel.
      macs: as in :func:`check_floor`.
      chip: as in :func:`check_floor`.

    Raises:
      UserError: the TPU compiler is not installed, or the figure is less than the matrix units alone need.
    """
    try:
        count = static_profile(module, [dump_json(task)], (kernel,), timeout=LIMIT_S)[kernel]
    except (ProfileError, subprocess.TimeoutExpired):
        return None
    check_floor(kernel, count, macs, chip)
    return count


def read_profiles(folder: Path) -> dict[str, int]:
    """Return {HLO name without its number: cycles} for all profiles in a folder."""
    texts = [path.read_text() for path in sorted(folder.glob("*_static_llo_profile.textproto"))]
    pattern = re.compile(r'hlo_op_name: "([^"]+?)(?:\.\d+)?"\s+estimated_cycles: (\d+)')
    return {match[1]: int(match[2]) for text in texts if (match := pattern.search(text))}


def check_floor(name: str, cycles: float, macs: float, chip: Chip) -> None:
    """Reject a figure so low that the simulator must have missed work.

    Args:
      name: the kernel's name.
      cycles: the figure, of one core.
      macs: the fewest multiply-adds that this core has to do.
      chip: the core's chip.

    Raises:
      ProfileError: the matrix units alone need more cycles.
    """
    floor = macs / chip.macs_per_cycle
    if cycles < floor:
        raise ProfileError(
            f"static profile of {name}: {cycles:,.0f} cycles are below the {floor:,.0f} that its matrix products need; "
            "check whether a branch depends on data or core 0 has less than its share of the work"
        )


def failure(result: subprocess.CompletedProcess[str]) -> str:
    """Return why a process failed, in one line: libtpu's fatal message, or the last line of a traceback."""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    fatal = [line.partition("] ")[2] for line in lines if re.match(r"F\d{4} ", line)]
    last = (
        fatal[:1]
        or [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)][-1:]
        or lines[-1:]
    )
    text = last[0] if last else "no message"
    return f"{text[:300]} (exit code {result.returncode})"


def _simulator_died(result: subprocess.CompletedProcess[str]) -> bool:
    """Return whether a signal ended the process. Python's own errors have positive exit codes."""
    return result.returncode < 0
