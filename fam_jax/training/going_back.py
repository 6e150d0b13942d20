"""Going back to an earlier step once, although a supervisor repeats the command that asks for it."""

from etils import epath

from fam_jax.checkpoint import saved_steps
from fam_jax.checkpoint.new_file import new_file
from fam_jax.config.strict_json import dump_json, parse_json

GONE_BACK = "gone_back.json"


def step_to_restore(folder: epath.Path, restore_step: int | None) -> tuple[int | None, list[str]]:
    """Return the step to go back to, and notes.

    A supervisor repeats the command of a run after every interruption. A run that went back to a step goes on from its
    latest step if the same command comes again. All processes get the same answer.
    """
    if restore_step is None or not (folder / GONE_BACK).exists():
        return restore_step, []
    try:
        known = parse_json((folder / GONE_BACK).read_text())["restore_step"]
    except (ValueError, KeyError, TypeError):
        known = None
    steps = saved_steps(folder)
    if known != restore_step or not steps or steps[-1] <= restore_step:
        return restore_step, []
    return None, [
        f"this run went back to step {restore_step} before, and goes on from step {steps[-1]}; "
        f"to go back again, remove {folder / GONE_BACK}"
    ]


def remember_restored(folder: epath.Path, restore_step: int | None, asked: int | None) -> None:
    """Record that the run went back to a step, for :func:`step_to_restore`; one process calls this.

    Args:
      folder: of the run.
      restore_step: the step that it went back to; None: it did not.
      asked: the step that the command named; None: none, which makes the folder forget.
    """
    if restore_step is not None:
        with new_file(folder / GONE_BACK) as file:
            file.write(dump_json({"restore_step": restore_step}).encode())
    elif asked is None:
        (folder / GONE_BACK).unlink(missing_ok=True)
