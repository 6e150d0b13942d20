"""Evaluates a checkpoint on PassKey retrieval, by generation from streamed memory.

    python -m launch.evaluate --checkpoint=runs/passkey --lengths=4,9,18,36

Restores the parameters alone, on whatever devices there are, with the config of the run. Prints a table and writes
all results, with what made them, as JSON: by default to evaluation_STEP.json in the checkpoint's folder.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import rich.console
import rich.progress
import rich.table
from etils import epath

from fam_jax.config import Config, MeshConfig, UserError, validate
from fam_jax.generate.restore import load_model
from fam_jax.sharding import make_mesh
from launch.errors import ArgumentParser, integers, user_errors

VERSIONS = ("fam-jax", "jax", "flax", "numpy")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `lengths` and `mesh` as tuples of integers.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = ArgumentParser(prog="python -m launch.evaluate", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir of a training run")
    parser.add_argument(
        "--step", "--restore_step", type=int, help="saved step to evaluate; default: the latest"
    )
    parser.add_argument("--lengths", type=integers, metavar="N,N,...", help="fillers to evaluate, in blocks")
    parser.add_argument("--keys", type=int, help="examples per length")
    parser.add_argument("--batch_size", type=int, help="examples at a time")
    parser.add_argument("--mesh", type=integers, metavar="DATA,FSDP,TENSOR", default=(0, 1, 1),
                        help="devices along each axis of the mesh; default: all along data")  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE.json", help="default: evaluation_STEP.json in the checkpoint's folder"
    )
    found = parser.parse_args(arguments)
    if len(found.mesh) != 3:
        raise UserError(f"argument --mesh: expected three numbers such as 0,1,1, got {len(found.mesh)}")
    return found


def with_arguments(config: Config, arguments: argparse.Namespace) -> Config:
    """The run's config, changed where an argument says so.

    Raises:
      ConfigError: the changed config is not valid.
    """
    changes = {"filler_blocks": arguments.lengths, "keys": arguments.keys, "batch_size": arguments.batch_size}
    given = {name: value for name, value in changes.items() if value is not None}
    config = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, **given), mesh=MeshConfig(*arguments.mesh)
    )
    validate(config)
    return config


def provenance(config: Config, step: int) -> dict[str, Any]:
    """What made the results: command, step, config, versions, devices."""
    devices = jax.devices()
    return {
        "command": shlex.join(["python", "-m", "launch.evaluate", *sys.argv[1:]]),
        "step": step,
        "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[int, int, int], None]]:
    """A bar on stderr for each length, to be told (blocks, done, total); none if that is no terminal."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bars: dict[int, rich.progress.TaskID] = {}

        def show(blocks: int, done: int, total: int) -> None:
            if blocks not in bars:
                bars[blocks] = progress.add_task(f"{blocks} blocks")
            progress.update(bars[blocks], completed=done, total=total)

        yield show


def print_table(results: dict[str, Any], title: str) -> None:
    """One row per length."""
    table = rich.table.Table(title=title)
    for heading in (
        "blocks",
        "tokens read",
        "keys",
        "exact match",
        "teacher-forced",
        "answer tokens",
        "seconds",
    ):
        table.add_column(heading, justify="right")
    for blocks, row in results["lengths"].items():
        shares = (
            row[name] for name in ("exact_match", "teacher_forced_exact_match", "answer_token_accuracy")
        )
        size = (blocks, f"{row['tokens_read']:,}", f"{row['keys']:,}")
        table.add_row(*size, *(f"{share:.1%}" for share in shares), f"{row['seconds']:.1f}")
    rich.console.Console(width=None if sys.stdout.isatty() else 100).print(table)


def write_json(path: epath.Path, results: dict[str, Any]) -> None:
    """Writes the file; it appears only when it is complete.

    Raises:
      UserError: it cannot be written.
    """
    unfinished = path.parent / f"{path.name}.tmp"
    try:
        unfinished.write_text(json.dumps(results, indent=2) + "\n")
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --out") from error


@user_errors()
def main() -> None:
    """Entry point."""
    arguments = parse_arguments()
    mesh = make_mesh(MeshConfig(*arguments.mesh))
    config, params, step = load_model(arguments.checkpoint, arguments.step, mesh)
    config = with_arguments(config, arguments)
    # TensorFlow takes seconds to load: not before it is known that there is a checkpoint.
    from fam_jax.data.vocabulary import load_vocabulary
    from fam_jax.evaluate.passkey import evaluate_passkey

    vocabulary = load_vocabulary(config.data.vocabulary)
    with progress_bars() as show:
        results = evaluate_passkey(config, params, vocabulary=vocabulary, on_progress=show)
    if jax.process_index() == 0:
        print_table(results, f"PassKey retrieval, step {step} of {arguments.checkpoint}")
        default = os.path.join(arguments.checkpoint, f"evaluation_{step}.json")
        out = epath.Path(os.path.expanduser(arguments.out or default))
        write_json(out, provenance(config, step) | results)
        print(f"written to {out}")


if __name__ == "__main__":
    main()
