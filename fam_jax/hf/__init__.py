"""Open checkpoints in Hugging Face format: a folder of `config.json`, safetensors files and a tokenizer.

:func:`import_model` turns a folder into a checkpoint, :func:`export_model` a checkpoint into a folder.

    config_json.py    the options of a config.json and their types
    families.py       the supported families: from config.json to ModelConfig
    written_config.py from ModelConfig to config.json
    torch_model.py    exports for PyTorch, with the memory
    assets/           the code of their models
    multimodal.py     the text part of a model with a vision tower
    names.py          names and layouts of tensors
    folder.py         the tensors of a folder
    loading.py        from tensors to parameters, straight into their shards
    memory_file.py    the parameters of a memory, beside the tensors
    tokenizer.py      the tokenizer of a folder
    adapter.py        LoRA updates as an adapter for PEFT
    output_folder.py  folders that are written

Options and models that cannot be reproduced exactly are rejected by name.
"""

from fam_jax.hf.adapter import export_adapter
from fam_jax.hf.config_json import ConvertError
from fam_jax.hf.exporting import ExportedModel, export_folder, export_model
from fam_jax.hf.families import ModelDescription, describe_model
from fam_jax.hf.folder import Folder
from fam_jax.hf.importing import ImportedModel, import_model, imported_config
from fam_jax.hf.loading import import_parameters
from fam_jax.hf.tokenizer import adds_bos, check_tokenizer, copy_tokenizer, find_tokenizer
from fam_jax.hf.torch_model import torch_config
from fam_jax.hf.written_config import hf_config, updated_config

__all__ = [
    "ConvertError",
    "ExportedModel",
    "Folder",
    "ImportedModel",
    "ModelDescription",
    "adds_bos",
    "check_tokenizer",
    "copy_tokenizer",
    "describe_model",
    "export_adapter",
    "export_folder",
    "export_model",
    "find_tokenizer",
    "hf_config",
    "import_model",
    "import_parameters",
    "imported_config",
    "torch_config",
    "updated_config",
]
