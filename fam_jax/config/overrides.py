"""Set config fields from text: `config.model.num_layers=4` on a command line."""

import ast
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from fam_jax.config.errors import ConfigError
from fam_jax.config.experiment import field_type
from fam_jax.config.memory import memory_config_type

KIND = "config.model.memory.kind"
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Override(NamedTuple):
    """A field and the text of its new value."""

    # With dots, such as config.model.num_layers.
    path: str
    text: str


def apply_overrides(values: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Set fields of a nested dict in place; later overrides win.

    A new `config.model.memory.kind` comes first, wherever it is given: it replaces the memory group by that kind's
    fields, of which those that both kinds have keep their values.

    Raises:
      ConfigError: a field is unknown, or the text is not a value of its type.
    """
    for override in (each for each in overrides if each.path == KIND):
        _change_kind(values["model"], parse_value(str, override.text, KIND))
    kind = values.get("model", {}).get("memory", {}).get("kind")
    for path, text in overrides:
        if path == KIND:
            continue
        value = parse_value(field_type(path, kind), text, path)
        *groups, name = path.split(".")[1:]
        target = values
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value


def _change_kind(model: dict[str, Any], kind: str) -> None:
    before = model.get("memory", {})
    fields = dataclasses.asdict(typing.cast(Any, memory_config_type(kind)()))
    kept = {name: before[name] for name in fields.keys() & before.keys() if name != "kind"}
    model["memory"] = fields | kept


def parse_value(kind: Any, text: str, path: str) -> Any:
    """Return the value that a text stands for.

    Words of a list have commas between them: `a.txt,b.txt`; Python's `("a.txt", "b.txt")` will do too.

    Args:
      kind: type of the field.
      text: to parse.
      path: of the field, for messages.

    Raises:
      ConfigError: the text is not a value of the type.
    """
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ConfigError(f"{path}: expected true or false, got {text!r}")
        return BOOLEANS[text.lower()]
    if typing.get_origin(kind) is tuple:
        return _parse_list(typing.get_args(kind)[0], text, path)
    try:
        number = float(text)
        return (
            int(text.replace("_", ""))
            if kind is int and number.is_integer() and "." not in text
            else kind(text)
        )
    except (ValueError, OverflowError):
        raise ConfigError(f"{path}: expected {kind.__name__}, got {text!r}") from None


def _parse_list(item: Any, text: str, path: str) -> tuple[Any, ...]:
    stripped = text.strip()
    if stripped.startswith(("(", "[")):
        try:
            found = ast.literal_eval(stripped)
        except (ValueError, SyntaxError):
            raise ConfigError(f"{path}: expected a list of {item.__name__}, got {text!r}") from None
        entries = found if isinstance(found, list | tuple) else (found,)
        return tuple(entry if item is str else parse_value(item, str(entry), path) for entry in entries)
    return tuple(parse_value(item, part.strip(), path) for part in text.split(",") if part.strip())
