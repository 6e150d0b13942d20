"""Show that feedback memory keeps a pass key across hundreds of blocks, and that a window alone does not.

    make demo

Trains the three models of configs/passkey.py, two at a time on a core each, and evaluates each by generation from a
streamed state. Prints a table and writes passkey.json and passkey.png to the workdir. Run it again to resume what was
interrupted; finished results are reused, and --clean starts over.
"""

import argparse
import concurrent.futures
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fam_jax.config import UserError, to_json
from fam_jax.config.overrides import Override
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.evaluation import read_evaluation

from . import cli
from .workers import Workers

VARIANTS = ("fam_bounded", "fam", "bswa_m1")
# Labels of the curves in the plot.
LABELS = {
    "fam_bounded": "FAM, bounded, trained with noise",
    "fam": "FAM as in the paper",
    "bswa_m1": "BSWA, 1 memory segment",
}
LENGTHS = (1, 2, 4, 9, 18, 36, 72, 130, 260, 520)
CONFIG = "passkey"
CLOCK = "seconds.json"


class Demo(NamedTuple):
    """What to train and evaluate."""

    workdir: Path
    seed: int = 0
    # Examples per length, and filler lengths in blocks.
    keys: int = 64
    lengths: tuple[int, ...] = LENGTHS
    # Trainings side by side.
    workers: int = 2
    # Config fields of all models.
    overrides: tuple[Override, ...] = ()

    def all_overrides(self) -> tuple[Override, ...]:
        """Return the config fields that differ from the config file; those that the user set come last."""
        return (Override("config.train.seed", str(self.seed)), *self.overrides)


def _check_own(workdir: Path) -> None:
    """Raise :class:`UserError` unless all that is in a folder comes from a demo."""
    names = [path.name for path in workdir.iterdir()] if workdir.is_dir() else [workdir.name]
    if other := [name for name in names if name not in (*VARIANTS, CLOCK, "passkey.json", "passkey.png")]:
        raise UserError(
            f"--clean: {workdir} holds {other[0]}, which is not of a demo; delete the folder yourself, or give another "
            "--workdir"
        )


def _seconds(clock: Path) -> float:
    """Return what earlier runs of the demo took, or 0 if that is not known."""
    try:
        return float(parse_json(clock.read_text()))
    except (OSError, TypeError, ValueError):
        return 0.0


def run_demo(demo: Demo) -> dict[str, Any]:
    """Train and evaluate the models, as far as that is not done yet, and write the results.

    Returns:
      What passkey.json holds.

    Raises:
      UserError: a config field has a mistake, or a command failed.
    """
    todo = {variant: commands(demo, variant) for variant in VARIANTS}
    try:
        demo.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={demo.workdir}: cannot be created ({error.strerror}); give another"
        ) from error
    clock = demo.workdir / CLOCK
    before = _seconds(clock)
    began = time.perf_counter()
    workers = Workers(demo.workers)
    try:
        with concurrent.futures.ThreadPoolExecutor(len(VARIANTS)) as pool:
            jobs = [pool.submit(workers.run, name, commands) for name, commands in todo.items()]
            try:
                for job in concurrent.futures.as_completed(jobs):
                    job.result()
            except BaseException:
                workers.stop()
                raise
    finally:
        seconds = before + time.perf_counter() - began
        clock.write_text(dump_json(seconds))
    models = exact_matches(demo)
    results = {"models": models, "keys": demo.keys, "seconds": round(seconds, 1), "seed": demo.seed}
    (demo.workdir / "passkey.json").write_text(dump_json(results, indent=2) + "\n")
    draw(demo.workdir, models)
    return results


def commands(demo: Demo, variant: str) -> list[list[str]]:
    """Return the commands that train and evaluate a model; none if its results exist.

    Raises:
      ConfigError: a config field is unknown, or its value is not allowed.
    """
    folder = demo.workdir / variant
    result = folder / "result.json"
    if finished(result, wanted_config(demo, variant)):
        return []
    fields = [f"--{path}={text}" for path, text in demo.all_overrides()]
    train = [f"{__package__}.train", f"--config={CONFIG}:{variant}", *fields, f"--workdir={folder}"]
    evaluate = [
        f"{__package__}.evaluate",
        f"--checkpoint={folder}",
        f"--out={result}",
        f"--lengths={','.join(map(str, demo.lengths))}",
        f"--keys={demo.keys}",
    ]
    return [[sys.executable, "-m", *command] for command in (train, evaluate)]


def wanted_config(demo: Demo, variant: str) -> dict[str, Any]:
    """Return the config of a model and its evaluation as it is stored in JSON.

    Raises:
      ConfigError: a config field is unknown, or its value is not allowed.
    """
    values = json.loads(to_json(cli.load_config(f"{CONFIG}:{variant}", demo.all_overrides())))
    values["evaluate"] |= {"filler_blocks": list(demo.lengths), "keys": demo.keys}
    return values


def finished(path: Path, config: dict[str, Any]) -> bool:
    """Return whether a file holds the results of a config, evaluated at all of its lengths, on any mesh."""
    if not path.exists():
        return False
    try:
        found = read_evaluation(path)
    except UserError:  # another version wrote it
        return False
    lengths = {str(length) for length in config["evaluate"]["filler_blocks"]}
    made_by = {**found.config, "mesh": config["mesh"]}
    made_by["evaluate"] = {**made_by["evaluate"], "filler_blocks": config["evaluate"]["filler_blocks"]}
    known = lengths <= set(found.details["groups"])
    return known and made_by == config and found.step == config["train"]["steps"]


def exact_matches(demo: Demo) -> dict[str, dict[str, float]]:
    """Return the fraction of keys that each model retrieved, by model and filler length in blocks."""
    models = {}
    for variant in VARIANTS:
        groups = read_evaluation(demo.workdir / variant / "result.json").details["groups"]
        models[variant] = {str(length): groups[str(length)]["exact_match"] for length in demo.lengths}
    return models


def show(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    table = Table(title=f"Pass keys retrieved, by blocks of filler ({results['keys']} keys each)")
    table.add_column("model", no_wrap=True)
    for length in next(iter(results["models"].values())):
        table.add_column(length, justify="right")
    for name, matches in results["models"].items():
        table.add_row(name, *(f"{match:.2f}" for match in matches.values()))
    Console().print(table)


def draw(workdir: Path, models: dict[str, dict[str, float]]) -> None:
    """Draw the results into WORKDIR/passkey.png."""
    from fam_jax.evaluation.plot import plot_passkey  # matplotlib, which takes a second to import

    config = json.loads((workdir / VARIANTS[0] / "config.json").read_text())
    model = config["model"]
    plot_passkey(
        {LABELS[name]: matches for name, matches in models.items()},
        workdir / "passkey.png",
        trained_blocks=config["data"]["stage_blocks"][-1],
        title=f"PassKey retrieval, {model['num_layers']} layers of width {model['model_dim']}, blocks of "
        f"{model['block_size']} tokens",
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown or malformed.
    """
    parser = cli.Parser("demo", __doc__, fields=True)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    add("--clean", action="store_true", help="delete the workdir first")
    add("--seed", type=cli.at_least(0), default=0, metavar="N", help="default: %(default)s")
    add(
        "--keys",
        type=cli.at_least(1),
        default=64,
        metavar="N",
        help="examples per length; default: %(default)s",
    )
    add(
        "--lengths",
        type=cli.integers,
        default=LENGTHS,
        metavar="N,N,...",
        help=f"filler lengths in blocks; default: {','.join(map(str, LENGTHS))}",
    )
    add(
        "--workers",
        type=cli.at_least(1),
        default=2,
        metavar="N",
        help="trainings side by side; default: %(default)s",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and show its results; return the exit code.

    Raises:
      UserError: the command line or a config field has a mistake, or a command failed.
    """
    arguments = parse_arguments(argv)
    demo = Demo(
        arguments.workdir,
        seed=arguments.seed,
        keys=arguments.keys,
        lengths=arguments.lengths,
        workers=arguments.workers,
        overrides=tuple(arguments.overrides),
    )
    for variant in VARIANTS:
        wanted_config(demo, variant)  # nothing is deleted if a config field has a mistake
    if arguments.clean and demo.workdir.exists():
        _check_own(demo.workdir)
        shutil.rmtree(demo.workdir)
    results = run_demo(demo)
    show(results)
    workdir = demo.workdir
    print(f"{results['seconds'] / 60:.1f} minutes; wrote {workdir}/passkey.json and {workdir}/passkey.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
