"""Questions on made-up text of any length. A sample is a pure function of a key, such as (seed, task, length, index).

`TASKS` has the tasks by name; `sample` says what a sample is, and `fitting` makes its text exactly so many tokens long.
"""

from fam_jax.data.synthetic import facts, needle, pairs, tracking
from fam_jax.data.synthetic.sample import Make, Sample

TASKS: dict[str, Make] = {**needle.TASKS, **tracking.TASKS, **facts.TASKS, **pairs.TASKS}

__all__ = ["TASKS", "Make", "Sample"]
