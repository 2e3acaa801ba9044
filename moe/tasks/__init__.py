"""Holds the tasks: what a run can learn. `TASKS` is the only place that lists them."""

from ml_collections import ConfigDict

from moe.tasks.images import Images
from moe.tasks.task import Metric, Task
from moe.tasks.text import Text

TASKS: dict[str, Task] = {"images": Images(), "text": Text()}


def task_of(config: ConfigDict) -> Task:
    """Returns the task that a config chose."""
    return TASKS[config.task]


__all__ = ["TASKS", "Metric", "Task", "task_of"]
