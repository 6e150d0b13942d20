"""Measure how FAM keeps a pass key: its norm along a stream, how its direction depends on the key, wrong answers.

    python -m benchmarks.drift --checkpoint=runs/demo/fam --json runs/drift.json
    python -m benchmarks.drift --checkpoint=runs/demo/fam --blocks=312500 --keys=4 --dtypes=float32,bfloat16

Every block adds to FAM (the "FAM copy" of section 2.2 of the paper), so its norm grows along the stream. Layers
normalize FAM before they read it, so only its direction matters, and its direction turns more and more slowly. With
several dtypes of activations, the same texts are read in each, and their directions are compared.
"""

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from fam_jax.checkpoint import load_params
from fam_jax.config import Config, MeshConfig, UserError, changed, resolve
from fam_jax.data.build import task_vocabulary
from fam_jax.data.passkey import passkey_examples
from fam_jax.generation.streaming import Streamer
from fam_jax.model import StreamState
from fam_jax.sharding import make_mesh, param_shardings
from launch import cli
from launch.errors import user_errors


@dataclasses.dataclass
class _Reader:
    """Streams that one dtype reads, a row per key."""

    streamer: Streamer
    chunk_blocks: int
    state: StreamState | None = None
    logits: Any = None

    def read(self, rows: Sequence[np.ndarray]) -> None:
        """Read the next tokens of every row."""
        if len(rows[0]):
            self.logits, self.state = self.streamer.read(rows, self.state, chunk_blocks=self.chunk_blocks)

    def fam(self) -> np.ndarray:
        """Return FAM (L, B, M, D)."""
        assert self.state is not None
        return np.asarray(self.state.layers.fam, np.float64)


def measure(
    config: Config,
    params: Any,
    blocks: int,
    keys: int,
    dtypes: Sequence[str] = (),
    chunk_blocks: int = 64,
) -> dict[str, Any]:
    """Read `keys` examples with `blocks` blocks of filler, and answer them.

    Args:
      config: of the run.
      params: of the model.
      blocks: blocks of filler.
      keys: examples, read as one batch.
      dtypes: of activations; empty: that of the config.
      chunk_blocks: blocks to read at once.

    Returns:
      Values for JSON. "dtypes": for each dtype "course", "misread" and "exact_match". "course": after 1, 2, 4, ...
      blocks, for each layer the mean norm of FAM's vectors, the root mean square distance of their directions (unit
      vectors) from the mean over keys, and the share of its entries that the last block left unchanged. "misread": for
      each token of the answer, the fraction of wrong predictions, and the number of times that each token was mistaken
      for each other. "difference": after as many blocks, the root mean square distance of the directions in each other
      dtype from those in the first, for each layer.

    Raises:
      UserError: the model has no FAM.
    """
    if config.model.memory.kind != "fam":
        raise UserError(
            f"config.model.memory.kind: {config.model.memory.kind} has no feedback vectors; use a run with fam"
        )
    vocabulary, size = task_vocabulary(config.data), config.model.block_size
    examples = passkey_examples(config.data, vocabulary, blocks * size, keys, config.evaluate.seed)
    prompts, answers = [prompt for prompt, _ in examples], np.stack([answer for _, answer in examples])
    readers = {
        dtype: _Reader(Streamer(changed(config, model={"dtype": dtype}).model, params), chunk_blocks)
        for dtype in dtypes or (config.model.dtype,)
    }
    courses: dict[str, list[dict[str, Any]]] = {dtype: [] for dtype in readers}
    differences = []
    begin, end, started = 0, 1, time.perf_counter()
    while begin < blocks:
        fams = {}
        for dtype, reader in readers.items():
            fams[dtype], unchanged = _read_to(reader, prompts, begin * size, end * size, size)
            courses[dtype].append({"blocks": end, **_directions(fams[dtype]), "unchanged": unchanged})
        differences.append({"blocks": end, **_differences(fams)})
        speed = len(readers) * keys * end * size / (time.perf_counter() - started)
        print(f"drift: {end:,} of {blocks:,} blocks, {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
        begin, end = end, min(2 * end, blocks)
    rest = [prompt[blocks * size :] for prompt in prompts]
    found = {
        dtype: {"course": courses[dtype], **_answer(reader, rest, answers, vocabulary)}
        for dtype, reader in readers.items()
    }
    return {"dtypes": found, "difference": differences if len(readers) > 1 else []}


def _answer(
    reader: _Reader, rest: Sequence[np.ndarray], answers: np.ndarray, vocabulary: Any
) -> dict[str, Any]:
    """Read what follows the filler, and answer; return "misread" and "exact_match"."""
    reader.read(rest)
    assert reader.state is not None
    out = reader.streamer.generate(reader.logits, reader.state, max_tokens=answers.shape[1])
    tokens = out.tokens[:, : answers.shape[1]]
    every = np.unique(np.stack([answers, tokens]))
    names = {int(token): vocabulary.decode([int(token)]) for token in every}
    return {
        "misread": _misread(answers, tokens, names),
        "exact_match": float((answers == tokens).all(axis=1).mean()),
    }


def _read_to(
    reader: _Reader, prompts: Sequence[np.ndarray], begin: int, end: int, size: int
) -> tuple[np.ndarray, list[float]]:
    """Read tokens begin to end; return FAM, and the share of each layer that the last block left unchanged."""
    reader.read([prompt[begin : end - size] for prompt in prompts])
    before = reader.fam() if reader.state is not None else None
    reader.read([prompt[end - size : end] for prompt in prompts])
    fam = reader.fam()
    same = np.zeros_like(fam, bool) if before is None else fam == before
    return fam, same.mean(axis=(1, 2, 3)).tolist()


def _units(fam: np.ndarray) -> np.ndarray:
    return fam / np.linalg.norm(fam, axis=-1, keepdims=True)


def _differences(fams: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return the distances of directions in each dtype from those in the first, for each layer."""
    (_, first), *others = fams.items()
    return {
        dtype: np.sqrt(np.square(_units(fam) - _units(first)).sum(axis=-1).mean(axis=(1, 2))).tolist()
        for dtype, fam in others
    }


def _directions(fam: np.ndarray) -> dict[str, list[float]]:
    """Return the norm of fam (L, B, M, D) and the spread of its direction, for each layer."""
    norm, unit = np.linalg.norm(fam, axis=-1), _units(fam)
    off = np.square(unit - unit.mean(axis=1, keepdims=True)).sum(axis=-1)
    return {
        "norm": norm.mean(axis=(1, 2)).tolist(),
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
    """Print two tables for each dtype, and one of the differences between dtypes."""
    console = Console()
    for dtype, found in results["dtypes"].items():
        layers = range(len(found["course"][0]["norm"]))
        course = Table(
            title=f"FAM in {dtype}: norm, and spread of direction over keys, by layer", title_justify="left"
        )
        for heading in ("blocks", *(f"norm {i}" for i in layers), *(f"spread {i}" for i in layers)):
            course.add_column(heading, justify="right")
        for row in found["course"]:
            numbers = (*(f"{n:,.1f}" for n in row["norm"]), *(f"{s:.3f}" for s in row["direction_spread"]))
            course.add_row(str(row["blocks"]), *numbers)
        title = f"Misread tokens of the answer; exact match {found['exact_match']:.1%}"
        misread = Table(title=title, title_justify="left")
        for heading in ("token", "wrong", "what as what"):
            misread.add_column(heading)
        for index, row in enumerate(found["misread"]):
            pairs = ", ".join(f"{pair} ({count})" for pair, count in row["pairs"].items())
            misread.add_row(str(index), f"{row['wrong']:.1%}", pairs)
        console.print(course)
        console.print(misread)
    if results["difference"]:
        first, *others = results["dtypes"]
        table = Table(title=f"Distance of directions from those in {first}, by layer", title_justify="left")
        table.add_column("blocks", justify="right")
        for dtype in others:
            table.add_column(dtype)
        for row in results["difference"]:
            table.add_row(
                str(row["blocks"]), *(" ".join(f"{value:.2g}" for value in row[dtype]) for dtype in others)
            )
        console.print(table)


def dtype_names(text: str) -> tuple[str, ...]:
    """Argument type: dtypes of activations, the first of which the others are compared with."""
    names = cli.words(text)
    unknown = [name for name in names if name not in ("float32", "bfloat16")]
    if unknown:
        raise UserError(f"--dtypes: {unknown[0]!r} is none; use float32, bfloat16 or both")
    return names


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Restore a checkpoint, measure, print and write the record."""
    parser = cli.ArgumentParser(prog="benchmarks.drift", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="workdir of a PassKey run with FAM")
    add("--step", type=int, help="saved step (default: the latest)")
    add("--blocks", type=cli.at_least(1), default=520, help="blocks of filler (default: 520)")
    add("--keys", type=cli.at_least(1), default=64, help="examples, read as one batch (default: 64)")
    add(
        "--dtypes",
        type=dtype_names,
        default=(),
        metavar="NAME,...",
        help="of activations; default: that of the run",
    )
    add("--chunk_blocks", type=cli.at_least(1), default=64, help="blocks to read at once (default: 64)")
    add("--json", type=Path, help="write the record to this file")
    arguments = parser.parse_args(argv)
    mesh = make_mesh(MeshConfig())
    params, values, step = load_params(
        arguments.checkpoint, arguments.step, shardings=lambda shapes: param_shardings(shapes, mesh)
    )
    params = jax.device_put(params, jax.devices()[0])
    config = resolve(values)
    results = measure(
        config, params, arguments.blocks, arguments.keys, arguments.dtypes, arguments.chunk_blocks
    )
    show(results)
    if arguments.json:
        settings = {"step": step, "blocks": arguments.blocks, "keys": arguments.keys, "config": config}
        write_record(arguments.json, "drift", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
