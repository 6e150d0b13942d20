"""What the processes of a job tell each other before they evaluate together."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json


def from_first(make: Callable[[], Any]) -> Any:
    """Return the JSON value that `make` returns in the first process of a job, which alone calls it, in all of them.

    Raises:
      UserError: `make` raised one. All processes raise it.
    """
    if jax.process_count() == 1:
        return make()
    told = b""
    if jax.process_index() == 0:
        try:
            told = dump_json({"value": make()}).encode()
        except UserError as error:
            told = dump_json({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(told), np.int32)))
    content = np.zeros(size, np.uint8)
    content[: len(told)] = np.frombuffer(told, np.uint8)
    found = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


def check_alike(head: Mapping[str, Any]) -> None:
    """Check that all processes of a job are about to answer the same items with the same model.

    Raises:
      UserError: some have others, because their data or their checkpoint differs. All processes raise it.
    """
    if jax.process_count() == 1:
        return
    parts = {name: hashlib.blake2b(dump_json(part).encode(), digest_size=8) for name, part in head.items()}
    own = np.stack([np.frombuffer(parts[name].digest(), np.uint8) for name in sorted(parts)])
    counts = multihost_utils.process_allgather(np.array(len(parts)))
    same = (counts == counts[0]).all()
    differing: list[str] = []
    if same:
        every = multihost_utils.process_allgather(own)
        differing = [
            name
            for name, column in zip(sorted(parts), every.swapaxes(0, 1), strict=True)
            if (column != column[0]).any()
        ]
    if not same or differing:
        what = f" ({', '.join(differing)})" if differing else ""
        raise UserError(
            f"--tasks, --suite: the processes have different items or models{what}; give all hosts the same --data and "
            "the same checkpoint"
        )
