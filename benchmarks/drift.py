"""Measure how FAM keeps a pass key: its norm along a stream, how its direction depends on the key, wrong answers.

    python -m benchmarks.drift --checkpoint=runs/demo/fam --json runs/drift.json

Every block adds to FAM (the "FAM copy" of section 2.2 of the paper), so its norm grows along the stream. Layers
normalize FAM before they read it, so only its direction matters, and its direction turns more and more slowly.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from fam_jax.checkpoint import load_params
from fam_jax.config import Config, MeshConfig, UserError, resolve
from fam_jax.data.build import task_vocabulary
from fam_jax.data.passkey import passkey_examples
from fam_jax.generation.streaming import Streamer
from fam_jax.model import StreamState
from fam_jax.sharding import make_mesh, param_shardings
from launch.cli import ArgumentParser
from launch.errors import user_errors


def measure(config: Config, params: Any, blocks: int, keys: int) -> dict[str, Any]:
    """Read `keys` examples with `blocks` blocks of filler, and answer them.

    Returns:
      Values for JSON. "course": after 1, 2, 4, ... blocks, for each layer the mean norm of FAM's vectors, and the root
      mean square distance of their directions (unit vectors) from the mean over keys. "misread": for each token of the
      answer, the fraction of wrong predictions, and the number of times that each token was mistaken for each other.

    Raises:
      UserError: the model has no FAM.
    """
    if config.model.memory.kind != "fam":
        raise UserError(
            f"config.model.memory.kind: {config.model.memory.kind} has no feedback vectors; use a run with fam"
        )
    vocabulary = task_vocabulary(config.data)
    size, chunk = config.model.block_size, config.evaluate.chunk_blocks
    examples = passkey_examples(config.data, vocabulary, blocks * size, keys, config.evaluate.seed)
    prompts, answers = [prompt for prompt, _ in examples], np.stack([answer for _, answer in examples])
    streamer = Streamer(config.model, params)
    state: StreamState | None = None
    course, begin, end = [], 0, 1
    while begin < blocks:
        last = end >= blocks
        rows = [prompt[begin * size : None if last else end * size] for prompt in prompts]
        logits, state = streamer.read(rows, state, chunk_blocks=chunk)
        course.append({"blocks": min(end, blocks)} | _directions(np.asarray(state.layers.fam, np.float64)))
        begin, end = end, 2 * end
    assert state is not None
    tokens = streamer.generate(logits, state, max_tokens=answers.shape[1]).tokens[:, : answers.shape[1]]
    names = {int(token): vocabulary.decode([int(token)]) for token in np.unique(np.stack([answers, tokens]))}
    return {"course": course, "misread": _misread(answers, tokens, names)}


def _directions(fam: np.ndarray) -> dict[str, list[float]]:
    """Return the norm of fam (L, B, M, D) and the spread of its direction, for each layer."""
    norm = np.linalg.norm(fam, axis=-1, keepdims=True)
    unit = fam / norm
    off = np.square(unit - unit.mean(axis=1, keepdims=True)).sum(axis=-1)
    return {
        "norm": norm.mean(axis=(1, 2, 3)).tolist(),
        "direction_spread": np.sqrt(off.mean(axis=(1, 2))).tolist(),
    }


def _misread(answers: np.ndarray, tokens: np.ndarray, names: dict[int, str]) -> list[dict[str, Any]]:
    found = []
    for right, taken in zip(answers.T, tokens.T, strict=True):
        pairs = Counter(
            f"{names[int(a)]} as {names[int(b)]}" for a, b in zip(right, taken, strict=True) if a != b
        )
        found.append({"wrong": float((right != taken).mean()), "pairs": dict(pairs.most_common())})
    return found


def show(results: dict[str, Any]) -> None:
    """Print two tables."""
    layers = range(len(results["course"][0]["norm"]))
    course = Table(title="FAM: norm, and spread of direction over keys, by layer", title_justify="left")
    for heading in ("blocks", *(f"norm {i}" for i in layers), *(f"spread {i}" for i in layers)):
        course.add_column(heading, justify="right")
    for row in results["course"]:
        numbers = (*(f"{n:,.1f}" for n in row["norm"]), *(f"{s:.3f}" for s in row["direction_spread"]))
        course.add_row(str(row["blocks"]), *numbers)
    misread = Table(title="Misread tokens of the answer", title_justify="left")
    for heading in ("token", "wrong", "what as what"):
        misread.add_column(heading)
    for index, row in enumerate(results["misread"]):
        pairs = ", ".join(f"{pair} ({count})" for pair, count in row["pairs"].items())
        misread.add_row(str(index), f"{row['wrong']:.1%}", pairs)
    console = Console()
    console.print(course)
    console.print(misread)


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Restore a checkpoint, measure, print and write the record."""
    parser = ArgumentParser(prog="benchmarks.drift", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="workdir of a PassKey run with FAM")
    parser.add_argument("--step", type=int, help="saved step (default: the latest)")
    parser.add_argument("--blocks", type=int, default=520, help="blocks of filler (default: 520)")
    parser.add_argument("--keys", type=int, default=64, help="examples, read as one batch (default: 64)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    arguments = parser.parse_args(argv)
    mesh = make_mesh(MeshConfig())
    params, values, step = load_params(
        arguments.checkpoint, arguments.step, shardings=lambda shapes: param_shardings(shapes, mesh)
    )
    params = jax.device_put(params, jax.devices()[0])
    config = resolve(values)
    results = measure(config, params, arguments.blocks, arguments.keys)
    show(results)
    if arguments.json:
        settings = {"step": step, "blocks": arguments.blocks, "keys": arguments.keys, "config": config}
        write_record(arguments.json, "drift", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
