"""Give an open pretrained model a memory: train LoRA of rank 64 and an initial FAM, and freeze all else.

    python -m launch.import_hf --source=DIR --out=runs/gemma
    python -m launch.train --config=configs/retrofit.py:runs/gemma --workdir=runs/gemma_fam \
        --config.data.train_files=books/ --config.data.heldout_files=heldout/

The argument names the base: the folder of a checkpoint (or FOLDER/STEP). Of its model only attention changes: it uses
blocks of 1,024 tokens, with the last three blocks visible, and 64 feedback vectors. To change these, set
`--config.model.block_size`, `--config.model.memory.segments` and `--config.model.memory.length`. Local layers, as in
Gemma 2 and 3, keep their window. A base that was imported or trained with a memory keeps it.

To plan without weights, name a public model instead:

    python -m launch.plan --config=configs/retrofit.py:llama3_8b --topology=v5e:4x4

Words may follow, with commas between them:

    bswa    the same without FAM, as a control
    smoke   three steps with short blocks and rows, for a laptop; a public model becomes a tiny one of the same kind

A path with commas is quoted: --config='configs/retrofit.py:"runs/a,b",bswa'.

For full fine-tuning set `--config.lora.rank=0`. See docs/retrofit.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from fam_jax.checkpoint import absolute, locate
from fam_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ceil_div,
    default_config,
    memory_config,
    split_list,
)
from fam_jax.hf import describe_model
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.training.init_from import base_config

from .public_models import PUBLIC_MODELS

FILE = "configs/retrofit.py"
WORDS = ("bswa", "smoke")
# The paper's values.
BLOCK, SEGMENTS, LENGTH = 1024, 3, 64


def get_config(arg: str = "") -> ConfigDict:
    """Return a config for the base that `arg` names.

    Raises:
      ConfigError: `arg` names no base, or has an unknown word.
      CheckpointError: the folder holds no checkpoint.
    """
    return retrofit_config(*read_base(FILE, split_list(arg, f"{FILE}:{arg}"), WORDS))


def retrofit_config(place: str, words: Sequence[str]) -> ConfigDict:
    """Return a config for the base in a folder, or for a public model.

    Args:
      place: the base.
      words: "bswa" and "smoke", as above.

    Raises:
      CheckpointError: the folder holds no checkpoint.
    """
    public, smoke = place in PUBLIC_MODELS, "smoke" in words
    base = _public_base(place) if public else base_config(place)
    model = _small(base.model) if public and smoke else base.model
    config = default_config()
    fields = dataclasses.asdict(model) | _retrofitted(model, 16 if smoke else BLOCK)
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
        # The paper's row length, which includes the repetition at the end.
        sequence_length=8704,
        layout="by_row",
        repeat_segment=256,
    )
    config.train.update(
        # The paper trains 50,000 steps of 128 rows.
        steps=2000,
        batch_size=32,
        loss_chunk=16_384,
        random_state_passing=0.8 if config.model.memory.kind == "fam" else 0.0,
        checkpoint_every=200,
        init_from="" if public else place,
    )
    # Spread the frozen weights over all devices: they need memory, while gradients are small.
    config.mesh.update(data=1, fsdp=0)
    config.evaluate.update(documents=32, batch_size=8)
    if smoke:
        _shorten(config)
    return config


def read_base(file: str, parts: Sequence[str], words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the base and the words of an argument. With the word smoke, the base may be left out.

    Args:
      file: path of the config file, for messages.
      parts: entries of the argument, a base and any of `words`.
      words: the known words.

    Raises:
      ConfigError: `parts` name no base, or have an unknown word.
    """
    where = f"{file}:{','.join(parts)}" if parts else file
    given = [part for part in parts if part in words]
    places = [part for part in parts if part not in words]
    if not places and "smoke" in given:
        places = ["llama3_8b"]
    if len(places) != 1:
        raise ConfigError(
            f"{where}: expected one base, then any of {', '.join(words)}, with commas between them; give the folder of "
            f"a checkpoint, as in {file}:runs/gemma, or one of {', '.join(PUBLIC_MODELS)}; quote a path with commas"
        )
    place = places[0]
    if place not in PUBLIC_MODELS and not locate(place)[0].is_dir():
        raise ConfigError(
            f"{where}: {absolute(place)} is not a folder, and {place!r} is none of "
            f"{', '.join((*PUBLIC_MODELS, *words))}; import an open model with launch/import_hf.py"
        )
    return place, given


def _public_base(name: str) -> Config:
    """Return the config that an import of a public model would have, with the vocabulary unknown."""
    model = ModelConfig(
        **describe_model(PUBLIC_MODELS[name]).fields,
        dtype="bfloat16",
        block_size=BLOCK,
        memory=BlockSlidingWindowConfig(segments=4),
    )
    return Config(model=model, data=DataConfig(vocabulary=""))


def _retrofitted(model: ModelConfig, block_size: int) -> dict[str, Any]:
    """Return the fields of a model that a retrofit changes. A base that has a memory beyond its window keeps it."""
    fields: dict[str, Any] = {"remat": "full"}  # rows are long
    if model.memory.has_state:
        return fields
    # The blocks replace a window of all layers, as in Mistral. Local layers keep theirs, so it has to fit the cache.
    segments = max(SEGMENTS, ceil_div(model.local_window - 1, block_size))
    memory = memory_config("fam", segments=segments, length=min(LENGTH, block_size))
    return fields | {"block_size": block_size, "memory": memory.to_dict()}


def _small(model: ModelConfig) -> ModelConfig:
    """Return a model of a few thousand parameters with the same options."""
    layers = min(len(model.layer_pattern) + 1, model.num_layers)
    window = min(model.local_window, 12)
    return dataclasses.replace(
        model,
        vocab_size=264,
        num_layers=layers,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ff_dim=64,
        query_pre_attn_scalar=0.0,
        local_window=window,
        dtype="float32",
    )


def _shorten(config: ConfigDict) -> None:
    """Change a config to a run of three steps on the sources of this repository."""
    config.data.update(
        train_files=("fam_jax",),
        heldout_files=("launch",),
        file_suffixes=(".py",),
        sequence_length=80,
        repeat_segment=0,
        vocabulary=config.data.vocabulary or "bytes",
    )
    config.train.update(steps=3, batch_size=8, loss_chunk=1024, log_every=1, checkpoint_every=3)
    config.optimizer.update(warmup_steps=0)
    config.evaluate.update(documents=4, batch_size=4)
    config.lora.update(rank=4, alpha=4.0, random_base=not config.train.init_from)
