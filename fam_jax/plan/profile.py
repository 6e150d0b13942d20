"""Cycles of kernels, as the TPU compiler's own simulation of the scheduled program counts them ("static profile").

What a figure is, found by experiments (libtpu 0.0.42):

- Cycles of core 0. Where a chip has two cores and the grid a parallel dimension, the grid is split along the first such
  dimension of even length, and core 0 takes the first half. That is the chip's time only if the halves are equal: a
  kernel of which only the later half of the grid does work has a figure of next to nothing. With an odd count core 0
  takes the larger share. No parallel dimension, no second core.
- Loops and grids are walked step by step, so time and memory of the simulation grow with the work. Take few heads and
  rows, as few as keep all cores busy, and multiply.
- A branch is followed by its predicate. That is exact where the predicate compares program ids; one that depends on
  data counts as never taken, one with `%` of a program id as always taken.
- The bandwidth of HBM is not modelled. A transfer's latency is.
- Operands of a small program are put into fast memory ahead of the kernel, as those of a large one cannot be: another
  kernel in effect, and simulating it takes ten times the time and memory. `HBM_OPERANDS` forbids it.
- The simulator dies of some operations, at times after it has written its figure; each kernel then needs a process of
  its own. It does not know v4 at all.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fam_jax.config import UserError
from fam_jax.plan.chips import Chip
from fam_jax.plan.compile import ENVIRONMENT, LIBRARY, require_compiler

LIMIT_S = 240  # for one kernel
HBM_OPERANDS = "--xla_msa_enable=false"


class ProfileError(UserError):
    """There is no figure, or it cannot be true."""


def run_module(
    module: str, arguments: Sequence[str], *, libtpu_options: Sequence[str] = (), timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` in a fresh process that can compile for TPUs: the library reads its options once.

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
    """Cycles of core 0 by HLO operation, of what `python -m module` compiles.

    Args:
      module: compiles something for a TPU, as by :func:`fam_jax.plan.compile_on`, and runs nothing.
      arguments: of the module.
      kernels: names to be found, as their calls give them (XLA may add ".1"); empty for all that the simulator reaches.
      libtpu_options: further flags of the library.
      timeout: seconds for each process.

    Returns:
      {HLO name without its number: cycles}. See the head of this file for what they mean.

    Raises:
      ProfileError: the module fails, or a kernel asked for has no figure.
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
        raise ProfileError(f"profile of {module}: {failure(result)}")
    for name in kernels:
        if name not in found:
            again, result = attempt(name)
            if name not in again:
                raise ProfileError(f"no profile of kernel {name}: {failure(result)}")
            found[name] = again[name]
    return found


def kernel_cycles(module: str, task: Mapping[str, Any], kernel: str, macs: float, chip: Chip) -> int | None:
    """Cycles of the kernel that `python -m module TASK`, with the task in JSON, compiles; None if there is no figure.

    Args:
      module: as of :func:`static_profile`.
      task: its argument.
      kernel: its name.
      macs: as of :func:`check_floor`.
      chip: likewise.

    Raises:
      UserError: the TPU compiler is not installed, or its figure is below what the matrix units alone need.
    """
    try:
        count = static_profile(module, [json.dumps(task)], (kernel,), timeout=LIMIT_S)[kernel]
    except (ProfileError, subprocess.TimeoutExpired):
        return None
    check_floor(kernel, count, macs, chip)
    return count


def read_profiles(folder: Path) -> dict[str, int]:
    """{HLO name without its number: cycles} of all profiles that the compiler left in `folder`."""
    texts = [path.read_text() for path in sorted(folder.glob("*_static_llo_profile.textproto"))]
    pattern = re.compile(r'hlo_op_name: "([^"]+?)(?:\.\d+)?"\s+estimated_cycles: (\d+)')
    return {match[1]: int(match[2]) for text in texts if (match := pattern.search(text))}


def check_floor(name: str, cycles: float, macs: float, chip: Chip) -> None:
    """Refuses a figure that no kernel can reach: the simulator missed work.

    Args:
      name: of the kernel.
      cycles: of the core that the figure stands for.
      macs: multiplications and additions that this core cannot do without.
      chip: the core's.

    Raises:
      ProfileError: the matrix units alone would take longer.
    """
    floor = macs / chip.macs_per_cycle
    if cycles < floor:
        raise ProfileError(
            f"profile of {name}: {cycles:,.0f} cycles are below the {floor:,.0f} that its matrix products take at "
            "least; does a branch depend on data, or core 0 have less than its share?"
        )


def kernel_seconds(cycles: float, hbm_bytes: float, chip: Chip) -> float:
    """Time of a kernel whose busiest core takes `cycles`, and whose operands and results pass through HBM once."""
    return max(cycles / chip.clock, hbm_bytes / chip.hbm_bandwidth)


def failure(result: subprocess.CompletedProcess[str]) -> str:
    """Why a process ended, in a line: the library's own fatal message, or the last line of a traceback."""
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
    """By a signal; Python's own errors have positive codes."""
    return result.returncode < 0
