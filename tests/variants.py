"""Variants of a test: some run always, the rest with `-m slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def rest_slow(variants: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Return the variants for `pytest.mark.parametrize`; those outside of `always` are slow tests.

    A tuple holds a value for each of several arguments.
    """
    found = [*variants]
    assert {*always} <= {*found}, f"no such variant: {({*always}) - {*found}}"
    return [
        pytest.param(
            *(each if isinstance(each, tuple) else (each,)), marks=[] if each in always else pytest.mark.slow
        )
        for each in found
    ]
