"""Lengths in the names of files."""

import re

_LENGTH = re.compile(r"(\d+)([km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1024, "m": 1024**2}


def length_of(name: str) -> int | None:
    """Return the length that a name says, such as 4096 for "4k" or "4096"; None: it says none."""
    found = _LENGTH.fullmatch(name)
    return int(found[1]) * _UNITS[found[2].lower()] if found else None
