"""Estimate memory, step time and traffic of a run on a TPU slice. No TPU needed.

    python -m launch.plan --config=configs/fam_1b.py --topology=v5p:2x4x4 --out=plan.json
    python -m launch.plan --config=configs/fam_24b.py --topology=v5e:4x4 --what=serve --streams=8

Compiles the real programs, with the real kernels, with the TPU compiler (the extra `tpu`), and reports memory, a range
for the time of a step, throughput and traffic. These are estimates that were never checked against hardware. The exit
code is 1 if the run does not fit.

--what=train plans the train step; serve plans what launch.generate runs (reading by chunks, writing token by token);
evaluate plans what launch.evaluate runs for the config's task.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from rich.console import Console
from rich.table import Table

from fam_jax.config import Config, MeshConfig, UserError
from fam_jax.config.data import STAGED
from fam_jax.config.strict_json import dump_json

from . import cli
from .tpu.slices import parse_slice

DOES_NOT_FIT = 1

# How to choose a mesh: that of the config, or the best of the sensible ones.
CONFIG, TRY = "config", "try"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed, or has no meaning for what is planned.
    """
    parser = cli.Parser("plan", __doc__, config=True)
    add = parser.add_argument
    slices = "such as v5p:4x4x8, v5e:4x8 or v5litepod-32"
    add("--topology", required=True, type=topology_of, metavar="SLICE", help=slices)
    add("--what", choices=("train", "serve", "evaluate"), default="train", help="default: train")
    add(
        "--mesh",
        type=mesh_choice,
        metavar=f"{CONFIG}|{TRY}|AXIS=N,...",
        help="that of the config (default for train), the best of several (default for the others), or this one",
    )
    add(
        "--tokens",
        type=cli.at_least(1),
        metavar="T",
        help="train: length of the rows; default: from the data",
    )
    add(
        "--streams",
        type=cli.at_least(1),
        metavar="N",
        help="serve: streams at a time (default 1); evaluate: documents (default: from the config)",
    )
    add(
        "--chunk_blocks",
        type=cli.at_least(1),
        metavar="N",
        help="serve, evaluate: blocks read at a time; default: config.evaluate.chunk_blocks",
    )
    add("--out", type=Path, metavar="FILE.json", help="write the plan here, too")
    found = parser.parse_args(argv)
    for name in ("streams", "chunk_blocks") if found.what == "train" else ("tokens",):
        if getattr(found, name) is not None:
            raise UserError(f"--{name}: has no meaning for --what={found.what}; leave it out")
    return found


def topology_of(text: str) -> str:
    """Argument type: GENERATION:TOPOLOGY, which may be given as an accelerator type.

    Raises:
      UserError: there is no such accelerator type.
    """
    if ":" in text:
        return text
    found = parse_slice(text)
    return f"{found.generation}:{found.topology}"


def mesh_choice(text: str) -> str | MeshConfig:
    """Argument type: CONFIG, TRY or a mesh."""
    return text if text in (CONFIG, TRY) else cli.mesh(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, print and write the plan; return the exit code.

    Raises:
      UserError: the command line, the config or the topology has a mistake.
    """
    arguments = parse_arguments(argv)
    config = cli.load_config(arguments.config, arguments.overrides)
    # Imported once the config is known to be right, as Orbax takes seconds.
    from fam_jax.checkpoint.new_file import check_output_file, output_file

    out = arguments.out and arguments.out.expanduser()
    if out:
        check_output_file(out)  # the plan takes minutes
    logging.set_verbosity(logging.WARNING)  # JAX logs that there is no TPU
    console = Console()
    plan = plan_training_run if arguments.what == "train" else plan_streams
    report = plan(console, config, arguments)
    if out:
        with output_file(out) as file:
            file.write(f"{dump_json(report, indent=1)}\n".encode())
        print(f"written to {out}")
    return 0 if report["fits"] else DOES_NOT_FIT


def plan_training_run(console: Console, config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan the train step, print the best plan and return it.

    Raises:
      UserError: no mesh fits the topology and the batch.
    """
    # Imported once the config is known to be right, as TensorFlow takes seconds.
    from fam_jax.data.build import longest_row
    from fam_jax.plan import topology_devices
    from fam_jax.plan.training import advice, best_plan, plan_training, sensible_meshes

    topology = arguments.topology
    tokens = arguments.tokens or longest_row(config.data, block_size=config.model.block_size)
    chips = len(topology_devices(topology))
    meshes = chosen_meshes(arguments.mesh or CONFIG, config)
    meshes = sensible_meshes(config, topology) if meshes is None else meshes
    if not meshes:
        raise UserError(
            f"no mesh of {chips} chips divides the batch of {config.train.batch_size} rows and the model's heads; "
            "change config.train.batch_size or --topology"
        )
    plans = []
    for mesh in announced(console, topology, meshes):
        plans.append(plan_training(config, topology, tokens, mesh))
        console.print(summary(plans[-1].report()), highlight=False)
    best = best_plan(plans)
    report = best.report() | {"tried": [plan.report() for plan in plans] if len(plans) > 1 else []}
    if not best.memory.fits:
        report["advice"] = advice(config, best)
    print_report(console, report)
    return report


def plan_streams(console: Console, config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan generation or evaluation, print the best plan and return it.

    Raises:
      UserError: no mesh fits the topology.
    """
    from fam_jax.plan.serving import SERVE, best_serving, plan_serving, serving_advice, serving_meshes

    topology, serving = arguments.topology, arguments.what == "serve"
    streams = arguments.streams or (1 if serving else config.evaluate.batch_size)
    phases = SERVE if serving or config.data.task.partition(":")[0] in STAGED else ("measure",)
    meshes = chosen_meshes(arguments.mesh or TRY, config)
    meshes = serving_meshes(config, topology, streams) if meshes is None else meshes
    plans = []
    for mesh in announced(console, topology, meshes):
        plans.append(
            plan_serving(config, topology, streams, phases, mesh=mesh, chunk_blocks=arguments.chunk_blocks)
        )
        console.print(summary_of_phases(plans[-1].report()), highlight=False)
    best = best_serving(plans)
    report = best.report() | {"tried": [plan.report() for plan in plans] if len(plans) > 1 else []}
    if not best.fits:
        report["advice"] = serving_advice(config, best)
    print_phases(console, report)
    return report


def chosen_meshes(choice: str | MeshConfig, config: Config) -> list[MeshConfig] | None:
    """Return the mesh that was asked for, or None to try several."""
    if isinstance(choice, MeshConfig):
        return [choice]
    return [config.mesh] if choice == CONFIG else None


def announced(console: Console, topology: str, meshes: list[MeshConfig]) -> Iterator[MeshConfig]:
    """Yield the meshes, and print each before its programs are compiled."""
    for number, mesh in enumerate(meshes, 1):
        console.print(
            f"{number}/{len(meshes)}  compiling for {topology}, {describe(mesh)} ...", highlight=False
        )
        yield mesh


def describe(mesh: MeshConfig) -> str:
    """Return the devices along each axis, for a person to read."""
    return ", ".join(f"{name}={size or 'the rest'}" for name, size in vars(mesh).items())


def summary(report: dict[str, Any]) -> str:
    """Return a plan's memory and speed in one line."""
    memory = (
        f"{rounded(report['hbm_peak_bytes'] / 2**30, 1)} of {report['hbm_capacity_bytes'] / 2**30:.0f} GiB"
    )
    if "step_seconds_low" not in report:
        return f"    {memory}: does not fit"
    return (
        f"    {memory}, {duration(report, 'step_seconds', 2)} per step, "
        f"MFU {span(report, 'mfu', 2)}, compiled in {report['compile_seconds']:.0f} s"
    )


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print a plan as a table."""
    table = Table(
        title=f"{report['topology']}, mesh {report['mesh']}", title_justify="left", show_header=False
    )
    parts = ("peak", "capacity", "parameter", "optimizer", "activation")
    peak, capacity, *rest = (report[f"hbm_{name}_bytes"] / 2**30 for name in parts)
    table.add_row("fits", "yes" if report["fits"] else f"no: {report['advice']}")
    table.add_row("memory of a chip", f"{rounded(peak, 2)} of {capacity:.0f} GiB")
    table.add_row("  parameters + optimizer + step", " + ".join(rounded(size, 2) for size in rest))
    if "step_seconds_low" in report:
        table.add_row("step", duration(report, "step_seconds", 3))
        table.add_row("tokens/s", span(report, "tokens_per_second", 0))
        table.add_row("model FLOPs utilization", span(report, "mfu", 2))
        for kind, seconds in report["seconds"].items():
            table.add_row(f"  {kind}s", seconds_span(seconds["low"], seconds["high"], 3))
        for kind, found in report["collectives"].items():
            size, seconds = rounded(found["bytes"] / 1e9, 2), duration(found, "seconds", 3)
            table.add_row(f"  {kind}", f"{size} GB, {seconds}, {found['hidden']:.0%} hidden")
    table.add_row("compilation", f"{report['compile_seconds']:.0f} s")
    console.print(table)


def summary_of_phases(report: dict[str, Any]) -> str:
    """Return a plan's memory and speed in one line."""
    most = max(report["hbm_peak_bytes"], report["hbm_loading_bytes"])
    memory = f"{rounded(most / 2**30, 1)} of {report['hbm_capacity_bytes'] / 2**30:.0f} GiB"
    spans = [
        f"{name} {span(found, 'tokens_per_second', 0)} tokens/s"
        for name, found in report["phases"].items()
        if "step_seconds_low" in found
    ]
    fits = [] if report["fits"] else ["does not fit"]
    return f"    {', '.join([memory, *fits, *spans])}, compiled in {report['compile_seconds']:.0f} s"


def rounded(value: float, decimals: int) -> str:
    """Return a figure with this many decimals, or with more if its first two digits need them."""
    if 0 < abs(value) < 1:
        decimals = max(decimals, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def span(found: dict[str, Any], name: str, decimals: int) -> str:
    """Return the range of a figure, as in 0.12 to 0.15."""
    return f"{rounded(found[f'{name}_low'], decimals)} to {rounded(found[f'{name}_high'], decimals)}"


def duration(found: dict[str, Any], name: str, decimals: int) -> str:
    """Return the range of a time, as in 0.12 to 0.15 s."""
    return seconds_span(found[f"{name}_low"], found[f"{name}_high"], decimals)


def seconds_span(low: float, high: float, decimals: int) -> str:
    """Return a range of seconds in a unit that suits it: seconds with this many decimals, or ms or µs."""
    if high == 0 or high >= 0.1:
        scale, unit = 1.0, "s"
    else:
        scale, unit = (1e3, "ms") if high >= 1e-4 else (1e6, "µs")
        decimals = 1
    return f"{rounded(low * scale, decimals)} to {rounded(high * scale, decimals)} {unit}"


def print_phases(console: Console, report: dict[str, Any]) -> None:
    """Print a plan as a table."""
    title = f"{report['topology']}, mesh {report['mesh']}, streams: {report['streams']}"
    table = Table(title=title, title_justify="left", show_header=False)
    peak, loading, capacity, parameters, memory = (
        report[f"hbm_{name}_bytes"] / 2**30 for name in ("peak", "loading", "capacity", "parameter", "memory")
    )
    table.add_row("fits", "yes" if report["fits"] else f"no: {report['advice']}")
    table.add_row(
        "memory of a chip", f"{rounded(peak, 2)} of {capacity:.0f} GiB; {rounded(loading, 2)} while loading"
    )
    table.add_row("  parameters, streams", f"{rounded(parameters, 2)}, {rounded(memory, 2)}")
    table.add_row("a stream of any length", f"{rounded(report['bytes_per_stream'] / 2**20, 0)} MiB")
    for name, found in report["phases"].items():
        table.add_row(name, f"{rounded(found['hbm_peak_bytes'] / 2**30, 2)} GiB of a chip")
        if "step_seconds_low" not in found:
            continue
        table.add_row("  step", f"{duration(found, 'step_seconds', 4)}, {found['tokens_per_step']:,} tokens")
        table.add_row("  tokens/s, all streams", span(found, "tokens_per_second", 0))
        if "border_seconds_low" in found:
            table.add_row("  a step that ends a block", f"{duration(found, 'border_seconds', 4)} more")
        for length in (100_000, 1_000_000):
            if f"read_{length}_seconds_low" in found:
                table.add_row(f"  to read {length:,} each", duration(found, f"read_{length}_seconds", 1))
        for kind, sums in found["collectives"].items():
            size, seconds = rounded(sums["bytes"] / 1e6, 1), duration(sums, "seconds", 4)
            table.add_row(f"  {kind}", f"{sums['runs']:,.0f} runs, {size} MB in all, {seconds}")
    table.add_row("compilation", f"{report['compile_seconds']:.0f} s")
    console.print(table)


if __name__ == "__main__":
    cli.run(main)
