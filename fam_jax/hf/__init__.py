"""Open checkpoints in Hugging Face format, in and out: a folder of `config.json`, safetensors and a tokenizer.

`families.py` translates configs, whose options `options.py` knows, `names.py` names and layouts of tensors;
`multimodal.py` finds the text part of a model with vision, `folder.py` reads a folder, `importing.py` and
`exporting.py` move the tensors one at a time, `adapter.py` LoRA updates. What cannot be expressed exactly on the other
side is refused by name.
"""

from fam_jax.hf.adapter import export_adapter, without_adapter
from fam_jax.hf.errors import ConvertError
from fam_jax.hf.exporting import export_folder
from fam_jax.hf.families import hf_config, model_fields, model_window, updated_config
from fam_jax.hf.folder import Folder
from fam_jax.hf.importing import import_parameters
from fam_jax.hf.tokenizer import adds_bos, check_tokenizer, copy_tokenizer, find_tokenizer

__all__ = [
    "ConvertError",
    "Folder",
    "adds_bos",
    "check_tokenizer",
    "copy_tokenizer",
    "export_adapter",
    "export_folder",
    "find_tokenizer",
    "hf_config",
    "import_parameters",
    "model_fields",
    "model_window",
    "updated_config",
    "without_adapter",
]
