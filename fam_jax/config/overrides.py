"""Parse the parts of a command line that concern a config: the argument of its file, and the values of fields."""

import ast
import dataclasses
import decimal
import os
import re
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from fam_jax.config.errors import ConfigError
from fam_jax.config.experiment import field_type
from fam_jax.config.fields import type_name
from fam_jax.config.memory import memory_config_type

KIND = "config.model.memory.kind"
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
QUOTES = ("'", '"')
# An entry of a list that begins with a quote, up to the next comma. What follows the second quote belongs to it.
QUOTED = re.compile(r"""\s*(['"])((?:(?!\1).|\1\1)*)\1(?!\1)([^,]*)(?:,|\Z)""", re.DOTALL)
RATED = re.compile(r"(.+)=\s*((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)
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
      kind: type of the field: str, bool, int, float, a tuple of one of these, or of pairs. A tuple is written with
        commas, as in `a.txt,b.txt`, or as in Python, `("a.txt", "b.txt")` or `[1, 2]`. A path that exists is one entry,
        whatever characters it has; other entries with commas are quoted, as in `"a,b*.txt",c.txt`. Pairs are written
        `a=0.4,b=0.6`.
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
        parts = split_list(text, path)
        return tuple(_pair(part, path) if _is_pair(item) else parse_value(item, part, path) for part in parts)
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ConfigError(
            f"{path}: expected a list of {type_name(item)}, such as {_example_of(item)}, got {text!r}"
        ) from None
    entries = found if isinstance(found, list | tuple) else (found,)
    if item is str or _is_pair(item):  # the config checks the types of the entries
        return tuple(entries)
    return tuple(parse_value(item, str(entry), path) for entry in entries)


def _is_pair(item: Any) -> bool:
    return typing.get_origin(item) is tuple


def _example_of(item: Any) -> str:
    return "a=0.4,b=0.6 or [('a', 0.4), ('b', 0.6)]" if _is_pair(item) else "a,b or ('a', 'b')"


def split_list(text: str, where: str) -> list[str]:
    """Return the entries of a list that is written with commas, without those that are empty.

    An entry with commas is in quotes, single or double, which it may contain doubled: `"a,b",c` has `a,b` and `c`.

    Args:
      text: the list.
      where: what it belongs to, for the message.

    Raises:
      ConfigError: a quote is not closed.
    """
    entries, left = [], text
    while left:
        quoted = QUOTED.match(left)
        if quoted is None and left.lstrip()[:1] in QUOTES:
            raise ConfigError(
                f"{where}: the quote in {left.strip()} is not closed; write {left.lstrip()[0]} at its end"
            )
        if quoted is not None:
            mark = quoted[1]
            entry, left = quoted[2].replace(2 * mark, mark) + quoted[3], left[quoted.end() :]
        else:
            entry, _, left = left.partition(",")
        entries.append(entry.strip())
    return [entry for entry in entries if entry]


def is_rated(entry: str) -> bool:
    """Return whether an entry of a list has the form FILES=RATE, with a number behind the last `=`."""
    return RATED.fullmatch(entry) is not None


def parse_rated(entries: Sequence[str], where: str) -> tuple[tuple[str, float], ...]:
    """Return files and rate of each entry FILES=RATE.

    Raises:
      ConfigError: an entry has another form.
    """
    return tuple(_pair(entry, where) for entry in entries)


def _pair(entry: str, where: str) -> tuple[str, float]:
    found = RATED.fullmatch(entry)
    if found is None:
        raise ConfigError(f"{where}: expected FILES=RATE, such as flan/*.parquet=0.4, got {entry!r}")
    return found[1], float(found[2])


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
      arg: at most one of `variants` and any of `words`, as a list; see :func:`split_list`.
      variants: names that exclude each other; the first is the default.
      words: names of options.

    Raises:
      ConfigError: the argument has other words, or two variants.
    """
    given = split_list(arg, f"{file}:{arg}")
    chosen = [word for word in given if word in variants]
    wrong = [word for word in given if word not in (*variants, *words)] or chosen[1:]
    if wrong:
        raise ConfigError(
            f"{file}:{arg}: expected one of {', '.join(variants)} and any of {', '.join(words)}, with commas between "
            f"them, got {wrong[0]!r}"
        )
    return Argument(chosen[0] if chosen else variants[0], frozenset(given) & frozenset(words))
