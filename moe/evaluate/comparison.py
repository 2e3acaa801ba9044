"""Trains one config with several routers and seeds: the work behind compare.py."""

import csv
import dataclasses
import functools
import math
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from moe import cli, outputs
from moe.errors import UsageError
from moe.store import workdir as workdirs
from moe.store.records import read
from moe.tasks import Task, task_of
from moe.train.run import set_up
from moe.train.trainer import train
from routers import ROUTERS

MOST_SEEDS = 1000
DENSE = "dense"  # the baseline: an MLP of the experts' FLOPs in place of each layer of experts
# Keys that the rows and seeds set, and what to type instead.
CHOSEN = {
    "router.name": "--routers=NAME,NAME",
    "moe.dense": "--routers=dense",
    "seed": "--seeds=N for the seeds 0 to N-1",
}


@dataclasses.dataclass
class Row:
    """Holds one router's results: each seed's metric of the task, and loss; the median rate.

    A run of one step has timed none: NaN where no run has a rate.
    """

    name: str
    values: list[float]
    losses: list[float]
    rate: float  # units of the task per second

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float:
        """Returns the standard deviation over the seeds, 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def compare(
    config_file: str,
    names: list[str] | None,
    seeds: int,
    out: pathlib.Path,
    overrides: dict[str, str],
) -> list[Row]:
    """Trains every router with every seed, prints the table, writes table.csv and METRIC.png.

    Args:
      names: of routers, or "dense"; None for dense and all that the task can have: a causal one
        leaves out those that look ahead.
      seeds: how many, from 0.

    Raises:
      UsageError: before anything is trained, an unknown or repeated name, no seed, a key that the
        rows set, a run that cannot start, or a directory that cannot be written to.
    """
    task = task_of(cli.read_config(config_file))  # first: the file may register routers
    for key, instead in CHOSEN.items():
        if key in overrides:
            raise UsageError(f"--config.{key}: the rows of a comparison set it; use {instead}")
    names = _checked_names(task, names)
    if not 1 <= seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds={seeds} must be from 1 to {MOST_SEEDS}")
    configs = {name: _row_configs(config_file, overrides, name, seeds) for name in names}
    _check(task, configs, out)
    rows = []
    for name in names:
        runs = []
        for seed, config in enumerate(configs[name]):
            workdir = out / name / str(seed)
            runs.append((train(config, workdir), read(workdir / "metrics.jsonl")))
        key = f"train/{task.unit}s_per_second"
        speeds = [row[key] for _, log in runs for row in log if key in row]
        rows.append(
            Row(
                name,
                [result[task.best.key] for result, _ in runs],
                [result["eval/loss"] for result, _ in runs],
                statistics.median(speeds) if speeds else math.nan,
            )
        )
        _write(task, rows, out)
    _print(task, rows, seeds)
    print(f"wrote {' and '.join(str(out / file) for file in _files(task))}")
    return rows


def _checked_names(task: Task, names: list[str] | None) -> list[str]:
    """Returns the names of the rows, each known and there once."""
    if names is None:
        return [*(n for n, router in ROUTERS.items() if router.causal or not task.causal), DENSE]
    for name in names:
        if name not in ROUTERS and name != DENSE:
            raise UsageError(
                f"--routers: {name!r} is unknown; expected {', '.join(ROUTERS)}, dense"
            )
        if names.count(name) > 1:
            raise UsageError(f"--routers: {name!r} is named twice; name each row once")
    return names


def _row_configs(file: str, overrides: dict[str, str], name: str, seeds: int) -> list[ConfigDict]:
    """Returns the config of each seed of a row."""
    choice = {"moe.dense": "true"} if name == DENSE else {"router.name": name}
    settings = overrides | choice
    return [cli.load_config(file, settings | {"seed": str(seed)}) for seed in range(seeds)]


def _files(task: Task) -> tuple[str, str]:
    return "table.csv", f"{task.best.name}.png"


def _check(task: Task, configs: dict[str, list[ConfigDict]], out: pathlib.Path) -> None:
    """Raises UsageError if a row could not be trained, or the results not be written."""
    for file in _files(task):
        outputs.check(out / file)
    for name, seeds in configs.items():
        run = set_up(seeds[0], task.open(seeds[0], seeds[0].data.train_split))
        for seed in range(len(seeds)):
            filled = ConfigDict(run.config.to_dict() | {"seed": seed})
            workdirs.check_place(out / name / str(seed))
            workdirs.check_config(filled, out / name / str(seed))


def _print(task: Task, rows: list[Row], seeds: int) -> None:
    best = task.best
    table = Table("router", f"test {best.title} ({seeds} seeds)", "test loss", f"{task.unit}s/s")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.mean:{best.form}} ± {row.deviation:{best.form}}",
            f"{statistics.mean(row.losses):.4f}",
            f"{row.rate:,.0f}",
        )
    Console(highlight=False).print(table)


def _write(task: Task, rows: list[Row], out: pathlib.Path) -> None:
    table, picture = _files(task)
    lines = [["router", "seed", task.best.name, "loss", f"{task.unit}s_per_second"]]
    for row in rows:
        for seed, (value, loss) in enumerate(zip(row.values, row.losses, strict=True)):
            lines.append([row.name, seed, value, loss, row.rate])

    def save(path: pathlib.Path) -> None:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(lines)

    outputs.write(out / table, save)
    figure, axis = plt.subplots(figsize=(6, 0.5 + 0.45 * len(rows)))
    for i, row in enumerate(rows):
        axis.scatter(row.values, [i] * len(row.values), color="tab:blue", alpha=0.5)
        axis.errorbar(row.mean, i, xerr=row.deviation, fmt="D", color="black", capsize=4)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"test {task.best.title}: each seed, mean and standard deviation")
    axis.grid(axis="x", alpha=0.3)
    save = functools.partial(figure.savefig, dpi=130, bbox_inches="tight")
    outputs.write(out / picture, save)
    plt.close(figure)
