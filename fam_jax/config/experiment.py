"""The config of an experiment: all groups, built from the nested dict or ConfigDict of a config file."""

import dataclasses
import difflib
import typing
from typing import Any

import ml_collections

from fam_jax.config.data import DataConfig
from fam_jax.config.errors import ConfigError, require
from fam_jax.config.fields import check_type, field_types
from fam_jax.config.format1 import moved_field
from fam_jax.config.memory import MemoryConfig, check_memory_field, kinds_with_field, memory_config_type
from fam_jax.config.model import ModelConfig
from fam_jax.config.strict_json import dump_json
from fam_jax.config.training import EvaluateConfig, LoraConfig, MeshConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of an experiment. `help()` of each group lists its fields."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009 (it is frozen)
    data: DataConfig = DataConfig()  # noqa: RUF009
    train: TrainConfig = TrainConfig()  # noqa: RUF009
    evaluate: EvaluateConfig = EvaluateConfig()  # noqa: RUF009
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009
    lora: LoraConfig = LoraConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        self.data.check_task()
        remembers = self.model.memory.has_state
        require(
            self.train.random_state_passing == 0 or remembers,
            f"config.train.random_state_passing: {self.model.memory.kind} has no state beyond its window to pass on",
        )
        require(
            self.model.block_size % self.data.filler_step == 0,
            f"config.data.filler_step: {self.data.filler_step} does not divide model.block_size "
            f"{self.model.block_size}",
        )
        require(
            self.train.carry == "none" or self.data.layout == "continuous" or self.data.questions > 1,
            f"config.train.carry: {self.train.carry} needs rows that go on in the next batch; "
            "set data.layout to continuous, or with the task passkey data.questions above 1",
        )
        require(
            self.data.questions == 1 or self.train.carry == "memory",
            f"config.data.questions: {self.data.questions} asks for a key in later batches, whose rows must go on with "
            f"the memory; set train.carry to memory (it is {self.train.carry})",
        )
        require(
            self.train.carry != "memory" or remembers,
            f"config.train.carry: {self.model.memory.kind} has no state beyond its window to carry; use all",
        )
        require(
            self.data.layout != "continuous" or self.data.sequence_length % self.model.block_size == 0,
            f"config.data.sequence_length: {self.data.sequence_length} is not a multiple of model.block_size "
            f"{self.model.block_size}, as the layout continuous needs; change one of the two",
        )
        require(
            not self.evaluate.ablations or remembers,
            f"config.evaluate.ablations: {self.model.memory.kind} has no state beyond its window to ablate",
        )


def default_config() -> ml_collections.ConfigDict:
    """Return all fields at their defaults, for a config file to edit."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def resolve(values: Any) -> Config:
    """Build a :class:`Config` from a ConfigDict or nested dict.

    Raises:
      ConfigError: a field is unknown, has the wrong type, or contradicts another.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    return _build(Config, values, "config")


def to_json(config: Config) -> str:
    """Return the config as indented JSON. :func:`resolve` restores it from the parsed JSON."""
    return dump_json(dataclasses.asdict(config), indent=2, sort_keys=True)


def changed(config: Config, **groups: dict[str, Any]) -> Config:
    """Return `config` with some fields of its groups replaced, as in `changed(config, train={"steps": 5})`.

    Raises:
      ConfigError: a value is not allowed.
    """
    new = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in groups.items()}
    return dataclasses.replace(config, **new)


def field_type(path: str, kind: str | None = None) -> Any:
    """Return the type of the field at `path`, such as "config.model.num_layers".

    Args:
      path: path with dots.
      kind: kind of memory, which decides the fields of config.model.memory; None accepts the fields of any kind.

    Raises:
      ConfigError: there is no such field, or it is a group of fields.
    """
    found: Any = Config
    parts = path.split(".")
    for end in range(1, len(parts)):
        prefix, name = ".".join(parts[:end]), parts[end]
        if not dataclasses.is_dataclass(found):
            raise ConfigError(f"{path}: {prefix} is not a group of fields")
        if found is MemoryConfig:
            found = _memory_field_type(kind, name, prefix)
        else:
            found = _field_type(typing.cast(type, found), name, prefix)
    if dataclasses.is_dataclass(found):
        first = next(iter(field_types(found)))
        raise ConfigError(f"{path}: is a group of fields; set one of them, such as {path}.{first}")
    return found


def check_field(path: str) -> None:
    """Raise :class:`ConfigError` unless `path`, such as "config.model.num_layers", names a field."""
    field_type(path)


def _memory_field_type(kind: str | None, name: str, path: str) -> Any:
    from fam_jax.memories.registry import memory_kinds

    if kind is None:
        kind = [*kinds_with_field(name), *memory_kinds()][0]
    check_memory_field(kind, name, path)
    return field_types(memory_config_type(kind))[name]


def _field_type(cls: type, name: str, path: str) -> Any:
    types = field_types(cls)
    if name in types:
        return types[name]
    if moved := moved_field(f"{path}.{name}"):
        raise ConfigError(f"{path}.{name}: is now {moved}")
    near = difflib.get_close_matches(name, types, n=1)
    hint = f"did you mean {near[0]}?" if near else f"{path} has {', '.join(types)}"
    raise ConfigError(f"{path}.{name}: no such field; {hint}")


def _build(cls: Any, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a group of fields, got {values!r}")
    if cls is MemoryConfig:
        kind = values.get("kind", "fam")
        cls = memory_config_type(kind, path)
        for name in values:
            check_memory_field(kind, name, path)
    types = {name: _field_type(cls, name, path) for name in values}
    return cls(**{name: _convert(types[name], value, f"{path}.{name}") for name, value in values.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    value = _plain(kind, value)
    check_type(kind, value, path)
    return value


def _plain(kind: Any, value: Any) -> Any:
    """Return a value with tuples for the lists of JSON, and floats for the integers of float fields."""
    if isinstance(value, list | tuple) and typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        kinds = [items[0]] * len(value) if items[-1] is ... else [*items, *[Any] * len(value)]
        return tuple(_plain(item, entry) for item, entry in zip(kinds, value, strict=False))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
