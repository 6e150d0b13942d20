"""Links in the folders of others: they may lead to another place of their folder, but not out of it."""

import errno
import os

from etils import epath

from fam_jax.config import UserError


def check_inside(file: epath.PathLike, folder: epath.PathLike) -> None:
    """Check that a file does not lie outside of a folder because of links or of a name such as "../file".

    A snapshot in a cache of Hugging Face may also have links to the blobs of its repository.

    Raises:
      UserError: it does.
    """
    path, root = os.fspath(file), os.path.realpath(folder)
    if "://" in path:
        return
    if not _can_be_a_name(path):
        raise UserError(
            f"{folder}: names a file {os.path.relpath(path, root)!a:.200}, which no file can be called"
        )
    roots = [root]
    place, name = os.path.split(os.path.dirname(root))
    if name == "snapshots":
        roots.append(os.path.join(place, "blobs"))
    real = os.path.realpath(path)
    if not any(os.path.commonpath([real, each]) == each for each in roots):
        raise UserError(
            f"{path}: leads out of its folder, to {real}; if you trust it, put a copy of that file in its place"
        )


def _can_be_a_name(path: str) -> bool:
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or a lone surrogate
        return isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG
    return True


def check_links_below(folder: epath.PathLike, root: epath.PathLike) -> None:
    """Check all files and folders below a folder, and itself, as :func:`check_inside` does.

    Raises:
      UserError: one leads out of `root`.
    """
    if "://" in os.fspath(folder):
        return
    check_inside(folder, root)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path):
                check_inside(path, root)
