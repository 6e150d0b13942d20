"""Search for the tiles of the attention kernels that take the fewest simulated cycles.

    python -m benchmarks.tune_attention --topology v5p:2x2x1 --record

The TPU compiler compiles every candidate and gives its static profile. No TPU is needed. With `--record` the best
candidates are written to `fam_jax/kernels/pallas/tiles.json`, which the kernels read.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks.record import write_record
from benchmarks.report import print_table
from fam_jax.config import UserError
from fam_jax.kernels.pallas import tiles
from fam_jax.plan.attention import Problem, cycles, device_kind
from launch.cli import ArgumentParser
from launch.errors import user_errors

SIDES = (128, 256, 512, 1024)


def forward_candidates(problem: Problem) -> Iterator[tiles.Tiles]:
    """Yield tiles for the resident forward kernel."""
    for rows, keys in itertools.product(SIDES, SIDES[1:]):
        if problem.block_size % rows == 0 and keys <= problem.block_size:
            yield dataclasses.replace(problem.tiles(), rows=rows, keys=keys)


def backward_candidates(problem: Problem) -> Iterator[tiles.Tiles]:
    """Yield tiles for the resident backward kernel."""
    for rows, keys in itertools.product(SIDES[1:], SIDES[1:]):
        if problem.block_size % keys == 0 and rows <= problem.block_size:
            yield dataclasses.replace(problem.tiles(), back_rows=rows, back_keys=keys)


def search(problem: Problem) -> dict[str, list[dict[str, Any]]]:
    """Return the candidates of both passes with their cycles per head and core.

    Cycles are None where the compiler gives no figure: it rejects kernels that need too much fast memory, and cannot
    profile v4.
    """
    found: dict[str, list[dict[str, Any]]] = {"forward": [], "backward": []}
    plan = [("forward", candidate) for candidate in forward_candidates(problem)]
    plan += [("backward", candidate) for candidate in backward_candidates(problem)]
    for number, (which, candidate) in enumerate(plan, 1):
        fields = ("rows", "keys") if which == "forward" else ("back_rows", "back_keys")
        sizes = {field: getattr(candidate, field) for field in fields}
        count = cycles(problem, which, candidate)
        found[which].append({**sizes, "cycles": count})
        print(f"{number}/{len(plan)}  {which} {sizes}: {count or 'no figure'}", flush=True)
    return found


def best(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the candidate with the fewest cycles."""
    return min((r for r in results if r["cycles"]), key=lambda r: r["cycles"])


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Search, print a table and, with --record, record the choice."""
    parser = ArgumentParser(prog="benchmarks.tune_attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--topology", default="v5p:2x2x1", help="slice of the generation to tune for (default: v5p:2x2x1)"
    )
    parser.add_argument("--block_size", type=int, default=1024, help="C")
    parser.add_argument("--segments", type=int, default=3, help="m")
    parser.add_argument("--fam", type=int, default=64, help="M")
    parser.add_argument("--head_dim", type=int, default=128, help="hd")
    parser.add_argument("--record", action="store_true", help=f"write the choice to {tiles.RECORD.name}")
    parser.add_argument("--json", type=Path, help="write all candidates to this file")
    arguments = parser.parse_args(argv)
    problem = Problem(
        topology=arguments.topology,
        block_size=arguments.block_size,
        segments=arguments.segments,
        extra=arguments.fam,
        head_dim=arguments.head_dim,
    )
    found = search(problem)
    silent = [which for which, results in found.items() if not any(r["cycles"] for r in results)]
    if silent:
        raise UserError(
            f"{problem.topology}: the compiler gives no figure for any {' or '.join(silent)} kernel; "
            "tune for another slice"
        )
    for which, results in found.items():
        ordered = sorted((r for r in results if r["cycles"]), key=lambda r: r["cycles"])
        print_table(f"{which}, {problem.topology}", list(ordered[0]), [list(r.values()) for r in ordered])
    if arguments.json:
        write_record(arguments.json, "tune_attention", argv, problem, found)
    if arguments.record:
        choice = {
            name: value
            for results in found.values()
            for name, value in best(results).items()
            if name != "cycles"
        }
        tiles.record(device_kind(problem.topology), problem.geometry(), jnp.bfloat16, choice)
        print(f"recorded {choice} in {tiles.RECORD}")


if __name__ == "__main__":
    main(sys.argv[1:])
