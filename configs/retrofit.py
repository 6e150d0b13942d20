"""Gives an open pretrained model a working memory: LoRA of rank 64 and an initial FAM, all else frozen.

    python -m launch.import_hf --source=DIR --out=runs/gemma
    python -m launch.train --config=configs/retrofit.py:runs/gemma --workdir=runs/gemma_fam \
        --config.data.train_files=books/ --config.data.heldout_files=heldout/

The argument is the folder of a checkpoint (or FOLDER/STEP), whose model is taken as it is but for its attention: blocks
of 1,024 tokens, three of them visible behind a token's own, 64 feedback vectors. `--config.model.block_size`,
`memory_segments` and `fam_length` choose other ones; local layers, as of Gemma 2 and 3, keep their window. In place of
a folder it may be a public shape, to plan with:

    python -m launch.plan --config=configs/retrofit.py:llama3_8b --topology=v5e:4x4

Words behind it, with commas between:

    bswa    the same without FAM, to compare with
    smoke   three steps of a model small enough for a laptop, of the shape's kind; of a folder, of that model, in short
            blocks and rows

Full fine-tuning is `--config.lora.rank=0`. The guide is docs/retrofit.md.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs.public_models import SHAPES
from fam_jax.checkpoint import absolute
from fam_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ceil_div,
    default_config,
    memory_config,
)
from fam_jax.hf import model_fields
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.train.init_from import base_config, locate

WORDS = ("bswa", "smoke")
BLOCK, SEGMENTS, FAM = 1024, 3, 64  # the paper's


def get_config(arg: str = "") -> ConfigDict:
    """A config for the base that `arg` names.

    Raises:
      ConfigError: `arg` names no base, or an unknown word.
      CheckpointError: the folder holds no checkpoint.
    """
    place, words = _read(arg)
    smoke, shape = "smoke" in words, place in SHAPES
    base = _of_shape(place) if shape else base_config(place)
    model = base.model
    if smoke and shape:
        model = _small(model)
    config = default_config()
    fields = dataclasses.asdict(model) | _execution(model, 16 if smoke else BLOCK)
    config.model.memory = ConfigDict(fields.pop("memory"))
    config.model.update(fields)
    if "bswa" in words:
        config.model.memory = memory_config("bswa", segments=config.model.memory.segments)
    config.lora.update(rank=64, alpha=64.0)
    config.optimizer.update(name="adafactor", learning_rate=1e-4, warmup_steps=100)
    config.data.update(
        task="text",
        vocabulary=base.data.vocabulary,
        add_bos=base.data.add_bos,
        train_files=("tfds:pg19:train",),
        heldout_files=("tfds:pg19:test",),
        sequence_length=8704,  # the paper's, of which the repetition is a part
        repeat_segment=256,
    )
    config.train.update(
        steps=2000,  # the paper: 50,000 of 128 rows
        batch_size=32,
        loss_chunk=16_384,  # vocabularies are large
        random_state_passing=0.8 if config.model.memory.kind == "fam" else 0.0,
        checkpoint_every=200,
        init_from="" if shape else place,
    )
    config.mesh.update(data=1, fsdp=0)  # gradients are small; it is the frozen weights that need room
    config.evaluate.update(documents=32, batch_size=8)
    if smoke:
        _shorten(config)
    return config


def _read(arg: str) -> tuple[str, list[str]]:
    """The base, and the words behind it."""
    parts = [part for part in arg.split(",") if part]
    words = [part for part in parts if part in WORDS]
    places = [part for part in parts if part not in WORDS] or ["llama3_8b"] * ("smoke" in words)
    where = f"configs/retrofit.py{':' * bool(arg)}{arg}"
    if len(places) != 1:
        raise ConfigError(
            f"{where}: expected the folder of a checkpoint, such as configs/retrofit.py:runs/gemma, or one of "
            f"{', '.join(SHAPES)}; then, with commas between, some of {', '.join(WORDS)}"
        )
    place = places[0]
    if place not in SHAPES and not locate(place)[0].is_dir():
        raise ConfigError(
            f"{where}: {absolute(place)} is no folder, and {place!r} none of {', '.join((*SHAPES, *WORDS))}; "
            "launch/import_hf.py makes the folder of an open model"
        )
    return place, words


def _of_shape(name: str) -> Config:
    """The config of an import, as far as a public model's config.json tells; its vocabulary has to be given."""
    model = ModelConfig(
        **model_fields(SHAPES[name]),
        dtype="bfloat16",
        block_size=BLOCK,
        memory=BlockSlidingWindowConfig(segments=4),
    )
    return Config(model=model, data=DataConfig(vocabulary=""))


def _execution(model: ModelConfig, block_size: int) -> dict[str, Any]:
    """Fields of how the model remembers and executes; a base that has a FAM remembers as it did."""
    fields: dict[str, Any] = {"remat": "full"}  # rows are long
    if model.memory.has_state:
        return fields
    # Local layers see their whole window. The segments replace the window of all layers, as of Mistral.
    segments = max(SEGMENTS, ceil_div(model.local_window - 1, block_size))
    return fields | {
        "block_size": block_size,
        "memory": memory_config("fam", segments=segments, length=min(FAM, block_size)).to_dict(),
    }


def _small(model: ModelConfig) -> ModelConfig:
    """A few thousand parameters; the kind of model stays."""
    layers = min(len(model.layer_pattern) + 1, model.num_layers)
    window = min(model.local_window, 12)
    return dataclasses.replace(
        model, vocab_size=264, num_layers=layers, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ff_dim=64,
        query_pre_attn_scalar=0.0, local_window=window, dtype="float32",
    )  # fmt: skip


def _shorten(config: ConfigDict) -> None:
    """Three steps, on the sources of this repository."""
    config.data.update(
        train_files=("fam_jax",), heldout_files=("launch",), file_suffixes=(".py",), sequence_length=80,
        repeat_segment=0, shuffle_batches=1, vocabulary=config.data.vocabulary or "bytes",
    )  # fmt: skip
    config.train.update(steps=3, batch_size=8, loss_chunk=1024, log_every=1, checkpoint_every=3)
    config.optimizer.update(warmup_steps=0)
    config.evaluate.update(documents=4, batch_size=4)
    config.lora.update(rank=4, alpha=4.0, random_base=not config.train.init_from)
