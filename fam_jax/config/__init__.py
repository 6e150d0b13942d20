"""Experiment configuration: frozen dataclasses, built from an ml-collections ConfigDict.

A config file (`configs/*.py`) edits the ConfigDict that :func:`default_config` returns; flags edit it
further (`--config.model.num_layers=4`). :func:`resolve` then turns it into the frozen :class:`Config`
that the library takes. Every unknown field, wrong type or impossible combination raises
:class:`ConfigError`, whose message is one line that names the field.
"""

import dataclasses
import difflib
import json
import math
import typing
from typing import Any

import ml_collections

from fam_jax.config.data import DataConfig, task_mistake
from fam_jax.config.errors import ConfigError, UserError, require
from fam_jax.config.model import ModelConfig, validate_model

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "UserError",
    "check_field",
    "default_config",
    "resolve",
    "to_json",
    "validate",
]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adafactor with the paper's betas (section 3.1), or AdamW."""

    name: str = "adafactor"  # adafactor | adamw
    learning_rate: float = 1e-4
    schedule: str = "constant"  # constant | cosine (to zero at train.steps); both after the warm-up
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.99
    beta2_schedule: str = "constant"  # constant (debiased) | power: 1 - t^-beta2_power
    beta2_power: float = 0.8
    parameter_scaling: bool = False  # multiply updates by the RMS of the parameter (Adafactor only)
    block_rms_clip: float = 1.0  # RMS of a parameter's update is clipped to this (Adafactor only); 0 = off
    min_factored_dim: int = 128  # second moments are factored where both dimensions reach this
    epsilon: float = 1e-30  # Adafactor: added to squared gradients; AdamW: 1e-8 is usual
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the global gradient norm; 0 = off


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1  # micro-batches per step; divides batch_size
    seed: int = 0
    loss_chunk: int = 4096  # tokens whose logits exist at one time
    z_loss: float = 0.0
    random_state_passing: float = 0.0  # probability of starting from the saved FAM (0.8 in the paper)
    random_state_passing_from: int = 0  # steps taken before it is switched on
    random_position_offset: bool = False  # appendix B.2.2
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    init_from: str = ""  # workdir (or workdir/STEP) of a run whose parameters this one begins with


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of a frozen base, which train.init_from names; the other fields count if rank > 0.

    Patterns are those of `fnmatch`, over paths of parameters such as layers/query/kernel.
    """

    rank: int = 0  # of the update of each kernel (64 in the paper); 0 = off: all parameters are trained
    alpha: float = 64.0  # updates are scaled by alpha / rank
    targets: tuple[str, ...] = ("layers/*/kernel",)  # kernels with an update: attention and feed-forward
    train: tuple[str, ...] = ("*initial_fam",)  # what is trained beside the updates
    base_dtype: str = "model"  # of frozen matrices: float32 | bfloat16 | model: that of model.dtype
    random_base: bool = False  # without train.init_from, adapt random weights: of use only to try things out


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """From streamed memory: PassKey retrieval by generation, or the loss on held-out documents."""

    every: int = 0  # training steps between evaluations; 0 = only by launch/evaluate.py
    # PassKey.
    filler_blocks: tuple[int, ...] = (4, 9, 18, 36)
    keys: int = 64  # examples per length
    # Text and seqio.
    documents: int = 0  # held-out documents, drawn by seed; 0 = all
    min_tokens: int = 0  # shorter documents are left out
    ablations: tuple[str, ...] = ()  # zeroed, shuffled, frozen: the loss once more with a FAM of no use
    # All.
    batch_size: int = 64
    seed: int = 1_000_003
    chunk_blocks: int = 16  # blocks that prefill takes at a time


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; data or fsdp, if 0, takes the devices that the others leave."""

    data: int = 0
    fsdp: int = 1  # not the whole slice: there the TPU compiler makes all-reduces of reduce-scatters
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    model: ModelConfig = ModelConfig()  # noqa: RUF009  (it is frozen)
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()  # noqa: RUF009 (it is frozen)
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    lora: LoraConfig = LoraConfig()


def default_config() -> ml_collections.ConfigDict:
    """All fields at their defaults, ready to be edited by a config file."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def resolve(values: Any) -> Config:
    """Builds and validates a :class:`Config` from a ConfigDict or nested dict.

    Raises:
      ConfigError: a field is unknown, of the wrong type, or impossible beside another.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    config = _build(Config, values, "config")
    validate(config)
    return config


def to_json(config: Config) -> str:
    """The resolved config as indented JSON; :func:`resolve` of its parse gives it back."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def check_field(path: str) -> None:
    """Raises :class:`ConfigError` unless `path`, such as "config.model.num_layers", names a field."""
    parts = path.split(".")
    kind: Any = Config
    for end in range(1, len(parts)):
        if not dataclasses.is_dataclass(kind):
            raise ConfigError(f"{path}: {'.'.join(parts[:end])} is not a group of fields")
        kind = _field_type(typing.cast(type, kind), parts[end], ".".join(parts[:end]))
    if dataclasses.is_dataclass(kind):
        raise ConfigError(f"{path}: is a group of fields; set one, such as {path}.{next(iter(_types(kind)))}")


def _types(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _field_type(cls: type, name: str, path: str) -> Any:
    types = _types(cls)
    if name not in types:
        near = difflib.get_close_matches(name, types, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{path} has {', '.join(types)}"
        raise ConfigError(f"{path}.{name}: no such field; {hint}")
    return types[name]


def _build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a group of fields, got {values!r}")
    types = {name: _field_type(cls, name, path) for name in values}
    return cls(**{name: _convert(types[name], value, f"{path}.{name}") for name, value in values.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, path)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{path}: expected a list of {item.__name__}, got {value!r}")
        return tuple(_convert(item, v, path) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {kind.__name__}, got {value!r}")
    return value


CHOICES = {
    "model.activation": ("swiglu", "geglu", "gelu"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.dtype": ("float32", "bfloat16", "float64"),
    "model.rope_scaling": ("none", "linear", "llama3"),
    "model.fam_init": ("prompt", "prefix"),
    "model.fam_positions": ("last", "float", "zero"),
    "model.attention": ("auto", "reference", "xla", "pallas", "pallas_interpret"),
    "model.remat": ("none", "dots", "wide", "full"),
    "optimizer.name": ("adafactor", "adamw"),
    "optimizer.schedule": ("constant", "cosine"),
    "optimizer.beta2_schedule": ("constant", "power"),
    "lora.base_dtype": ("model", "float32", "bfloat16"),
}

# (field, lowest allowed value)
MINIMA = {
    **dict.fromkeys(
        ("model.vocab_size", "model.num_layers", "model.model_dim", "model.num_heads", "model.num_kv_heads",
         "model.head_dim", "model.ff_dim", "model.block_size", "model.fam_previous_blocks",
         "model.rope_factor", "model.rope_original_length",
         "data.digits", "data.filler_step", "data.shuffle_batches",
         "train.steps", "train.batch_size", "train.accumulation", "train.loss_chunk", "train.log_every",
         "train.checkpoint_every", "train.keep_checkpoints", "evaluate.keys", "evaluate.batch_size",
         "evaluate.chunk_blocks", "optimizer.min_factored_dim", "mesh.tensor"), 1),
    "data.sequence_length": 2,
    **dict.fromkeys(
        ("model.memory_segments", "model.window", "model.fam_length", "model.local_window",
         "model.logit_softcap", "model.attention_softcap", "model.query_pre_attn_scalar", "optimizer.warmup_steps",
         "optimizer.block_rms_clip", "optimizer.epsilon", "optimizer.weight_decay", "optimizer.clip_norm",
         "optimizer.learning_rate", "data.min_filler_blocks", "data.max_stage_steps", "data.prompt_weight",
         "data.repeat_segment", "data.repeat_weight", "train.seed", "train.z_loss",
         "train.random_state_passing_from", "evaluate.every", "evaluate.documents", "evaluate.min_tokens",
         "evaluate.seed", "mesh.data", "mesh.fsdp", "lora.rank"), 0),
}  # fmt: skip

DECAYS = ("optimizer.beta1", "optimizer.beta2", "optimizer.beta2_power")  # at least 0, below 1

FRACTIONS = (
    "data.advance_accuracy", "data.longest_fraction", "data.passkey_fraction",
    "data.last_stage_passkey_fraction",
    "train.random_state_passing",
)  # fmt: skip

ABLATIONS = ("zeroed", "shuffled", "frozen")

NUMBERS = {
    f"{group.name}.{field.name}"
    for group in dataclasses.fields(Config)
    for field in dataclasses.fields(typing.cast(type, group.type))
    if field.type is float
}


def validate(config: Config) -> None:
    """Raises :class:`ConfigError` if the values of `config` are out of range or contradict each other."""

    def get(field: str) -> Any:
        group, name = field.split(".")
        return getattr(getattr(config, group), name)

    for field, choices in CHOICES.items():
        if get(field) not in choices:
            raise ConfigError(f"config.{field}: expected one of {', '.join(choices)}, got {get(field)!r}")
    for field, lowest in MINIMA.items():
        if get(field) < lowest:
            raise ConfigError(f"config.{field}: must be at least {lowest}, got {get(field)}")
    for field in sorted(NUMBERS):
        if not math.isfinite(get(field)):
            raise ConfigError(f"config.{field}: must be a finite number, got {get(field)}")
    for field in DECAYS:
        if not 0 <= get(field) < 1:
            raise ConfigError(f"config.{field}: must be at least 0 and below 1, got {get(field)}")
    for field in FRACTIONS:
        if not 0 <= get(field) <= 1:
            raise ConfigError(f"config.{field}: must be between 0 and 1, got {get(field)}")
    validate_model(config.model)
    if wrong := task_mistake(config.data):
        raise ConfigError(f"config.data.{wrong}")
    _validate_rest(config)


def _validate_rest(config: Config) -> None:
    train, data, evaluate = config.train, config.data, config.evaluate
    require(
        train.batch_size % train.accumulation == 0,
        f"config.train.accumulation: {train.accumulation} does not divide batch_size {train.batch_size}",
    )
    require(
        train.random_state_passing == 0 or config.model.fam_length > 0,
        "config.train.random_state_passing: needs a FAM, but model.fam_length is 0",
    )
    require(
        config.mesh.data > 0 or config.mesh.fsdp > 0,
        "config.mesh.fsdp: 0 takes what data leaves, but data is 0 too",
    )
    stages = data.stage_blocks
    require(len(stages) > 0, "config.data.stage_blocks: must name at least one length")
    require(
        all(a < b for a, b in zip((data.min_filler_blocks, *stages), stages, strict=False)),
        f"config.data.stage_blocks: must rise and lie above min_filler_blocks {data.min_filler_blocks}, got {stages}",
    )
    require(
        config.model.block_size % data.filler_step == 0,
        f"config.data.filler_step: {data.filler_step} does not divide model.block_size {config.model.block_size}",
    )
    require(
        len(evaluate.filler_blocks) > 0 and min(evaluate.filler_blocks) > 0,
        f"config.evaluate.filler_blocks: must be positive lengths, got {evaluate.filler_blocks}",
    )
    require(config.lora.alpha > 0, f"config.lora.alpha: must be positive, got {config.lora.alpha}")
    require(
        config.lora.rank == 0 or len(config.lora.targets) > 0,
        "config.lora.targets: must name at least one kernel, or set rank to 0",
    )
    unknown = [name for name in evaluate.ablations if name not in ABLATIONS]
    require(not unknown, f"config.evaluate.ablations: expected some of {', '.join(ABLATIONS)}, got {unknown}")
    require(
        not evaluate.ablations or config.model.fam_length > 0,
        "config.evaluate.ablations: there is no FAM to ablate, as model.fam_length is 0",
    )
    require(data.digits <= 9, f"config.data.digits: at most 9, got {data.digits}")
