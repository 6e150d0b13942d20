"""The memory group of a model's config: its fields depend on the kind of memory.

Each architecture in `fam_jax/memories/` declares the group of its own fields, a subclass of :class:`MemoryConfig`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import ml_collections

from fam_jax.config.errors import ConfigError
from fam_jax.config.fields import field_types, group, setting

if TYPE_CHECKING:
    from fam_jax.config.model import ModelConfig


@group("model.memory", effect="state")
class MemoryConfig:
    """The base of the config groups of all kinds of memory."""

    kind: str = setting(default="", doc="The architecture, a name in fam_jax/memories/registry.py.")

    # Logical axes (`fam_jax.sharding.AXES`) of the memory's own parameters by name, without that of the layers.
    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    if TYPE_CHECKING:  # fields in some kinds of memory, constants in others

        @property
        def window(self) -> int:
            """Distance in tokens from which keys are hidden; 0 sets no limit beside the cached blocks."""

        @property
        def stop_gradient(self) -> bool:
            """Whether gradients stop at the keys and values of earlier blocks."""

    else:
        window = 0
        stop_gradient = False

    def cached_blocks(self, block_size: int) -> int:
        """Return m, the number of past blocks whose keys and values stay visible."""
        return 0

    @property
    def has_state(self) -> bool:
        """Return whether there is a state beyond the window that can be passed on and ablated."""
        return True

    @property
    def extra_keys(self) -> int:
        """Return the number of keys that every token sees beside its window."""
        return 0

    def extra_keys_of_block(self, block: int) -> int:
        """Return how many extra keys the tokens of block number `block` of a stream see."""
        return self.extra_keys

    @property
    def chained_rows(self) -> int:
        """Return M, the rows that a chain of updates passes from block to block; 0 if there is no such chain."""
        return 0

    def of_layer(self, index: int, model: "ModelConfig") -> "MemoryConfig":
        """Return the memory of a layer that is not local, by default this one.

        Another one needs the same `cached_blocks`, and leaves the state of this one as it is, except for the window.

        Args:
          index: the layer's number, from 0.
          model: the model's config.
        """
        return self

    @property
    def has_auxiliary_loss(self) -> bool:
        """Return whether layers add losses of their own to the training loss, by `add_auxiliary_loss`."""
        return False

    def check_model(self, model: "ModelConfig") -> None:
        """Raise :class:`ConfigError` if the memory contradicts the rest of its model."""


def memory_config_type(kind: Any, path: str = "config.model.memory") -> type[MemoryConfig]:
    """Return the group of fields of a kind of memory.

    Raises:
      ConfigError: the registry has no such kind.
    """
    from fam_jax.memories.registry import memory_class, memory_kinds  # memories import this package

    if kind not in memory_kinds():
        raise ConfigError(f"{path}.kind: expected one of {', '.join(memory_kinds())}, got {kind!r}")
    return memory_class(kind).Config


def kinds_with_field(name: str) -> list[str]:
    """Return the kinds of memory that have a field of this name."""
    from fam_jax.memories.registry import memory_kinds

    return [kind for kind in memory_kinds() if name in field_types(memory_config_type(kind))]


def memory_config(kind: str, **fields: Any) -> ml_collections.ConfigDict:
    """Return a memory group for a config file.

    Assign the result, `config.model.memory = memory_config("bswa", segments=2)`: `update` would merge the fields.

    Raises:
      ConfigError: there is no such kind, or the kind has no such field.
    """
    values = dataclasses.asdict(typing.cast(Any, memory_config_type(kind)()))
    for name in fields:
        check_memory_field(kind, name)
    return ml_collections.ConfigDict(values | fields)


def check_memory_field(kind: str, name: str, path: str = "config.model.memory") -> None:
    """Raise :class:`ConfigError` if a kind of memory has no field of this name."""
    own = field_types(memory_config_type(kind))
    if name in own:
        return
    others = kinds_with_field(name)
    if others:
        named = ", ".join(others[:3]) + (" and others" if others[3:] else "")
        raise ConfigError(
            f"{path}.{name}: is a field of {named}, but the kind is {kind}; to change the kind, set "
            f"--config.model.memory.kind={others[0]} or, in a config file, config.model.memory = "
            f"memory_config({others[0]!r})"
        )
    raise ConfigError(f"{path}.{name}: no such field; {kind} has {', '.join(own)}")


def memory_parameter_axes(name: str) -> tuple[str, ...] | None:
    """Return the logical axes of a memory's parameter, without that of the layers; None if no memory has it.

    Raises:
      ValueError: two kinds of memory disagree.
    """
    from fam_jax.memories.registry import memory_kinds

    groups = {kind: memory_config_type(kind).parameter_axes for kind in memory_kinds()}
    found = {kind: axes[name] for kind, axes in groups.items() if name in axes}
    if len(set(found.values())) > 1:
        raise ValueError(f"memory parameter {name}: its logical axes differ between {', '.join(found)}")
    return next(iter(found.values()), None)
