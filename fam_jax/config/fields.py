"""Declaration of config fields: a field states its default, meaning, range and effect in one place.

A group of fields is a frozen dataclass made by :func:`group`. It checks its values whenever it is built: from a config
file, from the command line or in Python.
"""

import dataclasses
import functools
import inspect
import itertools
import math
import textwrap
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar, dataclass_transform

from fam_jax.config.errors import ConfigError

T = TypeVar("T")

# Counts and sizes end up in arrays of 32-bit integers.
LARGEST_INT = 2**31 - 1
Effect = Literal["parameters", "state", "training", "execution"]
"""What a change of a field changes.

parameters: what the parameters are or mean. state: what a stream's state holds. training: what training computes.
execution: speed, memory, reports, or how long a run takes; it may change whenever a run is resumed.
"""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """The metadata of a field."""

    doc: str
    minimum: float | None = None
    maximum: float | None = None
    # An upper limit that the value must stay below.
    below: float | None = None
    # A lower limit that the value must exceed.
    above: float | None = None
    choices: tuple[str, ...] = ()
    effect: Effect | None = None
    # The data tasks that use the field; empty: all.
    tasks: tuple[str, ...] = ()


def setting(
    *,
    default: T,
    doc: str,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    effect: Effect | None = None,
    tasks: tuple[str, ...] = (),
) -> T:
    """Declare a field of a group.

    Args:
      default: the default value.
      doc: the meaning, shown by `help` and by `--help-config`.
      minimum: lowest allowed value.
      maximum: highest allowed value.
      below: the value must be smaller than this.
      above: the value must be larger than this.
      choices: allowed words; for a tuple, those of each entry.
      effect: what changes with the field; by default the effect of its group.
      tasks: the tasks, of the data or of evaluation, that use the field; by default all.
    """
    constraint = Constraint(doc, minimum, maximum, below, above, choices, effect, tasks)
    return dataclasses.field(default=default, metadata={"constraint": constraint})


@dataclass_transform(frozen_default=True, field_specifiers=(setting, dataclasses.field))
def group(path: str, *, effect: Effect = "training") -> Callable[[type[T]], type[T]]:
    """Make a class a group of fields: a frozen dataclass that checks its values when it is built.

    A class may define `check(self)`, which raises :class:`ConfigError` if fields contradict each other.

    Args:
      path: path of the group in a config, such as "model"; used in error messages.
      effect: what changes with a field, unless the field declares its own effect.
    """

    def decorate(cls: type[T]) -> type[T]:
        def post_init(self: Any) -> None:
            check_values(self)
            if hasattr(self, "check"):
                self.check()

        cls.__post_init__ = post_init  # type: ignore[attr-defined]
        made = dataclasses.dataclass(frozen=True)(cls)
        made.config_path = path  # type: ignore[attr-defined]
        made.default_effect = effect  # type: ignore[attr-defined]
        made.__doc__ = _document(made)
        return made

    return decorate


def constraint_of(field: dataclasses.Field) -> Constraint:
    """Return the constraint that a field was declared with."""
    return field.metadata.get("constraint", Constraint(""))


def effect_of(cls: Any, field: dataclasses.Field) -> Effect:
    """Return the effect of a field of the group `cls`."""
    return constraint_of(field).effect or cls.default_effect


def fields_with_effect(cls: Any, *effects: Effect, prefix: str = "") -> set[str]:
    """Return the paths of all fields of a group, and of the groups in it, that have one of `effects`."""
    found = set()
    for field in dataclasses.fields(cls):
        kind = field_types(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            found |= fields_with_effect(kind, *effects, prefix=f"{prefix}{field.name}.")
        elif effect_of(cls, field) in effects:
            found.add(prefix + field.name)
    return found


def field_types(cls: Any) -> dict[str, Any]:
    """Return the resolved type of every field of a group."""
    return _field_types(cls)  # mypy rejects a dataclass as the hashable argument of a cached function


@functools.lru_cache
def _field_types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_values(values: Any) -> None:
    """Raise :class:`ConfigError` if a field of a group has the wrong type or lies outside its range."""
    for field in dataclasses.fields(values):
        value, path = getattr(values, field.name), f"config.{values.config_path}.{field.name}"
        kind = field_types(type(values))[field.name]
        if not dataclasses.is_dataclass(kind):
            check_type(kind, value, path)
            check_range(constraint_of(field), value, path, kind)


def check_type(kind: Any, value: Any, path: str) -> None:
    """Raise :class:`ConfigError` unless `value` has the type `kind`; an int is accepted for a float."""
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, tuple) or (items[-1] is not ... and len(value) != len(items)):
            raise ConfigError(f"{path}: expected {type_name(kind)}, got {value!r}")
        for item, entry in zip(
            itertools.cycle(items[:1]) if items[-1] is ... else items, value, strict=False
        ):
            check_type(item, entry, path)
    elif isinstance(value, bool) != (kind is bool) or not isinstance(
        value, (int, float) if kind is float else kind
    ):
        raise ConfigError(f"{path}: expected {kind.__name__}, got {value!r}")


def type_name(kind: Any) -> str:
    """Return what to call the type of a field in messages."""
    if typing.get_origin(kind) is not tuple:
        return kind.__name__
    items = typing.get_args(kind)
    if items[-1] is ...:
        return f"a list of {type_name(items[0])}"
    return f"pairs of {' and '.join(map(type_name, items))}"


def check_range(limits: Constraint, value: Any, path: str, kind: Any = None) -> None:
    """Raise :class:`ConfigError` if a value, or an entry of a list, is outside its range; `kind` is its type."""
    whole = kind is int or int in typing.get_args(kind)
    for entry in value if isinstance(value, tuple) else (value,):
        if limits.choices and entry not in limits.choices:
            raise ConfigError(f"{path}: expected one of {', '.join(limits.choices)}, got {entry!r}")
        if isinstance(entry, bool) or not isinstance(entry, int | float):
            continue
        if isinstance(entry, float) and not math.isfinite(entry):
            raise ConfigError(f"{path}: must be a finite number, got {entry}")
        low, high = limits.minimum, limits.maximum
        if whole and high is None and abs(entry) > LARGEST_INT:
            raise ConfigError(f"{path}: must be at most {LARGEST_INT}, got {entry}")
        if low is not None and high is not None and not low <= entry <= high:
            raise ConfigError(f"{path}: must be between {_shown(low)} and {_shown(high)}, got {entry}")
        if low is not None and limits.below is not None and not low <= entry < limits.below:
            raise ConfigError(
                f"{path}: must be at least {_shown(low)} and below {_shown(limits.below)}, got {entry}"
            )
        if low is not None and entry < low:
            raise ConfigError(f"{path}: must be at least {_shown(low)}, got {entry}")
        if high is not None and entry > high:
            raise ConfigError(f"{path}: must be at most {_shown(high)}, got {entry}")
        if limits.above is not None and entry <= limits.above:
            raise ConfigError(f"{path}: must be above {_shown(limits.above)}, got {entry}")


def _shown(limit: float) -> str:
    """Return a limit as a user would write it."""
    return str(int(limit)) if limit == int(limit) else f"{limit:g}"


def _document(cls: Any) -> str:
    """Return the docstring of a group with the meaning of every field appended."""
    lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Fields:"]
    for field in dataclasses.fields(cls):
        limits = constraint_of(field)
        choices = f" One of {', '.join(limits.choices)}." if limits.choices else ""
        default = "" if field.default is dataclasses.MISSING else f" Default: {field.default!r}."
        text = f"{field.name}: {limits.doc}{choices}{default}"
        lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"
