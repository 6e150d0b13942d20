"""Compare attention on TPUs by the compiler's own figures: our kernels, JAX's splash attention, the XLA path.

    python -m benchmarks.attention --topology v5p:2x2x1 --json out.json

All cases are training (no past) in bfloat16 on one chip. For each case the benchmark reports the time of the kernels
from the TPU compiler's static profile, the time of the rest of the program from the compiler's cost model, temporary
memory, and the roofline: visible scores at the matrix units' peak. Our kernels and splash attention each get their
operands in their best layout. All figures are estimates; nothing runs on a TPU.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.attention_programs import Case, compile_case, to_json
from benchmarks.record import write_record
from benchmarks.report import print_table
from benchmarks.splash import SplashTiles
from fam_jax.config import ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.plan import ProfileError, check_floor, estimate, parse, static_profile
from fam_jax.plan.attention import LocalShare, kernel_seconds
from launch.cli import ArgumentParser
from launch.errors import user_errors

# Query and key heads of the paper's models
SHAPES = {"1B": (12, 12), "8B": (32, 32), "24B": (32, 1)}
# Extra keys of a block: the FAM length of the paper's models
EXTRA = 64

# Tiles to try for splash attention: queries, keys, keys per product
SPLASH_FORWARD = (
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (512, 1024, 512),
    (1024, 512, 512),
    (2048, 1024, 512),
)
SPLASH_BACKWARD = ((1024, 1024, 512), (1024, 1024, 256), (512, 1024, 512), (1024, 512, 512), (512, 512, 512))


class Profiler:
    """Measure the time of kernels in static profiles. Each program is profiled once."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, int]] = {}

    def seconds(self, case: Case, kernels: Sequence[str] = ()) -> dict[str, float]:
        """Return the seconds of one run of each kernel at the size of the case."""
        reduced = case.reduced()
        if case.implementation == "pallas":
            return self._ours(case, kernels)
        text = to_json(reduced)
        if text not in self.known:
            self.known[text] = static_profile("benchmarks.attention_programs", [text], kernels, timeout=900)
        times = case.batch * case.heads / (reduced.batch * reduced.heads)
        return {name: times * count / case.chip.clock for name, count in self.known[text].items()}

    def _ours(self, case: Case, kernels: Sequence[str]) -> dict[str, float]:
        """Return the same for our kernels, each profiled alone: the simulator crashes on a program with both."""
        model = ModelConfig(
            block_size=case.block_size,
            memory=FamConfig(segments=case.segments, length=case.extra),
            head_dim=case.head_dim,
        )
        share = LocalShare(case.topology, case.batch, case.tokens, case.heads, case.kv_heads)
        spans = kernel_seconds(model, share)
        for name in kernels:
            if name not in spans or spans[name][0] < spans[name][1]:
                raise ProfileError(f"{case.topology}: the compiler gives no figure for {name}")
        return {name: spans[name][0] for name in kernels}


def kernel_names(case: Case) -> list[str]:
    """Return the names of the kernels that a case runs."""
    if case.implementation == "pallas":
        return ["block_attention_forward", *(["block_attention_backward"] if case.gradient else [])]
    assert case.splash is not None
    mqa = "mqa" if case.kv_heads < case.heads else "mha"
    if not case.gradient:
        return [f"splash_{mqa}_fwd_no_residuals"]
    backward = ["dkv"] if case.splash.fused_backward else ["dkv", "dq"]
    return [f"splash_{mqa}_fwd_residuals", *(f"splash_{mqa}_{name}_no_residuals" for name in backward)]


def measure(case: Case, profiler: Profiler) -> dict[str, Any]:
    """Return the record of a case for the JSON file."""
    started = time.perf_counter()
    executable = compile_case(case)
    kernels: dict[str, float] = {}
    if case.implementation != "xla":
        names = kernel_names(case)
        found = profiler.seconds(case, names)
        kernels = {name: found[name] for name in names}
        # Check the sum over all kernels: it is too low if the simulator skipped one.
        check_floor(
            "+".join(names), sum(kernels.values()) * case.chip.clock, case.macs() / case.chip.cores, case.chip
        )
    spans = {name: (seconds, seconds) for name, seconds in kernels.items()}
    result = estimate(parse(executable.as_text() or ""), case.chip, kernels=spans)
    roofline = case.chip.matrix_seconds(case.macs())
    memory = executable.memory_analysis()
    assert memory is not None
    return {
        "milliseconds": 1e3 * result.seconds_low,
        "milliseconds_high": 1e3 * result.seconds_high,
        "kernel_milliseconds": {name: 1e3 * seconds for name, seconds in kernels.items()},
        "roofline_milliseconds": 1e3 * roofline,
        "whole_tile_roofline_milliseconds": 1e3 * case.chip.matrix_seconds(case.macs(whole_tiles=True)),
        "ratio": roofline / result.seconds_low,
        "temporary_bytes": memory.temp_size_in_bytes,
        "method": "cost model of the compiler"
        if case.implementation == "xla"
        else "static profile of the kernels",
        "compile_seconds": time.perf_counter() - started,
    }


def best_splash(case: Case, profiler: Profiler, show: Callable[[str], None]) -> tuple[SplashTiles, list[Any]]:
    """Return the fastest tiles for forward and backward, and the figures of all tiles tried."""
    forward: dict[tuple[int, int, int], float] = {}
    backward: dict[tuple[tuple[int, int, int], bool], float] = {}
    for fused in (False, True):
        for ahead, back in zip(SPLASH_FORWARD, SPLASH_BACKWARD, strict=True):
            tiles = SplashTiles(*ahead, *back, fused)
            show(f"splash attention, tiles {ahead} and {back}{', fused' if fused else ''}")
            tried = dataclasses.replace(case, splash=tiles, gradient=True)
            try:
                found = profiler.seconds(tried, kernel_names(tried))
            except ProfileError as error:
                show(f"    {error}")
                continue
            first, *rest = (found[name] for name in kernel_names(tried))
            forward[ahead] = first
            # The fused kernel writes a partial gradient of the queries per column of tiles. These are summed later.
            parts = tried.tokens / back[1] if fused else 0
            values = parts * case.batch * case.heads * case.tokens * case.head_dim
            # Each bfloat16 value is written and read.
            traffic = 2 * 2 * values
            backward[back, fused] = sum(rest) + traffic / case.chip.hbm_bandwidth
    if not forward:
        raise ProfileError(
            f"{case.topology}: the compiler gives no figure for any tiles of splash attention; choose another topology"
        )
    (best_back, best_fused), best = (
        min(backward, key=backward.__getitem__),
        min(forward, key=forward.__getitem__),
    )
    figures: list[Any] = [{"forward": tiles, "milliseconds": 1e3 * t} for tiles, t in forward.items()]
    figures += [
        {"backward": tiles, "fused": f, "milliseconds": 1e3 * t} for (tiles, f), t in backward.items()
    ]
    return SplashTiles(*best, *best_back, best_fused), figures


def run(topology: str, shapes: Sequence[str]) -> dict[str, Any]:
    """Measure all cases on one chip.

    Returns:
      {"cases": shape -> implementation -> pass -> figures, "splash_tiles": shape -> best and tried tiles}.
    """
    profiler = Profiler()
    results: dict[str, Any] = {"cases": {}, "splash_tiles": {}}
    with Progress() as bar:
        task = bar.add_task(topology, total=len(shapes))

        def show(text: str) -> None:
            bar.console.print(text, highlight=False)

        for name in shapes:
            heads, kv_heads = SHAPES[name]
            base = Case(topology, "pallas", False, heads=heads, kv_heads=kv_heads)
            splash, tried = best_splash(dataclasses.replace(base, implementation="splash"), profiler, show)
            results["splash_tiles"][name] = {"best": splash, "tried": tried}
            found: dict[str, Any] = {}
            results["cases"][name] = found
            variants: dict[str, dict[str, Any]] = {
                f"fam_jax M={EXTRA}": {"extra": EXTRA},
                "fam_jax M=0": {},
                "splash": {"implementation": "splash", "splash": splash},
                f"xla M={EXTRA}": {"implementation": "xla", "extra": EXTRA},
                "xla M=0": {"implementation": "xla"},
            }
            for label, changes in variants.items():
                found[label] = {}
                for which, gradient in (("forward", False), ("forward + backward", True)):
                    case = dataclasses.replace(base, gradient=gradient, **changes)
                    found[label][which] = figures = measure(case, profiler)
                    time_ms, share = figures["milliseconds"], figures["ratio"]
                    show(f"{name}  {label}  {which}: {time_ms:.2f} ms, {share:.0%} of roofline")
            bar.advance(task)
    return results


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table for the terminal."""
    table = []
    for shape, found in results["cases"].items():
        for label, passes in found.items():
            for which, figures in passes.items():
                low, high = figures["milliseconds"], figures["milliseconds_high"]
                span = f"{low:.2f}" if math.isclose(low, high, rel_tol=0.01) else f"{low:.2f} to {high:.2f}"
                memory = f"{figures['temporary_bytes'] / 2**30:.2f}"
                table.append([shape, label, which, span, f"{figures['ratio']:.0%}", memory])
    return table


def main(argv: Sequence[str]) -> None:
    """Measure, print a table, and write the JSON file."""
    parser = ArgumentParser("python -m benchmarks.attention", description=__doc__)
    parser.add_argument(
        "--topology", default="v5p:2x2x1", help="slice whose chip is measured, such as v5p:2x2x1"
    )
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), help="comma-separated list of " + ", ".join(SHAPES)
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    arguments = parser.parse_args(argv)
    shapes = arguments.shapes.split(",")
    if unknown := set(shapes) - SHAPES.keys():
        parser.error(f"--shapes: unknown {', '.join(sorted(unknown))}; choose from {', '.join(SHAPES)}")
    results = run(arguments.topology, shapes)
    columns = ["shape", "implementation", "pass", "ms", "of roofline", "temporary GiB"]
    print_table(f"Attention, {arguments.topology}, one chip", columns, rows(results))
    if arguments.json:
        settings = dataclasses.asdict(Case(arguments.topology, "all", False))
        write_record(arguments.json, "attention", argv, settings, results)
        print(f"written to {arguments.json}")


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
