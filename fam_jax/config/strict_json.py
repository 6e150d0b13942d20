"""The ways in which this package writes and reads JSON: without NaN, and not nested too deeply."""

import json
import math
from collections.abc import Callable
from typing import Any

# Levels of nested lists and objects. Python has about a thousand levels of calls.
DEEPEST = 100


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text, from a file of anybody.

    Args:
      text: the text, or its bytes in UTF-8, with or without a byte-order mark.

    Raises:
      ValueError: it is not valid JSON, not UTF-8, or nested more than :data:`DEEPEST` levels deep.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, inner = 0, [value]
    while inner := [each for each in inner if isinstance(each, dict | list)]:
        level += 1
        if level > DEEPEST:
            raise ValueError("it is nested too deeply")
        inner = [each for part in inner for each in (part.values() if isinstance(part, dict) else part)]
    return value


def dump_json(
    value: Any,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    default: Callable[[Any], Any] | None = None,
    separators: tuple[str, str] | None = None,
) -> str:
    """Return `value` as JSON, with null for numbers that are not finite.

    Args:
      value: of what `json.dumps` takes.
      indent: spaces per level; None: one line.
      sort_keys: whether to sort objects by their keys.
      ensure_ascii: whether to escape all characters outside ASCII. A text with half of a surrogate pair, which UTF-8
        cannot encode, is always escaped.
      default: converts objects of other types.
      separators: behind each item, and behind each key; None: as in `json.dumps`.
    """
    if default is not None:
        value = json.loads(json.dumps(value, default=default))

    def dump(ensure_ascii: bool) -> str:
        return json.dumps(
            finite(value),
            indent=indent,
            sort_keys=sort_keys,
            ensure_ascii=ensure_ascii,
            separators=separators,
            allow_nan=False,
        )

    text = dump(ensure_ascii)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = dump(ensure_ascii=True)
    return text


def finite(value: Any) -> Any:
    """Return `value` with None for every float in it that is NaN or infinite; tuples become lists."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
