"""What `plan.py` does: one plan or a sweep of them, on the screen and as JSON."""

import json
import pathlib

from ml_collections import ConfigDict

from moe.errors import UsageError
from moe.plan.planner import make_plan, to_json
from moe.plan.report import print_plan, print_sweep
from moe.plan.sweep import sweep
from moe.plan.topology import open_topology


def answer(config: ConfigDict, topology_name: str, count: int | None, json_file: str | None):
    """Prints the plan; with `count` the best of so many, under a table of all."""
    file = pathlib.Path(json_file) if json_file else None
    if file and not file.parent.is_dir():  # minutes before there is something to write
        raise UsageError(f"--json={file}: there is no directory {file.parent}")
    topology = open_topology(topology_name)
    if count is None:
        plans = [make_plan(config, topology)]
    else:
        plans = sweep(config, topology, count)
        print_sweep(plans)
    print_plan(plans[0])
    if file:
        _write(file, to_json(plans[0]) if count is None else [to_json(plan) for plan in plans])


def _write(file: pathlib.Path, content: dict | list) -> None:
    try:
        file.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write --json={file}: {error.strerror}") from error
