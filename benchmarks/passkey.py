"""Combine demo runs with several seeds into one record: `python -m benchmarks.passkey runs/0 runs/1 --json F`.

Each folder is the workdir of `python -m launch.demo --seed=S --workdir=FOLDER`. `launch/demo.py` describes what the
demo measures.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import environment
from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json
from launch.cli import ArgumentParser
from launch.demo import VARIANTS
from launch.errors import user_errors

KEPT = ("exact_match", "teacher_forced_exact_match", "answer_token_accuracy", "questions", "tokens_read")


def read_run(folder: Path) -> dict[str, Any]:
    """Return the results of one seed, with the commands, versions and settings that produced them.

    Raises:
      UserError: the folder does not contain a finished demo.
    """
    try:
        demo = json.loads((folder / "passkey.json").read_text())
        results = {name: json.loads((folder / name / "result.json").read_text()) for name in VARIANTS}
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: no such file; run python -m launch.demo --workdir={folder}"
        ) from None
    steps = {name: _last_line(folder / name / "metrics.jsonl")["step"] for name in VARIANTS}
    return {
        "seed": demo["seed"],
        "command": f"python -m launch.demo --seed={demo['seed']} --workdir={folder} "
        f"--lengths={','.join(demo['models']['fam'])}",
        "models": {
            name: {
                "lengths": {
                    length: {key: row[key] for key in KEPT}
                    for length, row in result["details"]["groups"].items()
                },
                "steps": steps[name],
                "course": _course(folder / name / "metrics.jsonl"),
                "evaluation": result["command"],
                "versions": result["versions"],
                "config": result["config"],
            }
            for name, result in results.items()
        },
    }


def _last_line(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text().splitlines()[-1])


def _course(path: Path) -> list[dict[str, float]]:
    """Return step, loss, exact match, stage and speed of every 50th training step."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("step", "loss", "exact_match", "stage_blocks", "tokens_per_second")
    return [
        {name: line[name] for name in names} for line in lines if line["step"] % 50 == 0 and "loss" in line
    ]


def show(runs: Sequence[dict[str, Any]]) -> None:
    """Print a table with a row per model and seed."""
    lengths = list(runs[0]["models"]["fam"]["lengths"])
    table = Table(title="Pass key retrieved, by blocks of filler")
    table.add_column("model", no_wrap=True)
    for heading in ("seed", *lengths):
        table.add_column(heading, justify="right")
    for name in VARIANTS:
        for run in runs:
            found = run["models"][name]["lengths"]
            table.add_row(
                name,
                str(run["seed"]),
                *(f"{found[n]['exact_match']:.2f}" if n in found else "" for n in lengths),
            )
    Console().print(table)


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Read the runs, print a table and write the record."""
    parser = ArgumentParser(prog="benchmarks.passkey", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="workdirs of the demo, one per seed")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    arguments = parser.parse_args(argv)
    runs = [read_run(folder) for folder in arguments.folders]
    show(runs)
    if arguments.json:
        record = {
            "benchmark": "passkey",
            "command": shlex.join(["python", "-m", "benchmarks.passkey", *argv]),
            "environment": environment(),
            "runs": runs,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(dump_json(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
