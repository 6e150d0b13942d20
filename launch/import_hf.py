"""Import an open model in Hugging Face format: Llama 2 and 3, Mistral, Qwen 2 and 3, Gemma 1 to 3 (text).

    python -m launch.import_hf --source=DIR --out=runs/gemma
    python -m launch.import_hf --source=DIR --out=runs/gemma_fam --block_size=1024 --memory_segments=3 --fam_length=64

The import reads tensor by tensor, each straight into its shards, and writes a checkpoint that training, evaluation and
generation restore. On the hosts of a TPU slice, run the same command on all of them. After an interruption, run it
again.

With the defaults, the model computes what the original does for the first (memory_segments + 1) * block_size tokens,
or for all if all its layers have a sliding window.
The original config.json and the files of the tokenizer are kept in OUT/huggingface.

For another memory, set its kind and fields: --config.model.memory.kind=full --config.model.memory.context=4096.
"""

import argparse
import sys
from collections.abc import Sequence

from fam_jax.config import field_type
from fam_jax.config.format1 import MOVED
from fam_jax.config.overrides import KIND, Override

from . import cli, processes

MODEL_FIELDS = ("dtype", "block_size", "attention", "remat")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("import_hf", __doc__, fields=True, job=True)
    add = parser.add_argument
    add(
        "--source",
        required=True,
        metavar="DIR",
        help="folder with config.json, safetensors files and a tokenizer",
    )
    add("--out", required=True, metavar="CKPT", help="folder of the new checkpoint")
    add("--param_dtype", choices=("float32", "bfloat16"), help="of the parameters; default: as in the files")
    add(
        "--tokenizer",
        metavar="FILE|none",
        help="default: tokenizer.json of the source, else its tokenizer.model as AutoTokenizer converts it",
    )
    add(
        "--ignore_option",
        action="append",
        default=[],
        metavar="NAME",
        help="option of config.json that does not change what the model computes; may be repeated",
    )
    add("--seed", type=cli.seed, default=0, help="seed of the initial parameters of the memory")
    cli.add_mesh(parser)
    add = parser.add_argument_group("short forms of config fields").add_argument
    for name in MODEL_FIELDS:
        add(
            f"--{name}", type=field_type(f"config.model.{name}"), metavar="VALUE", help=f"config.model.{name}"
        )
    for name, field in MOVED.items():
        kind = field_type(f"config.model.memory.{field}", "fam")
        what = "config.model.memory." + field
        if name == "fam_length":
            what += " of the kind fam; 0 chooses the kind bswa"
        add(f"--{name}", type=str if kind is bool else kind, metavar="VALUE", help=what)
    return parser.parse_args(argv)


def overrides_of(arguments: argparse.Namespace) -> list[Override]:
    """Return the config fields to set. Full names come last, so they win over short forms."""
    given = [
        Override(f"config.model.{name}", str(getattr(arguments, name)))
        for name in MODEL_FIELDS
        if getattr(arguments, name) is not None
    ]
    length = arguments.fam_length
    if length is not None:
        given.append(Override(KIND, "bswa" if length == 0 else "fam"))
    given += [
        Override(f"config.model.memory.{field}", str(getattr(arguments, name)))
        for name, field in MOVED.items()
        if getattr(arguments, name) is not None and not (name == "fam_length" and length == 0)
    ]
    return [*given, *arguments.overrides]


def main(argv: Sequence[str] | None = None) -> int:
    """Import a model, and return the exit code.

    Raises:
      UserError: the command line has a mistake, or the model cannot be imported.
    """
    arguments = parse_arguments(argv)
    processes.join(arguments, stop_together=False)
    # Imported once the command line is known to be right.
    import jax

    from fam_jax.hf import import_model

    with cli.progress_bar("reading") as show:
        imported = import_model(
            arguments.source,
            arguments.out,
            overrides_of(arguments),
            tokenizer=arguments.tokenizer,
            ignored_options=arguments.ignore_option,
            param_dtype=arguments.param_dtype,
            seed=arguments.seed,
            mesh=arguments.mesh,
            on_progress=show,
        )
    if jax.process_index() > 0:
        return 0
    model, vocabulary = imported.config.model, imported.config.data.vocabulary
    print(
        f"written to {arguments.out}: {model.num_layers} layers of width {model.model_dim}, "
        f"vocabulary {vocabulary if arguments.tokenizer != 'none' else 'none'}"
    )
    if imported.left_out:
        print(
            f"imported the text part only; left out {imported.left_out} tensors of the vision tower and its projector",
            file=sys.stderr,
        )
    if not (model.memory.has_state or imported.has_blocks):
        tokens = imported.exact_tokens
        print(
            "equal to the original for texts of any length"
            if tokens is None
            else f"equal to the original for the first {tokens} tokens; after them, each token sees a window of blocks",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
