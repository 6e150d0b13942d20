"""Parse the parts of a command line that concern a config: the argument of its file, and the values of fields."""

import ast
import dataclasses
import decimal
import os
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from fam_jax.config.errors import ConfigError
from fam_jax.config.experiment import field_type
from fam_jax.config.memory import memory_config_type

KIND = "config.model.memory.kind"
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
# Whole numbers may be written with an exponent of up to this many digits, such as 1e9.
LARGEST_EXPONENT = 18


class Override(NamedTuple):
    """A config field and the text of its new value."""

    # With dots, such as config.model.num_layers.
    path: str
    text: str


def apply_overrides(values: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Set fields of a nested dict in place; a later override of the same field wins.

    `config.model.memory.kind` is set first, whatever its place in the list. A new kind replaces the memory group by the
    fields of that kind. Fields that both kinds have keep their values; the others start at their defaults.

    Args:
      values: the config, as in `default_config().to_dict()`.
      overrides: the fields to set.

    Raises:
      ConfigError: a field is unknown, or a text is not a value of the field's type.
    """
    for override in overrides:
        if override.path == KIND:
            _change_kind(values, override.text)
    kind = values.get("model", {}).get("memory", {}).get("kind")
    for path, text in overrides:
        if path == KIND:
            continue
        value = parse_value(field_type(path, kind), text, path)
        _, *groups, name = path.split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value


def _change_kind(values: dict[str, Any], kind: str) -> None:
    model = values.setdefault("model", {})
    before = model.get("memory", {})
    fields = dataclasses.asdict(typing.cast(Any, memory_config_type(kind)()))
    kept = {name: before[name] for name in fields.keys() & before.keys() if name != "kind"}
    model["memory"] = fields | kept


def parse_value(kind: Any, text: str, path: str) -> Any:
    """Return the value that a text stands for.

    Args:
      kind: type of the field: str, bool, int, float, or a tuple of one of these. A tuple is written with commas, as in
        `a.txt,b.txt`, or as in Python, `("a.txt", "b.txt")` or `[1, 2]`. A path that exists is one entry, whatever
        characters it has.
      text: the value.
      path: path of the field, for messages.

    Raises:
      ConfigError: the text is not a value of the type.
    """
    if kind is str:
        return text
    if typing.get_origin(kind) is tuple:
        return _parse_tuple(typing.get_args(kind)[0], text, path)
    try:
        if kind is bool:
            return BOOLEANS[text.strip().lower()]
        return _parse_int(text) if kind is int else float(text)
    except (KeyError, ValueError, decimal.InvalidOperation):
        expected = "true or false" if kind is bool else kind.__name__
        raise ConfigError(f"{path}: expected {expected}, got {text!r}") from None


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = decimal.Decimal(text)
    if not number.is_finite() or number.adjusted() > LARGEST_EXPONENT or number != number.to_integral_value():
        raise ValueError(text)
    return int(number)


def _parse_tuple(item: Any, text: str, path: str) -> tuple[Any, ...]:
    text = text.strip()
    if item is str and os.path.exists(os.path.expanduser(text)):
        return (text,)
    if not text.startswith(("(", "[")):
        return tuple(parse_value(item, part.strip(), path) for part in text.split(",") if part.strip())
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ConfigError(
            f"{path}: expected a list of {item.__name__}, such as a,b or ('a', 'b'), got {text!r}"
        ) from None
    entries = found if isinstance(found, list | tuple) else (found,)
    if item is str:  # the config checks the types of the entries
        return tuple(entries)
    return tuple(parse_value(item, str(entry), path) for entry in entries)


class Argument(NamedTuple):
    """The parsed argument of a config file."""

    variant: str
    words: frozenset[str]


def parse_argument(
    file: str, arg: str, *, variants: Sequence[str], words: Sequence[str] = ("smoke",)
) -> Argument:
    """Parse the argument of a config file, such as `bswa,smoke` in `configs/text.py:bswa,smoke`.

    Args:
      file: path of the config file, for the message.
      arg: at most one of `variants` and any of `words`, with commas between them.
      variants: names that exclude each other; the first is the default.
      words: names of options.

    Raises:
      ConfigError: the argument has other words, or two variants.
    """
    given = [word for word in arg.split(",") if word]
    chosen = [word for word in given if word in variants]
    wrong = [word for word in given if word not in (*variants, *words)] or chosen[1:]
    if wrong:
        raise ConfigError(
            f"{file}:{arg}: expected one of {', '.join(variants)} and any of {', '.join(words)}, with commas between "
            f"them, got {wrong[0]!r}"
        )
    return Argument(chosen[0] if chosen else variants[0], frozenset(given) & frozenset(words))
