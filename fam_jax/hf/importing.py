"""Import a model in Hugging Face format: from a folder to a checkpoint."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from fam_jax.checkpoint import COMPANIONS, Checkpoints, named_end_ids
from fam_jax.config import (
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    changed,
    fields_with_effect,
    memory_config,
    resolve,
)
from fam_jax.config.fields import field_types
from fam_jax.config.memory import memory_config_type
from fam_jax.config.overrides import KIND, Override, apply_overrides
from fam_jax.hf.config_json import ConvertError
from fam_jax.hf.converted_tokenizer import converted_tokenizer, needs_conversion
from fam_jax.hf.families import ModelDescription, describe_model
from fam_jax.hf.folder import Folder
from fam_jax.hf.loading import import_parameters
from fam_jax.hf.memory_file import check_memory_file, read_memory_config
from fam_jax.hf.output_folder import check_new_checkpoint, new_checkpoint
from fam_jax.hf.tokenizer import adds_bos, check_tokenizer, find_tokenizer
from fam_jax.sharding import make_mesh, param_shardings

# In place of a tokenizer's path: import the model without a tokenizer.
NO_TOKENIZER = "none"
# By default, tokens that a model sees at a time, if it was made for at least as many.
CONTEXT = 8192
BLOCK_SIZE = 1024
# Dtype of activations by that of the embedding table; float32 for all others.
DTYPES = {"bfloat16": "bfloat16", "float64": "float64"}
MEMORY = "config.model.memory."
# Fields of the model that do not depend on the weights.
FREE_FIELDS = {f"config.model.{name}" for name in fields_with_effect(ModelConfig, "state", "execution")}


class ImportedModel(NamedTuple):
    """An imported model."""

    # As it is in the checkpoint.
    config: Config
    # Number of tensors of a vision tower and its projector, which are not imported.
    left_out: int
    # How many tokens from the start the model computes what the original does; None: all.
    exact_tokens: int | None
    # Whether the folder is an export for PyTorch, whose model had blocks before.
    has_blocks: bool


def import_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    overrides: Sequence[Override] = (),
    *,
    tokenizer: str | None = None,
    ignored_options: Collection[str] = (),
    param_dtype: str | None = None,
    seed: int = 0,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  (frozen)
    on_progress: Callable[[int, int], None] | None = None,
) -> ImportedModel:
    """Write the checkpoint of a model in Hugging Face format, which training, evaluation and generation restore.

    All processes of a job call this together. An import that failed or was killed can be run again with the same `out`.

    Args:
      source: folder with config.json, safetensors files and a tokenizer.
      out: folder of the checkpoint, new or empty.
      overrides: config fields to set: block_size, dtype, attention, remat and the memory of the model.
      tokenizer: path of the tokenizer; None takes that of `source`; "none" imports the model without one.
      ignored_options: options of config.json that are known not to change what the model computes.
      param_dtype: dtype of the parameters; None keeps that of the files.
      seed: seed of the initial parameters of the memory.
      mesh: devices over which the parameters are spread while they are read.
      on_progress: called with the number of tensors read so far and in total.

    Raises:
      UserError: the model is not supported, a file is damaged, a field does not fit the model, or `out` cannot be
        written.
    """
    folder_out = check_new_checkpoint(out)
    devices = make_mesh(mesh)
    folder = Folder(source)
    named_end_ids(folder.path)  # generation would find out otherwise
    config = imported_config(folder, overrides, ignored_options)
    with contextlib.ExitStack() as stack:
        place = folder.path
        if tokenizer is None and needs_conversion(place):
            place = stack.enter_context(converted_tokenizer(place))
        file, vocabulary = choose_tokenizer(place, folder_out, tokenizer)
        if file is not None:
            check_tokenizer(file, config.model.vocab_size)
            config = changed(config, data={"vocabulary": vocabulary, "add_bos": adds_bos(file)})
        stack.enter_context(new_checkpoint(folder_out, folder.path, place))
        params = import_parameters(
            folder,
            config.model,
            lambda shapes: param_shardings(shapes, devices),
            param_dtype=param_dtype,
            seed=seed,
            on_progress=on_progress,
        )
        save_parameters(folder_out, config, params)
    window = describe_model(folder.config, ignored_options).window
    return ImportedModel(config, folder.left_out, exact_tokens(config.model, window), bool(folder.memory))


def exact_tokens(model: ModelConfig, window: int) -> int | None:
    """Return for how many tokens from the start a model without memory state computes what the original does.

    Args:
      model: the imported model.
      window: sliding window of all layers of the original, in tokens; 0: it has none.

    Returns:
      None: for a text of any length, as the model sees the original's window wherever it stands in a block.
    """
    own = getattr(model.memory, "window", 0)
    if window and own == window:
        return None
    # A token sees memory_segments whole blocks before its own, or less if the memory has a window.
    reach = model.memory_segments * model.block_size
    differ = [size for size in (own, window) if size and own != window]
    return min([reach + model.block_size, *differ])


def choose_tokenizer(folder: Path, out: epath.Path, choice: str | None) -> tuple[Path | None, str | None]:
    """Return the tokenizer of a folder and the `data.vocabulary` that names it after the import.

    Args:
      folder: the folder of the model, or of its converted tokenizer.
      out: folder of the checkpoint, to which the tokenizer of the folder is copied.
      choice: path of another tokenizer, None, or "none", for which both results are None.

    Raises:
      ConvertError: there is no tokenizer in the folder.
    """
    if choice == NO_TOKENIZER:
        return None, None
    if choice is not None:
        file = Path(choice).expanduser()
        return file, str(file.absolute())
    found = find_tokenizer(folder)
    if found is None:
        raise ConvertError(
            f"{folder}: holds neither tokenizer.model nor tokenizer.json; give one with --tokenizer=FILE, or pass "
            "--tokenizer=none to import the model without"
        )
    return found, str(out / COMPANIONS / found.name)


def imported_config(
    folder: Folder, overrides: Sequence[Override] = (), ignored_options: Collection[str] = ()
) -> Config:
    """Return the config of an imported model.

    By default the memory is the one stored beside the model. If there is none, it is Block Sliding Window Attention
    with enough blocks to compute what the original does, over at most 8,192 tokens.

    Args:
      folder: the folder of the model.
      overrides: fields of the model to set.
      ignored_options: options of config.json that are not read.

    Raises:
      ConvertError: the model is not supported, or the file of its memory is missing.
      ConfigError: a field cannot be set, or does not fit the model.
    """
    for override in overrides:
        _check_free(override.path)
    description = describe_model(folder.config, ignored_options)
    stored = folder.memory or read_memory_config(folder.path)
    table = "model.embed_tokens.weight"
    dtype = str(folder.dtype(table)) if table in folder.names else "float32"
    model = {
        **description.fields,
        "block_size": stored.get("block_size", BLOCK_SIZE),
        "dtype": DTYPES.get(dtype, "float32"),
    }
    values = {"model": model}
    apply_overrides(values, [each for each in overrides if not each.path.startswith(MEMORY)])
    kinds = [each.text for each in overrides if each.path == KIND]
    if not stored and not kinds:
        check_memory_file(folder)
    model["memory"] = _memory(description, stored.get("memory", {}), model["block_size"], kinds)
    apply_overrides(
        values, [each for each in overrides if each.path.startswith(MEMORY) and each.path != KIND]
    )
    return resolve(values)


def _check_free(path: str) -> None:
    if path in FREE_FIELDS or path.startswith(MEMORY):
        return
    if path.startswith("config.model."):
        raise ConfigError(f"{path}: the model's config.json decides this field; it cannot be set")
    raise ConfigError(f"{path}: is not a field of the model; set it when you train or evaluate")


def _memory(
    description: ModelDescription, stored: Mapping[str, Any], block_size: int, kinds: Sequence[str]
) -> dict[str, Any]:
    """Return the memory group of an imported model, before its fields are set.

    Args:
      description: of the model.
      stored: the memory group that was stored beside the model; empty if there is none.
      block_size: of the model; its range is not checked yet.
      kinds: kinds of memory that were asked for; the last one counts.
    """
    size = max(block_size, 1)
    context = min(description.context or CONTEXT, CONTEXT)
    segments = description.segments(size, context)
    fields = {"segments": segments, "window": description.window, "context": (segments + 1) * size, **stored}
    kind = [fields.pop("kind", "bswa"), *kinds][-1]
    own = field_types(memory_config_type(kind))
    return memory_config(kind, **{name: value for name, value in fields.items() if name in own}).to_dict()


def save_parameters(out: epath.Path, config: Config, params: dict[str, Any]) -> None:
    """Save parameters as step 0 of a checkpoint.

    Raises:
      CheckpointError: the checkpoint cannot be written.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    with Checkpoints(out, config=dataclasses.asdict(config), keep=1, in_flight_bytes=largest) as checkpoints:
        checkpoints.save(0, {"params": params}, {}, wait=True)
