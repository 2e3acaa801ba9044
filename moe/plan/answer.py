"""Answers for `plan.py`: one plan or a sweep of them, on the screen and as JSON."""

import pathlib

from ml_collections import ConfigDict

from moe import outputs
from moe.errors import UsageError
from moe.plan.planner import make_plan, to_json
from moe.plan.report import print_plan, print_sweep
from moe.plan.sweep import sweep
from moe.plan.topology import open_topology


def answer(config: ConfigDict, topology_name: str, count: int | None, file: pathlib.Path | None):
    """Prints the plan; with `count` the best of so many, under a table of all.

    Args:
      file: for all the numbers as JSON; checked before anything is compiled.
    """
    if file:
        if not file.parent.is_dir():
            raise UsageError(f"--json={file}: there is no directory {file.parent}")
        outputs.check(file, f"--json={file}")
    topology = open_topology(topology_name)
    if count is None:
        plans = [make_plan(config, topology)]
    else:
        plans = sweep(config, topology, count)
        print_sweep(plans)
    print_plan(plans[0])
    if file:
        numbers = [to_json(plan) for plan in plans]
        outputs.write_json(file, numbers[0] if count is None else numbers)
