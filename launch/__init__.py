"""Programs of the command line."""

import os
import sys
from typing import Any


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


def _interrupt_quietly() -> None:
    """Let Ctrl-C during the imports of a program end in one line, as it does later."""
    show = sys.excepthook

    def hook(kind: type[BaseException], *rest: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            show(kind, *rest)

    sys.excepthook = hook


_open_missing_streams()
# -m stands here while Python looks for the module to run; the script of an installed package has its own name.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "") == "fam-jax":
    _interrupt_quietly()
