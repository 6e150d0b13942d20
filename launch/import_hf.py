"""Imports an open model in Hugging Face format: Llama 2 and 3, Mistral, Qwen 2 and 3, Gemma 1 to 3 (text).

    python -m launch.import_hf --source=DIR --out=runs/gemma
    python -m launch.import_hf --source=DIR --out=runs/gemma_fam --block_size=1024 --memory_segments=3 --fam_length=64

Reads tensor by tensor, each straight into its shards, and writes a checkpoint that training, evaluation and
generation restore. On the hosts of a TPU slice, type it on all of them. With the defaults the model is the original
one for the first (memory_segments + 1) * block_size tokens. The original config.json and the tokenizer's files are
kept in OUT/huggingface.
"""

import argparse
import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from fam_jax.checkpoint import COMPANIONS, Checkpoints, absolute, saved_steps
from fam_jax.config import Config, UserError, ceil_div, field_type, resolve
from fam_jax.config.format1 import MOVED
from fam_jax.hf import (
    ConvertError,
    Folder,
    adds_bos,
    check_tokenizer,
    find_tokenizer,
    import_parameters,
    model_fields,
    model_window,
)
from fam_jax.hf.folder import copy_companions
from fam_jax.hf.importing import stored_memory
from fam_jax.sharding import make_mesh, param_shardings
from launch import cli, processes

MADE = rf"{COMPANIONS}|config\.json(\.tmp)?|0(\.orbax-checkpoint-tmp.*)?"  # names in a folder that is being imported to
CONTEXT = 8192  # tokens that the defaults let a model see at a time, if it was made for as many
DTYPES = {
    "bfloat16": "bfloat16",
    "float64": "float64",
}  # of activations, by the embedding table's; else float32


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line; fields of the model that are not given are None.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("import_hf", __doc__, job=True)
    parser.add_argument("--source", required=True, metavar="DIR", help="config.json, safetensors, tokenizer")
    parser.add_argument("--out", required=True, metavar="CKPT", help="folder of the new checkpoint")
    parser.add_argument("--param_dtype", choices=("float32", "bfloat16"), help="default: as in the files")
    parser.add_argument(
        "--tokenizer", metavar="FILE|none", help="default: the source's tokenizer.model or .json"
    )
    parser.add_argument("--ignore_option", action="append", default=[], metavar="NAME",
                        help="of config.json, known to change nothing that the model computes")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the initial FAM")
    cli.add_mesh(parser)
    group = parser.add_argument_group("fields of the model, see fam_jax/config/model.py")
    for name in ("dtype", "block_size", "attention", "remat"):
        group.add_argument(f"--{name}", type=field_type(f"config.model.{name}"))
    for name, field in MOVED.items():
        kind: Any = field_type(f"config.model.memory.{field}", "fam")
        group.add_argument(f"--{name}", type=(lambda text: text.lower() == "true") if kind is bool else kind)
    return parser.parse_args(arguments)


def imported_config(folder: Folder, arguments: argparse.Namespace, vocabulary: str | None) -> Config:
    """The config of the imported model.

    Raises:
      UserError: the folder's model is not supported, or the arguments do not fit it.
    """
    original = model_fields(folder.config, arguments.ignore_option)
    window = model_window(folder.config, arguments.ignore_option)
    stored = stored_memory(folder)
    given = {name: getattr(arguments, name) for name in ("dtype", "block_size", "attention", "remat", *MOVED)}
    given = {name: value for name, value in given.items() if value is not None}
    memory = {"window": window} | stored.get("memory", {})
    memory |= {MOVED[name]: given.pop(name) for name in MOVED if name in given}
    memory["kind"] = "fam" if memory.get("length") else "bswa"
    if memory["kind"] == "bswa":
        memory = {
            name: memory[name] for name in ("kind", "segments", "window", "stop_gradient") if name in memory
        }
    table = "model.embed_tokens.weight"
    dtype = str(folder.dtype(table)) if table in folder.names else "float32"
    fields: dict[str, Any] = {"block_size": 1024, "dtype": DTYPES.get(dtype, "float32")}
    fields |= original | {name: value for name, value in stored.items() if name == "block_size"} | given
    if "segments" not in memory and fields["block_size"] > 0:
        context = min(folder.config.get("max_position_embeddings") or CONTEXT, CONTEXT)
        # A window reaches window - 1 tokens beyond a token, which may be the first of its block.
        reach = max(context - fields["block_size"], memory["window"] - 1, fields["local_window"] - 1, 0)
        memory["segments"] = ceil_div(reach, fields["block_size"])
    data = {} if vocabulary is None else {"vocabulary": vocabulary}
    return resolve({"model": fields | {"memory": memory}, "data": data})


def chosen_tokenizer(folder: Folder, out: epath.Path, choice: str | None) -> tuple[Path | None, str | None]:
    """The tokenizer file to check, and the path of `data.vocabulary`, which is where it will lie."""
    if choice == "none":
        return None, None
    file = find_tokenizer(folder.path) if choice is None else Path(choice).expanduser()
    if file is None:
        raise ConvertError(
            f"{folder.path}: holds neither tokenizer.model nor tokenizer.json; give one by --tokenizer=FILE, or "
            "--tokenizer=none to import the model without"
        )
    return file, str((out / COMPANIONS / file.name) if choice is None else file.absolute())


def check_out(out: epath.Path) -> None:
    """Raises :class:`UserError` unless `out` is new, is empty, or was left unfinished by an import."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; give a new folder as --out")
    names = [path.name for path in out.iterdir()]
    # Companions come first and the step last: without them it is some other folder, with it a finished import.
    cut_short = COMPANIONS in names and not saved_steps(out)
    if names and not (cut_short and all(re.fullmatch(MADE, name) for name in names)):
        raise UserError(f"{out}: is not empty; give a new folder as --out")


@contextlib.contextmanager
def new_checkpoint(out: epath.Path, source: Path) -> Iterator[None]:
    """Begins the folder of a checkpoint with the companions from `source`; takes it back if the import fails.

    All processes enter together; the first one writes. A job of several, which end each other, leaves the folder to
    be taken anew.

    Raises:
      ConvertError: the folder cannot be written, or a companion not be read.
    """
    if jax.process_index() == 0:
        try:
            _remove_made(out)
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConvertError(f"{out}: cannot be made ({error.strerror}); give another --out") from error
    try:
        if jax.process_index() == 0:
            copy_companions(source, out / COMPANIONS)
        multihost_utils.sync_global_devices("companions")  # what an earlier import left is gone now
        yield
    except BaseException:
        if jax.process_count() == 1:
            with contextlib.suppress(OSError):  # what stays is known for what it is the next time
                _remove_made(out)
                out.rmdir()
        raise


def _remove_made(out: epath.Path) -> None:
    """Empties a folder that :func:`check_out` lets pass; the companions go last, by which it knows it."""
    found = sorted(out.iterdir(), key=lambda path: path.name == COMPANIONS) if out.exists() else []
    for path in found:
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Import a model; return the exit code."""
    arguments = parse_arguments(argv)
    processes.join(arguments, stop_together=False)
    out = absolute(arguments.out)
    check_out(out)
    mesh = make_mesh(arguments.mesh)
    folder = Folder(arguments.source)
    tokenizer, vocabulary = chosen_tokenizer(folder, out, arguments.tokenizer)
    config = imported_config(folder, arguments, vocabulary)
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.model.vocab_size)
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, add_bos=adds_bos(tokenizer))
        )
    with new_checkpoint(out, folder.path):
        import_to(out, folder, config, mesh, arguments)
    if jax.process_index() > 0:
        return 0
    model = config.model
    print(
        f"written to {out}: {model.num_layers} layers of width {model.model_dim}, vocabulary {vocabulary or 'none'}"
    )
    if folder.left_out:
        print(
            f"the text part alone: {folder.left_out} tensors of the vision tower and its projector are left out",
            file=sys.stderr,
        )
    seen = (model.memory_segments + 1) * model.block_size
    if not model.memory.has_state:
        print(
            f"equal to the original for the first {seen} tokens, and a sliding window of blocks beyond",
            file=sys.stderr,
        )
    return 0


def import_to(
    out: epath.Path, folder: Folder, config: Config, mesh: jax.sharding.Mesh, arguments: argparse.Namespace
) -> None:
    """Reads the parameters and saves them as step 0.

    Raises:
      UserError: the folder's tensors are not those of the model, or the checkpoint cannot be written.
    """
    with cli.progress_bar("reading") as show:
        params = import_parameters(
            folder, config.model, lambda shapes: param_shardings(shapes, mesh),
            param_dtype=arguments.param_dtype, seed=arguments.seed, on_progress=show,
        )  # fmt: skip
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    with Checkpoints(out, config=dataclasses.asdict(config), keep=1, in_flight_bytes=largest) as checkpoints:
        checkpoints.save(0, {"params": params}, {}, wait=True)


if __name__ == "__main__":
    cli.run(main)
