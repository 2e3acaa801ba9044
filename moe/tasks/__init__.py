"""Holds the tasks: what a run can learn. `TASKS` is the only place that lists them."""

from ml_collections import ConfigDict

from moe.tasks.images import Images
from moe.tasks.task import Metric, Task

TASKS: dict[str, Task] = {"images": Images()}


def task_of(config: ConfigDict) -> Task:
    """Returns the task that a config chose."""
    return TASKS[config.task]


__all__ = ["TASKS", "Metric", "Task", "task_of"]
