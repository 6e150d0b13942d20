"""Break runs at random by kills, damage, full disks and lost workers; count what is lost, silently wrong or hung.

    python -m benchmarks.soak --workdir=runs/soak --json=docs/results/trust.json

Every trial is a line of WORKDIR/trials.jsonl, so the same command goes on where it was stopped. `--parts` and the
counts choose a part. The last line of output, and the exit code, say whether anything was lost, silently wrong or hung.
"""

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import write_record
from benchmarks.soak_damage import damages
from benchmarks.soak_processes import Runs, disks, kills, leaks, workers
from fam_jax.config.strict_json import dump_json
from launch import cli
from launch.errors import user_errors

# What may not happen, as the outcome of a trial.
BAD = ("lost", "silent", "hung", "traceback")

Trial = dict[str, Any]
# (what to break, random numbers, trials that are still missing) -> trials.
Part = Callable[[Runs, random.Random, int], Iterator[Trial]]
PARTS: dict[str, Part] = {
    "kills": kills, "damages": damages, "disks": disks, "workers": workers, "leaks": leaks,
}  # fmt: skip


def parse_arguments(argv: Sequence[str]) -> Any:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("runs/soak"), help="folder of the trials; default: runs/soak")
    add("--json", type=Path, default=Path("runs/soak/trust.json"), help="file of the results")
    add("--parts", type=cli.words, default=tuple(PARTS), help="default: all, " + ",".join(PARTS))
    add("--kills", type=cli.at_least(0), default=50, help="processes to kill; default: 50")
    add("--damages", type=cli.at_least(0), default=1000, help="files to damage; default: 1000")
    add("--disks", type=cli.at_least(0), default=4, help="runs on a full disk; default: 4")
    add("--workers", type=cli.at_least(0), default=2, help="workers to kill; default: 2")
    add(
        "--leaks",
        type=cli.at_least(0),
        default=200,
        help="checkpoints to save one after another; default: 200",
    )
    add("--seed", type=cli.seed, default=0, help="of the times, files and kinds of damage")
    return parser.parse_args(argv)


@user_errors()
def main(argv: Sequence[str]) -> int:
    """Run the trials that are missing, write the results, and return 1 if there is a bad one."""
    arguments = parse_arguments(argv)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    log = arguments.workdir / "trials.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    runs = Runs(arguments.workdir.absolute())
    for name in arguments.parts:
        done = sum(trial["part"] == name for trial in found)
        missing = getattr(arguments, name) - done
        if missing <= 0:
            continue
        for trial in PARTS[name](runs, random.Random(f"{arguments.seed} {name} {done}"), missing):
            found.append({"part": name, **trial})
            with log.open("a") as file:
                file.write(dump_json(found[-1]) + "\n")
            if trial["outcome"] in BAD:
                print(f"{name}: {trial}", file=sys.stderr, flush=True)
            write_record(arguments.json, "soak", argv, {"seed": arguments.seed}, summary(found))
    write_record(arguments.json, "soak", argv, {"seed": arguments.seed}, summary(found))
    bad = [trial for trial in found if trial["outcome"] in BAD]
    shutil.rmtree(runs.scratch, ignore_errors=True)
    print(f"{len(found)} trials; " + ", ".join(f"{each} {count_of(found, each)}" for each in BAD))
    return int(bool(bad))


def count_of(trials: Sequence[Trial], outcome: str) -> int:
    """Return how many trials had an outcome."""
    return sum(trial["outcome"] == outcome for trial in trials)


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return counts of outcomes by part and by what was done, and the bad trials in full."""
    parts: dict[str, Any] = {}
    for name in PARTS:
        own = [trial for trial in trials if trial["part"] == name]
        if own:
            what = sorted({trial["what"] for trial in own})
            parts[name] = {
                "trials": len(own),
                "outcomes": dict(Counter(trial["outcome"] for trial in own)),
                "by_what": {
                    each: dict(Counter(trial["outcome"] for trial in own if trial["what"] == each))
                    for each in what
                },
                "figures": [trial["figures"] for trial in own if "figures" in trial],
            }
    return {**parts, "bad": [trial for trial in trials if trial["outcome"] in BAD]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
