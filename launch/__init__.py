"""Programs of the command line."""

import os
import sys


def _open_missing_streams() -> None:
    """Open the null device for standard streams that the caller closed; files would take their numbers otherwise."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the program ends)


_open_missing_streams()
