"""Give an open pretrained model a memory: import it, train LoRA and an initial FAM on your text, export the result.

    python examples/add_memory_to_open_model.py llama/ books/ runs/llama

The first argument is a folder in Hugging Face format: config.json, safetensors files and a tokenizer. docs/retrofit.md
explains the choices; configs/retrofit.py has the settings of the paper for models of any size.
"""

import argparse
import dataclasses
import pathlib

import fam_jax
from fam_jax.checkpoint import read_config
from fam_jax.config import LoraConfig, OptimizerConfig, TrainConfig
from fam_jax.hf import export_model, import_model
from fam_jax.memories.fam import FamConfig


def main(argv: list[str] | None = None) -> None:
    """Import, train, generate and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder of the open model")
    parser.add_argument("books", help="folder of .txt files to train on")
    parser.add_argument("out", type=pathlib.Path, help="folder for the import, the run and the export")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args(argv)
    base, run, exported = (arguments.out / name for name in ("base", "run", "exported"))

    if not base.exists():
        import_model(arguments.source, base)
    imported = fam_jax.resolve(read_config(base))
    block = arguments.block_size
    config = dataclasses.replace(
        imported,
        # Attention over the whole context becomes attention to blocks, with feedback vectors beside it.
        model=dataclasses.replace(
            imported.model,
            block_size=block,
            memory=FamConfig(length=min(64, block), segments=3),
            remat="full",
        ),
        # The weights are frozen. LoRA and the initial FAM are trained.
        lora=LoraConfig(rank=64, alpha=64.0),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
        data=dataclasses.replace(
            imported.data, task="text", sequence_length=8 * block, train_files=(arguments.books,)
        ),
        train=TrainConfig(init_from=str(base), steps=arguments.steps, batch_size=8, random_state_passing=0.8),
    )
    fam_jax.train(config, str(run))

    model = fam_jax.TextModel.restore(run)
    state = model.read("It is a truth universally acknowledged, that ")
    print(model.generate(state, max_tokens=32).text)

    export_model(run, exported)
    print(f"exported with its memory to {exported}")


if __name__ == "__main__":
    main()
