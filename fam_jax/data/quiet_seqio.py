"""seqio and TensorFlow, imported without log output and kept off the accelerators.

Other modules import `seqio` and `tf` from here. TensorFlow's C++ code writes to file descriptor 2 before any Python
setting can stop it, and would otherwise reserve the memory of all GPUs, which JAX needs.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Discard what is written to file descriptor 2, or show it if the body raises."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            os.dup2(saved, 2)
            held.seek(0)
            with os.fdopen(os.dup(2), "wb") as stderr:
                shutil.copyfileobj(held, stderr)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def _is_needed(record: logging.LogRecord) -> bool:
    """Return whether a message of seqio tells the user something.

    It advises against reading a function as a source, because a restart would repeat its order. Here a restart goes on
    in the same order, and every epoch has its own.
    """
    return not str(record.msg).startswith("Using an uncached FunctionDataset for training")


# Silences information and warnings of later calls.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with _stderr_held_back():
    import seqio
    import tensorflow as tf

    for _kind in ("GPU", "TPU"):
        # Too late if the program runs TensorFlow already; then the choice of devices is its own.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], _kind)

logging.getLogger("absl").addFilter(_is_needed)

__all__ = ["seqio", "tf"]
