"""Experiment configuration: frozen dataclasses, built from an ml-collections ConfigDict.

A config file (`configs/*.py`) edits the ConfigDict that :func:`default_config` returns; flags edit it further
(`--config.model.num_layers=4`). :func:`resolve` then builds the frozen :class:`Config` that the library uses. An
unknown field, a wrong type or an impossible combination raises :class:`ConfigError` with a one-line message that names
the field.
"""

from fam_jax.config.arithmetic import ceil_div
from fam_jax.config.data import DataConfig
from fam_jax.config.errors import ConfigError, UserError, require
from fam_jax.config.experiment import (
    Config,
    changed,
    check_field,
    default_config,
    field_type,
    resolve,
    to_json,
)
from fam_jax.config.fields import fields_with_effect, group, setting
from fam_jax.config.memory import MemoryConfig, memory_config
from fam_jax.config.model import ModelConfig
from fam_jax.config.overrides import is_rated, parse_argument, parse_rated, split_list
from fam_jax.config.training import (
    ABLATIONS,
    EvaluateConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "ABLATIONS",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "MemoryConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "UserError",
    "ceil_div",
    "changed",
    "check_field",
    "default_config",
    "field_type",
    "fields_with_effect",
    "group",
    "is_rated",
    "memory_config",
    "parse_argument",
    "parse_rated",
    "require",
    "resolve",
    "setting",
    "split_list",
    "to_json",
]
