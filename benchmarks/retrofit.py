"""Retrofitting from end to end, on this machine: a base model of our own, exported, imported, given a memory, measured.

    python -m benchmarks.retrofit --workdir=runs/retrofit --json=docs/results/retrofit.json

Every step is a command that a user has; what is there already is not made again. The text is the sources of Python's
standard library, each file held out or not by a hash of its name. The base is a small Llama with full attention over
512 tokens. FAM, and Block Sliding Window Attention as the control, are then trained by LoRA alone, on the same text and
on PassKey examples in turns. Measured are the loss within the base's own context before and after, the loss by position
far beyond it, and PassKey retrieval by length. FAM is trained with three seeds; the first
is the one that reads the long documents.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from benchmarks.retrofit_ablation import ablate_passkey
from benchmarks.retrofit_settings import (
    BLOCK,
    CONTEXT,
    FULL,
    QUICK,
    VOCABULARY,
    Settings,
    base_flags,
    retrofit_flags,
)
from fam_jax.config import UserError
from fam_jax.generate.streaming import Streamer
from fam_jax.restore import load_model
from launch.cli import ArgumentParser
from launch.errors import user_errors

HELDOUT = 10  # of so many files one is held out
VARIANTS = ("fam", "bswa")
ABLATIONS = "zeroed,shuffled,frozen"
# Folder of an import -> blocks behind its own that a token sees: as the base was trained, all, as after retrofitting.
IMPORTS = {"imported": CONTEXT // BLOCK - 1, "full": 127, "window": 1}
TEXT = ("imported",)  # measured, beside the variants, on documents of all lengths
LONG = ("full", "window")  # ... on long documents


def copy_sources(folder: Path) -> None:
    """The standard library's modules below folder/train and folder/heldout; files that are not UTF-8 are left out."""
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if {"site-packages", "__pycache__"} & {*name.parts}:
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            held_out = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % HELDOUT == 0
            target = folder / ("heldout" if held_out else "train") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(raw)


def patterns(folder: Path) -> str:
    """All modules below `folder`, however deep, as the entry points take them."""
    depths = {len(path.relative_to(folder).parts) for path in folder.rglob("*.py")}
    return ",".join(f"{folder}/{'*/' * (depth - 1)}*.py" for depth in sorted(depths))


def run(module: str, *arguments: str) -> None:
    """Runs an entry point, whose progress goes to the terminal.

    Raises:
      UserError: it failed.
    """
    print(f"$ python -m {module} {' '.join(arguments)}", file=sys.stderr, flush=True)
    code = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if code:
        raise UserError(f"{module} failed with exit code {code}; what it printed above says why")


def make_base(place: Path, settings: Settings) -> None:
    """Text, vocabulary and base model; then its export, and the imports of that."""
    if not (place / "text").exists():
        copy_sources(place / "text")
    if not (place / "stdlib.model").exists():
        run(
            "launch.train_vocabulary", f"--files={place}/text/train", "--suffixes=.py", f"--size={VOCABULARY}",
            "--megabytes=20", f"--out={place}/stdlib.model",
        )  # fmt: skip
    run("launch.train", *base_flags(place, settings), f"--workdir={place}/base")
    if not (place / "exported").exists():
        run("launch.export_hf", f"--checkpoint={place}/base", f"--out={place}/exported")
    for name, segments in IMPORTS.items():
        if not (place / name).exists():
            run(
                "launch.import_hf", f"--source={place}/exported", f"--out={place}/{name}",
                f"--block_size={BLOCK}", f"--memory_segments={segments}",
            )  # fmt: skip


def round_trip(place: Path) -> float:
    """Largest difference of logits between the base and what its export was imported as, over the base's context."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (4, CONTEXT)).astype(np.int32)
    found = []
    for name in ("base", "imported"):
        config, params, _ = load_model(str(place / name))
        found.append(np.asarray(Streamer(config.model, params).read(list(tokens))[0]))
    return float(np.abs(found[0] - found[1]).max())


def evaluate(place: Path, settings: Settings, variants: Sequence[str]) -> None:
    """All evaluations, one JSON file each below place/results."""
    (place / "results").mkdir(exist_ok=True)
    files = f"--files={patterns(place / 'text' / 'heldout')}"
    batch = "--batch_size=8"
    for name in (*TEXT, *variants, *settings.repeats()):
        _evaluate(
            place, f"{name}_text", name, "--task=text", files, f"--documents={settings.documents}", batch
        )
    for name in (*LONG, *variants):
        ablations = [f"--ablations={ABLATIONS}"] if name == "fam" else []
        _evaluate(
            place, f"{name}_long", name, "--task=text", files, f"--min_tokens={settings.long_tokens}",
            f"--documents={settings.long_documents}", "--batch_size=2", *ablations,
        )  # fmt: skip
    for name in (*variants, *settings.repeats()):
        lengths = ",".join(map(str, settings.lengths))
        _evaluate(
            place,
            f"{name}_passkey",
            name,
            "--task=passkey",
            f"--lengths={lengths}",
            f"--keys={settings.keys}",
        )


def _evaluate(place: Path, result: str, checkpoint: str, *arguments: str) -> None:
    out = place / "results" / f"{result}.json"
    if not out.exists():
        run("launch.evaluate", f"--checkpoint={place}/{checkpoint}", f"--out={out}", *arguments)


def collect(place: Path, settings: Settings, variants: Sequence[str]) -> dict[str, Any]:
    """What the evaluations found, with the commands and settings that made them."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted((place / "results").glob("*.json"))}
    details = {name: record["details"] for name, record in read.items()}
    trained = (*variants, *settings.repeats())
    longest = int(max(line["stage_blocks"] for line in _course(place / "fam")))
    totals = ("loss", "documents", "tokens", "longest_document")
    return {
        "round_trip": round_trip(place),
        "longest_filler": BLOCK * longest,
        "in_context": {
            name: in_context(details[f"{name}_text"]["by_position"]) for name in (*TEXT, *trained)
        },
        "by_position": {name: details[f"{name}_long"]["by_position"] for name in (*LONG, *variants)},
        "ablations": {k: v["by_position"] for k, v in details["fam_long"]["ablations"].items()},
        "passkey": {
            name: {n: row["exact_match"] for n, row in details[f"{name}_passkey"]["groups"].items()}
            for name in trained
        },
        "passkey_ablations": ablate_passkey(place / "fam", longest, settings.keys),
        "evaluations": {
            name: {key: record[key] for key in ("command", "step", "versions")}
            | {key: details[name][key] for key in totals if key in details[name]}
            for name, record in read.items()
        },
        "trainings": {name: _training(place / name) for name in ("base", *trained)},
    }


def in_context(buckets: Sequence[dict[str, Any]]) -> float:
    """Mean loss of the tokens within the base's context."""
    inside = [bucket for bucket in buckets if bucket["end"] <= CONTEXT]
    return sum(b["loss"] * b["tokens"] for b in inside) / sum(b["tokens"] for b in inside)


def _training(folder: Path) -> dict[str, Any]:
    """Config and course of a training; paths as seen from here, wherever that is on this machine."""
    kept = ("step", "loss", "exact_match", "stage_blocks", "passkey_batch", "tokens_per_second")
    course = [{key: line[key] for key in kept if key in line} for line in _course(folder)[1::2]]
    config = (folder / "config.json").read_text().replace(f"{Path.cwd()}/", "")
    return {"config": json.loads(config), "course": course}


def _course(folder: Path) -> list[dict[str, Any]]:
    """The metrics that a training logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def show(results: dict[str, Any]) -> None:
    """Prints the tables."""
    base = results["in_context"]["imported"]
    table = Table(title=f"Held-out loss of the first {CONTEXT} tokens")
    for heading in ("model", "nats per token", "of the base's"):
        table.add_column(heading, justify="right")
    for name, loss in results["in_context"].items():
        table.add_row(name, f"{loss:.4f}", f"{loss / base:.4f}")
    Console().print(table)
    table = Table(title="Loss by position, to the token")
    columns = results["by_position"] | {f"FAM {name}": found for name, found in results["ablations"].items()}
    for heading in ("to", *columns):
        table.add_column(heading, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(f"{row[0]['end']:,}", *("" if b["loss"] is None else f"{b['loss']:.3f}" for b in row))
    Console().print(table)
    table = Table(title="Pass key retrieved, by blocks of filler")
    lengths = list(results["passkey"]["fam"])
    for heading in ("model", *lengths):
        table.add_column(heading, justify="right")
    for name, found in results["passkey"].items():
        table.add_row(name, *(f"{found[n]:.2f}" for n in lengths))
    Console().print(table)


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Trains, evaluates, prints, writes, draws."""
    parser = ArgumentParser(prog="benchmarks.retrofit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/retrofit"))
    parser.add_argument("--quick", action="store_true", help="a step each, to see that all of it runs")
    parser.add_argument("--json", type=Path, help="file to write; a picture lies beside it")
    parser.add_argument(
        "--without_bswa", action="store_true", help="FAM alone, without what to compare it with"
    )
    arguments = parser.parse_args(argv)
    variants = ("fam",) if arguments.without_bswa else VARIANTS
    settings = QUICK if arguments.quick else FULL
    place: Path = arguments.workdir
    place.mkdir(parents=True, exist_ok=True)
    make_base(place, settings)
    for variant in variants:
        run("launch.train", *retrofit_flags(place, variant, settings), f"--workdir={place}/{variant}")
    for name, seed in settings.repeats().items():
        run("launch.train", *retrofit_flags(place, "fam", settings, seed), f"--workdir={place}/{name}")
    evaluate(place, settings, variants)
    results = collect(place, settings, variants)
    show(results)
    if arguments.json:
        from benchmarks.retrofit_plot import draw

        write_record(arguments.json, "retrofit", argv, settings, results)
        draw(results, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
