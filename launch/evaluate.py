"""Evaluates a checkpoint from streamed memory: PassKey retrieval by generation, or the loss on held-out text.

    python -m launch.evaluate --checkpoint=runs/passkey --lengths=4,9,18,36
    python -m launch.evaluate --checkpoint=runs/text --files=books/ --ablations=zeroed,shuffled,frozen

Restores the parameters alone, on whatever devices there are, with the config of the run. Prints a table and writes
all results, with what made them, as JSON: by default to evaluation_STEP.json in the checkpoint's folder. For text, a
picture of the loss by position lies beside it.

On the hosts of a TPU slice, type it on all of them. Jobs of several processes elsewhere: see launch/processes.py.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from typing import Any

import jax
from etils import epath

from fam_jax.config import Config, MeshConfig, UserError, validate
from fam_jax.generate.restore import load_model
from fam_jax.sharding import make_mesh
from launch.errors import ArgumentParser, integers, user_errors, words
from launch.processes import join, leaving_together

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
    parser.add_argument(
        "--task", choices=("passkey", "text"), help="default: that of the run (text for seqio tasks)"
    )
    parser.add_argument(
        "--lengths", type=integers, metavar="N,N,...", help="passkey: fillers to evaluate, in blocks"
    )
    parser.add_argument("--keys", type=int, help="passkey: examples per length")
    parser.add_argument("--files", type=words, default=(), metavar="PATH,...",
                        help="text: files, folders or patterns in place of config.data.heldout_files")  # fmt: skip
    parser.add_argument("--suffixes", type=words, default=(), metavar=".txt,...",
                        help="text: of files that count in folders; default: config.data.file_suffixes")  # fmt: skip
    parser.add_argument("--documents", type=int, help="text: how many, drawn at random; 0 = all")
    parser.add_argument("--min_tokens", type=int, help="text: leave shorter documents out")
    parser.add_argument(
        "--ablations", type=words, help="text: some of zeroed,shuffled,frozen: FAMs without use"
    )
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
    changes = {
        "filler_blocks": arguments.lengths, "keys": arguments.keys, "batch_size": arguments.batch_size,
        "documents": arguments.documents, "min_tokens": arguments.min_tokens, "ablations": arguments.ablations,
    }  # fmt: skip
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


@leaving_together()
@user_errors()
def main() -> None:
    """Entry point."""
    arguments = parse_arguments(join(sys.argv, stop_together=False)[1:])
    mesh = make_mesh(MeshConfig(*arguments.mesh))
    config, params, step = load_model(arguments.checkpoint, arguments.step, mesh)
    config = with_arguments(config, arguments)
    task = arguments.task or ("passkey" if config.data.task == "passkey" else "text")
    # TensorFlow takes seconds to load: not before it is known that there is a checkpoint.
    from launch import evaluation

    title = f"step {step} of {arguments.checkpoint}"
    if task == "passkey":
        results = evaluation.run_passkey(config, params)
    else:
        results = evaluation.run_text(config, params, arguments.files, arguments.suffixes)
    if jax.process_index() == 0:
        default = os.path.join(arguments.checkpoint, f"evaluation_{step}.json")
        out = epath.Path(os.path.expanduser(arguments.out or default))
        evaluation.SHOW[task](results, title)
        write_json(out, provenance(config, step) | {"task": task} | results)
        print(f"written to {out}")
        if task == "text":
            picture = out.with_suffix(".png")
            evaluation.draw(results, picture, config, title)
            print(f"drawn in {picture}")


if __name__ == "__main__":
    main()
