"""Tiny models that transformers saved, with the logits that it computed: `python -m tests.hf.hf_models`."""

import dataclasses
import pathlib

import jax
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.hf import Folder, import_parameters, model_fields

DATA = pathlib.Path(__file__).parent / "data"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
VOCABULARY = 40
LENGTH = 21  # crosses every window and several borders of blocks


def recorded_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)


def recorded_logits(name: str) -> np.ndarray:
    return np.load(DATA / name / "logits.npy")


def config_of(folder: Folder, block_size: int = 4, **changes) -> ModelConfig:
    """Of a model that sees its whole context, in blocks."""
    whole = {"block_size": block_size, "memory_segments": -(-LENGTH // block_size) - 1, "fam_length": 0}
    return dataclasses.replace(ModelConfig(), **model_fields(folder.config) | whole | changes)


def one_device(shapes):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: device, shapes)


def imported(path: pathlib.Path, **changes):
    """Config and parameters of a folder."""
    folder = Folder(path)
    config = config_of(folder, **changes)
    return config, import_parameters(folder, config, one_device)
