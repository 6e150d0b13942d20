"""Hostile content for readers: damaged bytes, and JSON with any value in any place.

A reader may take it or reject it with one line. It may not fail otherwise, hang, or use memory that the size of the
content does not explain. `make test` tries a few examples of each; `--hypothesis-profile=soak` tries 100 times as many.
"""

import json
import resource
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fam_jax.config import UserError

# 1, or 100 with the profile "soak".
FACTOR = max(1, settings().max_examples // 100)
# Seconds of CPU time and bytes for one example of a few kilobytes, with room for what a first call loads.
SECONDS, BYTES = 20.0, 400 << 20

NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 1e308, 5e-324, 0.5, float("inf")]
)
SCALARS = (
    st.none() | st.booleans() | NUMBERS | st.integers(-3, 70_000)
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "\0", "../../etc/passwd", "/dev/zero", "x" * 5000, "{{ 7 }}", "nan", "\n", "a\u202eb"])
)  # fmt: skip
NESTED = st.sampled_from([3, 2000]).map(
    lambda depth: json.loads("[" * min(depth, 900) + "]" * min(depth, 900))
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.text(max_size=4), SCALARS, max_size=3)
    | NESTED
)


def examples(count: int) -> settings:
    """Return settings for that many examples, more with the profile "soak"."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count * FACTOR, deadline=None, suppress_health_check=slow)


def reads(read: Callable[[], Any]) -> Any:
    """Call a reader; return what it returns, or the message of its :class:`UserError`."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        found = read()
    except UserError as error:
        found = str(error)
        assert found.strip(), "an empty message"
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    return found


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return content with a few changes: flipped bits, cuts, zeros, repetitions, insertions."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        place, size = draw(st.integers(0, len(data) - 1)), draw(st.sampled_from([1, 2, 8, 100]))
        how = draw(st.sampled_from(["flip", "cut", "truncate", "zero", "repeat", "insert", "number"]))
        if how == "flip":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[place : place + size]
        elif how == "truncate":
            del data[place:]
        elif how == "zero":
            data[place : place + size] = bytes(len(data[place : place + size]))
        elif how == "repeat":
            data[place:place] = data[place : place + size] * draw(st.sampled_from([1, 3, 1000]))
        elif how == "number":
            data[place : place + 8] = draw(st.sampled_from([2**63 - 1, 2**40, 1])).to_bytes(8, "little")
        else:
            data[place:place] = draw(
                st.sampled_from([b"\xff\xfe", b"[" * 3000, b'"', b"\n", b"\0", b"\xed\xa0\x80"])
            )
    return bytes(data)


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """Return a JSON value with one to three parts removed, or replaced by any other value."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        places: list[tuple[Any, Any]] = []
        _collect(value, places)
        if not places:
            return draw(VALUES)
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "copy"]))
        if how == "remove":
            del holder[key]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = draw(VALUES)
        elif how == "copy":
            other, name = draw(st.sampled_from(places))
            if key in holder if isinstance(holder, dict) else key < len(holder):
                holder[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
        elif _has(holder, key):
            holder[key] = draw(VALUES)
    return value


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    if len(places) > 400 or not isinstance(value, dict | list):
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        places.append((value, key))
        _collect(value[key], places)
