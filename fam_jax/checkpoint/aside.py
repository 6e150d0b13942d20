"""Steps that are no good: set damaged ones aside, and notice those that are gone."""

from etils import epath

from fam_jax.checkpoint.new_file import new_file
from fam_jax.config.strict_json import dump_json, parse_json

# Says which step was saved last, so that a run notices if the folder of that step is gone.
NEWEST = "newest_step.json"
# Ends the name of a step that is set aside. Orbax takes whole numbers alone for steps.
DAMAGED = ".damaged"


def remember_newest(folder: epath.Path, step: int | None) -> None:
    """Record the last saved step of a run, or that it has none.

    Raises:
      OSError: the file cannot be written.
    """
    if step is None:
        (folder / NEWEST).unlink(missing_ok=True)
        return
    with new_file(folder / NEWEST) as file:
        file.write(f"{dump_json({'step': step})}\n".encode())


def note_of_gone_step(folder: epath.Path, steps: list[int]) -> str:
    """Return a line about the last saved step of a run if it is not among its `steps`, else an empty string."""
    try:
        newest = parse_json((folder / NEWEST).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if type(newest) is not int or newest <= max(steps, default=-1):
        return ""
    left = f"the latest now is step {steps[-1]}" if steps else "there is no step left"
    return f"{folder}: step {newest} was saved here, but its folder is gone; {left}"


def set_aside(folder: epath.Path, step: int) -> epath.Path:
    """Rename the folder of a damaged step, so that nothing takes it for a step any more; return its new path.

    Raises:
      OSError: it cannot be renamed.
    """
    number, place = 1, folder / f"{step}{DAMAGED}"
    while place.exists():
        number += 1
        place = folder / f"{step}{DAMAGED}.{number}"
    (folder / str(step)).rename(place)
    return place
