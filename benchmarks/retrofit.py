"""Retrofit a small model with a memory, from the pretraining of the base to the evaluation.

    python -m benchmarks.retrofit --workdir=runs/retrofit --json=docs/results/retrofit.json

The benchmark trains a small Llama with full attention over 512 tokens on the sources of Python's standard library,
exports it, and imports it again. Then it trains FAM, and Block Sliding Window Attention as the control, with LoRA on
the same text mixed with PassKey examples. It measures the loss within the base's own context before and after, the loss
by position far beyond it, and PassKey retrieval by length. A hash of a file's name decides whether the file is held
out. FAM is trained with three seeds; only the first is evaluated on long documents.

All files go below the workdir. Rerun the same command after an interruption: steps whose results exist are skipped.
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
from fam_jax.config import ABLATIONS, UserError
from fam_jax.evaluation import evaluate, read_evaluation
from fam_jax.generation.streaming import Streamer
from fam_jax.model import ablated
from fam_jax.restore import load_model
from launch.cli import ArgumentParser
from launch.errors import user_errors

# One of this many files is held out.
HELDOUT = 10
VARIANTS = ("fam", "bswa")
# Imports of the base, with the number of past blocks that a token sees: as in the base's training, all blocks, and as
# after the retrofit.
IMPORTS = {"imported": CONTEXT // BLOCK - 1, "full": 127, "window": 1}
# Imports that are measured beside the variants: on documents of all lengths, and on long documents.
TEXT = ("imported",)
LONG = ("full", "window")


def copy_sources(folder: Path) -> None:
    """Copy the standard library's modules to folder/train and folder/heldout, except files that are not UTF-8."""
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


def patterns(folder: Path) -> list[str]:
    """Return patterns that match the modules at every depth below `folder`."""
    depths = {len(path.relative_to(folder).parts) for path in folder.rglob("*.py")}
    return [f"{folder}/{'*/' * (depth - 1)}*.py" for depth in sorted(depths)]


def run(module: str, *arguments: str) -> None:
    """Run a program in a new process, because a program would hold the devices that the next one needs.

    Raises:
      UserError: the program failed.
    """
    print(f"$ python -m {module} {' '.join(arguments)}", file=sys.stderr, flush=True)
    code = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if code:
        raise UserError(f"{module}: failed with exit code {code}; see its output above")


def make_base(place: Path, settings: Settings) -> None:
    """Make text, vocabulary and base model; export the model and import it again."""
    if not (place / "text").exists():
        copy_sources(place / "text")
    if not (place / "stdlib.model").exists():
        run(
            "launch.train_vocabulary",
            f"--files={place}/text/train",
            "--suffixes=.py",
            f"--size={VOCABULARY}",
            "--megabytes=20",
            f"--out={place}/stdlib.model",
        )
    run("launch.train", *base_flags(place, settings), f"--workdir={place}/base")
    if not (place / "exported").exists():
        run("launch.export_hf", f"--checkpoint={place}/base", f"--out={place}/exported")
    for name, segments in IMPORTS.items():
        if not (place / name).exists():
            run(
                "launch.import_hf",
                f"--source={place}/exported",
                f"--out={place}/{name}",
                f"--block_size={BLOCK}",
                f"--memory_segments={segments}",
            )


def round_trip(place: Path) -> float:
    """Return the largest difference of logits between the base and its import, at the end of the base's context."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (4, CONTEXT)).astype(np.int32)
    found = []
    for name in ("base", "imported"):
        config, params, _ = load_model(place / name)
        found.append(np.asarray(Streamer(config.model, params).read(list(tokens))[0]))
    return float(np.abs(found[0] - found[1]).max())


def evaluate_all(place: Path, settings: Settings, variants: Sequence[str]) -> None:
    """Make all evaluations; write one JSON file each to place/results."""
    (place / "results").mkdir(exist_ok=True)
    files = patterns(place / "text" / "heldout")
    for name in (*TEXT, *variants, *settings.repeats()):
        _evaluate(place, name, "text", task="text", files=files, documents=settings.documents, batch_size=8)
    for name in (*LONG, *variants):
        _evaluate(
            place,
            name,
            "long",
            task="text",
            files=files,
            min_tokens=settings.long_tokens,
            documents=settings.long_documents,
            batch_size=2,
            ablations=ABLATIONS if name == "fam" else (),
        )
    for name in (*variants, *settings.repeats()):
        _evaluate(place, name, "passkey", task="passkey", filler_blocks=settings.lengths, keys=settings.keys)


def _evaluate(place: Path, checkpoint: str, result: str, **how: Any) -> None:
    out = place / "results" / f"{checkpoint}_{result}.json"
    if not out.exists():
        print(f"evaluating {checkpoint}: {result}", file=sys.stderr, flush=True)
        evaluate(place / checkpoint, out=out, command="benchmarks.retrofit", **how)


def ablate_passkey(checkpoint: Path, blocks: int, keys: int) -> dict[str, float]:
    """Return the fraction of keys predicted right in every token, with the memory intact and by ablation.

    Each token is predicted after the true tokens before it.

    Args:
      checkpoint: checkpoint of a model with FAM.
      blocks: length of the filler in blocks.
      keys: number of examples; they are those of the PassKey evaluation.
    """
    # Imported here, because TensorFlow takes seconds to import.
    from fam_jax.data.build import task_vocabulary
    from fam_jax.data.passkey import passkey_examples

    config, params, _ = load_model(checkpoint)
    streamer, size = Streamer(config.model, params), config.model.block_size
    examples = passkey_examples(
        config.data, task_vocabulary(config.data), blocks * size, keys, config.evaluate.seed
    )
    rows = np.stack([np.concatenate(example) for example in examples])
    inputs, targets = (
        np.pad(part, ((0, 0), (0, -part.shape[1] % size))) for part in (rows[:, :-1], rows[:, 1:])
    )
    answer = slice(len(examples[0][0]) - 1, rows.shape[1] - 1)
    found = {}
    for name in ("none", *ABLATIONS):
        state = start = streamer.start(keys)
        likeliest = []
        for begin in range(0, inputs.shape[1], size):
            block = slice(begin, begin + size)
            tokens, _, state = streamer.measure(inputs[:, block], targets[:, block], state)
            likeliest.append(tokens)
            if name in ABLATIONS:
                state = ablated(config.model, state, start, name)
        right = np.concatenate(likeliest, axis=1)[:, answer] == targets[:, answer]
        found[name] = float(right.all(axis=1).mean())
    return found


def collect(place: Path, settings: Settings, variants: Sequence[str]) -> dict[str, Any]:
    """Return all results, with the commands and settings that made them."""
    read = {path.stem: read_evaluation(path) for path in sorted((place / "results").glob("*.json"))}
    details = {name: evaluation.details for name, evaluation in read.items()}
    trained = (*variants, *settings.repeats())
    longest = int(max(line["stage_blocks"] for line in _course(place / "fam")))
    kept = ("loss", "documents", "tokens", "longest_document")
    return {
        "round_trip": round_trip(place),
        "longest_filler": BLOCK * longest,
        "in_context": {
            name: in_context(details[f"{name}_text"]["by_position"]) for name in (*TEXT, *trained)
        },
        "by_position": {name: details[f"{name}_long"]["by_position"] for name in (*LONG, *variants)},
        "ablations": {name: found["by_position"] for name, found in details["fam_long"]["ablations"].items()},
        "passkey": {
            name: {n: row["exact_match"] for n, row in details[f"{name}_passkey"]["groups"].items()}
            for name in trained
        },
        "passkey_ablations": ablate_passkey(place / "fam", longest, settings.keys),
        "evaluations": {
            name: {"command": found.command, "step": found.step, "versions": found.versions}
            | {key: found.details[key] for key in kept if key in found.details}
            for name, found in read.items()
        },
        "trainings": {name: _training(place / name) for name in ("base", *trained)},
    }


def in_context(buckets: Sequence[dict[str, Any]]) -> float:
    """Return the mean loss of the tokens within the base's context."""
    inside = [bucket for bucket in buckets if bucket["end"] <= CONTEXT]
    return sum(b["loss"] * b["tokens"] for b in inside) / sum(b["tokens"] for b in inside)


def _training(folder: Path) -> dict[str, Any]:
    """Return config and course of a training, with paths relative to the current folder."""
    kept = ("step", "loss", "exact_match", "stage_blocks", "passkey_batch", "tokens_per_second")
    course = [{key: line[key] for key in kept if key in line} for line in _course(folder)[1::2]]
    config = (folder / "config.json").read_text().replace(f"{Path.cwd()}/", "")
    return {"config": json.loads(config), "course": course}


def _course(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics that a training logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def show(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    base = results["in_context"]["imported"]
    table = Table(title=f"Held-out loss of the first {CONTEXT} tokens")
    for heading in ("model", "nats per token", "relative to the base"):
        table.add_column(heading, justify="right")
    for name, loss in results["in_context"].items():
        table.add_row(name, f"{loss:.4f}", f"{loss / base:.4f}")
    Console().print(table)
    table = Table(title="Loss by position, up to token")
    columns = results["by_position"] | {f"FAM {name}": found for name, found in results["ablations"].items()}
    for heading in ("up to", *columns):
        table.add_column(heading, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(f"{row[0]['end']:,}", *("" if b["loss"] is None else f"{b['loss']:.3f}" for b in row))
    Console().print(table)
    table = Table(title="Pass keys retrieved, by blocks of filler")
    lengths = list(results["passkey"]["fam"])
    for heading in ("model", *lengths):
        table.add_column(heading, justify="right")
    for name, found in results["passkey"].items():
        table.add_row(name, *(f"{found[n]:.2f}" for n in lengths))
    Console().print(table)


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Train, evaluate, print, and write the record and the plot."""
    parser = ArgumentParser(prog="benchmarks.retrofit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/retrofit"))
    parser.add_argument("--quick", action="store_true", help="two steps each, to check that everything runs")
    parser.add_argument("--json", type=Path, help="file to write; the plot goes beside it")
    parser.add_argument("--without_bswa", action="store_true", help="leave out the control")
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
    evaluate_all(place, settings, variants)
    results = collect(place, settings, variants)
    show(results)
    if arguments.json:
        from benchmarks.retrofit_plot import draw

        write_record(arguments.json, "retrofit", argv, settings, results)
        draw(results, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1:])
