"""Export a checkpoint to Hugging Face format, which transformers loads.

    python -m launch.export_hf --checkpoint=runs/gemma --out=exported
    python -m launch.export_hf --checkpoint=runs/retrofit --out=adapter --lora=adapter

The export writes config.json, safetensors files, the tokenizer that the model was imported with (else the vocabulary
that the run was trained with) and, if the memory has parameters, memory.safetensors. transformers has neither blocks
nor memory: there the model attends to its whole context. --with_fam writes modeling_fam.py as well, PyTorch code with
which AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) loads the model with its blocks and memory.

A run with LoRA is exported with its updates merged into the weights, in float32 by default; --lora=base leaves them
out, and --lora=adapter exports them alone, for the PEFT library. An adapter names its base model: the folder that was
imported, or --base=NAME.
"""

import argparse
import math
import sys
from collections.abc import Sequence

from fam_jax.config import UserError

from . import cli


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("export_hf", __doc__)
    cli.add_checkpoint(parser)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="new folder")
    add(
        "--lora",
        choices=("merged", "base", "adapter"),
        default="merged",
        help="what to export of a run with LoRA; default: merged",
    )
    add(
        "--base",
        metavar="NAME",
        help="adapter: Hugging Face folder or name of the base model; default: the folder that was imported",
    )
    add(
        "--with_fam",
        action="store_true",
        help="write PyTorch code that computes FAM, or the window of a model without FAM, too",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the tensors; default: as in the checkpoint, or float32 if LoRA is merged",
    )
    add(
        "--shard_gb",
        type=positive,
        default=4.0,
        metavar="GIB",
        help="largest size of a safetensors file; default: 4",
    )
    found = parser.parse_args(argv)
    if found.base is not None and found.lora != "adapter":
        raise UserError("--base: names the base model of an adapter; leave it out, or pass --lora=adapter")
    return found


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
    """Export a model, and return the exit code.

    Raises:
      UserError: the command line has a mistake, or the model cannot be exported.
    """
    arguments = parse_arguments(argv)
    # Imported once the command line is known to be right.
    from fam_jax.hf import export_model
    from fam_jax.hf.multimodal import ARCHITECTURE

    with cli.progress_bar("writing") as show:
        exported = export_model(
            arguments.checkpoint,
            arguments.out,
            arguments.step,
            lora_updates=arguments.lora,
            base=arguments.base,
            with_fam=arguments.with_fam,
            dtype=arguments.dtype,
            shard_bytes=int(arguments.shard_gb * 2**30),
            on_progress=show,
        )
    if exported.architecture is None:
        print(f"adapter of step {exported.step} written to {arguments.out}")
        if exported.base is None:
            print("the adapter names no base model, because none is known; pass --base=NAME", file=sys.stderr)
        else:
            print(f"the adapter names {exported.base} as its base model", file=sys.stderr)
        return 0
    print(f"step {exported.step} written to {arguments.out}, for {exported.architecture}")
    if exported.text_part:
        print(f"exported the text part of {ARCHITECTURE}, without its vision tower", file=sys.stderr)
    if not exported.tokenizer:
        print("exported without a tokenizer: the checkpoint has none in a file", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
