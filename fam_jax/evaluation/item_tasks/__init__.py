"""The tasks of items by name. To add one, add it to the table of a module here, or a module to `ITEM_TASKS`."""

from fam_jax.evaluation.item import ItemTask
from fam_jax.evaluation.item_tasks import gpt3, long, synthetic

ITEM_TASKS: dict[str, ItemTask] = {task.name: task for task in (*gpt3.TASKS, *long.TASKS, *synthetic.TASKS)}
