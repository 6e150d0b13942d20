"""Exports a checkpoint to Hugging Face format, which transformers loads.

    python -m launch.export_hf --checkpoint=runs/gemma --out=exported
    python -m launch.export_hf --checkpoint=runs/retrofit --out=adapter --lora=adapter

Of a run with LoRA: the model with the updates merged into its weights (in float32 unless told otherwise), the base
model without them, or the updates alone as an adapter for the PEFT library.

Writes config.json, safetensors files, the tokenizer's files if the checkpoint was imported with any, or else the
vocabulary that the run was trained with, and the initial FAM, if there is one, as fam.safetensors. transformers has
neither blocks nor FAM: there the model attends to its whole context.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from fam_jax.checkpoint import companion_folders, load_params
from fam_jax.config import Config, resolve
from fam_jax.hf import (
    copy_tokenizer,
    export_adapter,
    export_folder,
    hf_config,
    updated_config,
    without_adapter,
)
from fam_jax.hf.exporting import check_new
from fam_jax.hf.folder import CONFIG, copy_companions, read_json
from fam_jax.hf.multimodal import ARCHITECTURE as MULTIMODAL
from fam_jax.hf.multimodal import is_multimodal, text_part
from fam_jax.model import lora
from launch import cli


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("export_hf", __doc__)
    cli.add_checkpoint(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--lora", choices=("merged", "base", "adapter"), default="merged",
                        help="what to export of a run with LoRA; default: merged")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of the tensors; default: as in the checkpoint, float32 if merged")  # fmt: skip
    parser.add_argument(
        "--shard_gb", type=positive, default=4.0, help="largest size of a safetensors file, in GiB"
    )
    return parser.parse_args(arguments)


def positive(text: str) -> float:
    """Argument type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Export a model; return the exit code."""
    arguments = parse_arguments(argv)
    check_new(arguments.out)
    params, values, step = load_params(arguments.checkpoint, arguments.step)  # in host memory
    config, dtype = resolve(values), arguments.dtype
    if arguments.lora == "adapter":
        export_adapter(arguments.out, config, params, config.train.init_from)
        print(f"adapter of step {step} written to {arguments.out}")
        return 0
    if config.lora.rank and arguments.lora == "merged":
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            params, dtype = lora.merge(params, config.lora), dtype or "float32"
    params = without_adapter(params)
    kept = _companions(arguments.checkpoint, config)
    stored = str(params["embedding"]["table"].dtype)
    original = None if kept is None else read_json(kept / CONFIG)
    if original is None:
        hf = hf_config(config.model, dtype=stored)
    else:
        hf = updated_config(config.model, text_part(original), dtype=stored)

    def write_more(folder: Path) -> None:
        if kept is not None:
            copy_companions(kept, folder, config=False)
        else:
            copy_tokenizer(config.data.vocabulary, folder)

    with cli.progress_bar("writing") as show:
        export_folder(
            arguments.out, config.model, params, hf, dtype=dtype,
            shard_bytes=int(arguments.shard_gb * 2**30), on_progress=show, write_more=write_more,
        )  # fmt: skip
    print(f"step {step} written to {arguments.out}, for {hf['architectures'][0]}")
    if original is not None and is_multimodal(original):
        print(f"the text part of {MULTIMODAL}, without its vision tower", file=sys.stderr)
    return 0


def _companions(checkpoint: str, config: Config) -> epath.Path | None:
    """The folder of the small files that the model was imported with: its own, or that of the run it began with."""
    found = companion_folders(config, checkpoint)
    return next((kept for kept in found if (kept / CONFIG).is_file()), None)


if __name__ == "__main__":
    cli.run(main)
