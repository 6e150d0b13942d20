"""Evaluation of checkpoints that read their input as a stream: tasks, one runner, records of results and plots."""

from fam_jax.evaluation.planning import HowToRun
from fam_jax.evaluation.probes import PROBES
from fam_jax.evaluation.record import Evaluation, read_evaluation
from fam_jax.evaluation.run import evaluate, evaluate_in_training
from fam_jax.evaluation.suite import SuiteResults, evaluate_tasks
from fam_jax.evaluation.tasks import TASKS

__all__ = [
    "PROBES",
    "TASKS",
    "Evaluation",
    "HowToRun",
    "SuiteResults",
    "evaluate",
    "evaluate_in_training",
    "evaluate_tasks",
    "read_evaluation",
]
