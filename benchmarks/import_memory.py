"""Measure the peak host memory of an import against the size of the files and of the model.

    python -m benchmarks.import_memory --json docs/results/import.json

Writes random models with the proportions of Llama 3 8B at a fraction of its width, in four safetensors files each, and
imports each in a new process. On a CPU the imported parameters are in host memory, so an import needs at least one file
and the result. The slope of the peak over their sum shows how much memory a large model needs.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.record import write_record
from benchmarks.report import print_table
from fam_jax.config import ModelConfig, UserError
from fam_jax.config.strict_json import dump_json
from fam_jax.hf import hf_config
from fam_jax.hf.folder import INDEX
from fam_jax.hf.names import tensors
from fam_jax.memories.window import BlockSlidingWindowConfig
from launch.cli import ArgumentParser, integers
from launch.errors import user_errors

FILES = 4
# Widths of the models; that of Llama 3 8B is 4096.
WIDTHS = (512, 1024, 1536, 2048)
MIB = 2**20


def llama(width: int, num_layers: int = 32) -> ModelConfig:
    """Return a model with the proportions of Llama 3 8B: head width 128, four queries per key, V = 31.3 D."""
    return ModelConfig(
        vocab_size=width * 128256 // 4096,
        num_layers=num_layers,
        model_dim=width,
        num_heads=max(width // 128, 1),
        num_kv_heads=max(width // 512, 1),
        head_dim=128,
        ff_dim=width * 7 // 2,
        tie_embeddings=False,
        rope_base=5e5,
        block_size=1024,
        memory=BlockSlidingWindowConfig(segments=7),
    )


def write_model(folder: Path, model: ModelConfig, seed: int) -> list[int]:
    """Write a random model in bfloat16, and return the sizes of its files in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(dump_json(hf_config(model, dtype="bfloat16")))
    named = [(name, tensor.file_shape) for tensor in tensors(model) for name in tensor.names]
    named.sort(key=lambda item: [int(part) if part.isdigit() else -1 for part in item[0].split(".")])
    total = sum(int(np.prod(shape)) for _, shape in named)
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    arrays: dict[str, np.ndarray] = {}
    sizes: list[int] = []
    written = 0
    for number, (name, shape) in enumerate(named):
        file = f"model-{len(sizes) + 1:05d}-of-{FILES:05d}.safetensors"
        arrays[name] = (rng.random(shape, np.float32) - 0.5).astype(ml_dtypes.bfloat16)
        weight_map[name] = file
        written += arrays[name].size
        if written >= total * (len(sizes) + 1) / FILES or number == len(named) - 1:
            save_file(arrays, folder / file)
            sizes.append((folder / file).stat().st_size)
            arrays = {}
    (folder / INDEX).write_text(dump_json({"weight_map": weight_map}))
    return sizes


def import_once(source: Path, out: Path) -> tuple[int, float]:
    """Import a model in a new process; return the peak resident bytes and the CPU seconds of the process."""
    command = [
        sys.executable,
        "-m",
        "launch.import_hf",
        f"--source={source}",
        f"--out={out}",
        "--tokenizer=none",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(
            f"{' '.join(command)}: failed with exit code {process.returncode}; see its output above"
        )
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def measure(widths: Sequence[int], num_layers: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Return a row of results per width, and a least-squares line through them."""
    rows = []
    for width in widths:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            sizes = write_model(Path(folder) / "source", llama(width, num_layers), seed)
            peak, seconds = import_once(Path(folder) / "source", Path(folder) / "out")
        rows.append(
            {
                "width": width,
                "result_bytes": sum(sizes),
                "largest_file_bytes": max(sizes),
                "peak_rss_bytes": peak,
                "cpu_seconds": seconds,
            }
        )
    bound = [row["result_bytes"] + row["largest_file_bytes"] for row in rows]
    slope, start = np.polyfit(bound, [row["peak_rss_bytes"] for row in rows], 1)
    return {"rows": rows, "slope": float(slope), "intercept_bytes": float(start)}


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measure, print a table and write the record."""
    parser = ArgumentParser(prog="benchmarks.import_memory", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--widths", type=integers, default=WIDTHS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder with about 10 GB free"
    )
    parser.add_argument("--json", type=Path, default=Path("runs/bench/import.json"))
    arguments = parser.parse_args(argv)
    results = measure(arguments.widths, arguments.layers, arguments.seed, arguments.scratch)
    settings = {"models": [dataclasses.asdict(llama(width, arguments.layers)) for width in arguments.widths]}
    write_record(arguments.json, "import_memory", argv, settings | {"seed": arguments.seed}, results)
    print_table(
        f"Peak memory of an import: slope {results['slope']:.2f}",
        ("width", "largest file MiB", "result MiB", "peak MiB"),
        [
            [
                row["width"],
                *(row[name] // MIB for name in ("largest_file_bytes", "result_bytes", "peak_rss_bytes")),
            ]
            for row in results["rows"]
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
