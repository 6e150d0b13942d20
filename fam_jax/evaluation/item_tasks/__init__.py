"""The tasks of items by name. To add one, add it to the table of a module here, or a module to `ITEM_TASKS`."""

from fam_jax.evaluation.item import ItemTask
from fam_jax.evaluation.item_tasks import (
    babilong,
    gpt3,
    infinitebench,
    long,
    longbench,
    nolima,
    ruler,
    synthetic,
)

_MODULES = (gpt3, long, synthetic, ruler, babilong, longbench, infinitebench, nolima)
ITEM_TASKS: dict[str, ItemTask] = {task.name: task for module in _MODULES for task in module.TASKS}
