"""Run all benchmarks, as `make bench` does: print tables and write a JSON file for each."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fam_jax.config import UserError
from launch.cli import ArgumentParser
from launch.errors import user_errors

BENCHMARKS = ("training", "decoding")


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Run the benchmarks one after another, each in a new process."""
    parser = ArgumentParser(prog="benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="use tiny models, as a test")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for the JSON files (default: runs/bench)"
    )
    arguments = parser.parse_args(argv)
    for name in BENCHMARKS:
        path = arguments.out / f"{name}.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", f"--json={path}"]
        code = subprocess.run([*command, "--quick"] if arguments.quick else command).returncode
        if code:
            raise UserError(f"{name}: the benchmark failed with exit code {code}; see its output above")
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
