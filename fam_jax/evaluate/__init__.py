"""Evaluation of checkpoints from streamed states: tasks, a runner, records of results and pictures."""
