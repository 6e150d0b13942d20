"""Tiny models that transformers saved, with the logits it computed; `python -m tests.hf.hf_models` records them."""

import pathlib

import jax
import numpy as np
import safetensors

from fam_jax.config import ModelConfig
from fam_jax.hf import Folder, describe_model, import_parameters
from fam_jax.memories.fam import FamConfig
from tests.model.tiny import variant

DATA = pathlib.Path(__file__).parent / "data"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
VOCABULARY = 40
LENGTH = 21  # crosses every window and several borders of blocks


def recorded_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)


def recorded_logits(name: str) -> np.ndarray:
    return np.load(DATA / name / "logits.npy")


def config_of(folder: Folder, block_size: int = 4, **changes) -> ModelConfig:
    """Return the config of a model that sees its whole context, in blocks; FAM if `changes` give it a length."""
    description = describe_model(folder.config)
    segments = description.segments(block_size, LENGTH)
    memory = FamConfig(length=0, segments=segments, window=description.window)
    return variant(ModelConfig(**description.fields, block_size=block_size, memory=memory), **changes)


def one_device(shapes):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: device, shapes)


def assert_same_tensors(path: pathlib.Path, other: pathlib.Path) -> None:
    """Compare names, shapes, dtypes and bits in two safetensors files, whatever their metadata."""
    found, wanted = (dict(safetensors.deserialize(file.read_bytes())) for file in (path, other))
    assert found.keys() == wanted.keys()
    for name in found:
        assert found[name] == wanted[name], name


def imported(path: pathlib.Path, **changes):
    """Return config and parameters of a folder."""
    folder = Folder(path)
    config = config_of(folder, **changes)
    return config, import_parameters(folder, config, one_device)
