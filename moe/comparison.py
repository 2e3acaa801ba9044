"""Trains one config with several routers and seeds: the work behind compare.py."""

import csv
import dataclasses
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from moe import cli
from moe.errors import UsageError
from moe.records import read
from moe.trainer import train
from routers import ROUTERS

DENSE = "dense"  # the baseline: an MLP of the experts' FLOPs in place of each layer of experts


@dataclasses.dataclass
class Row:
    """Results of one router: test accuracies, and the seconds of its median training step."""

    name: str
    accuracies: list[float]
    losses: list[float]
    images_per_second: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds, 0 for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def compare(
    config_file: str,
    names: list[str] | None,
    seeds: int,
    out: pathlib.Path,
    overrides: dict[str, str],
) -> list[Row]:
    """Trains every router with every seed, prints the table, writes table.csv and accuracy.png.

    Args:
      names: of routers, or "dense"; None for all of them and dense.
      seeds: how many, from 0.

    Raises:
      UsageError: an unknown name, no seed, or a run that cannot start.
    """
    names = names if names is not None else [*ROUTERS, DENSE]
    unknown = [name for name in names if name not in ROUTERS and name != DENSE]
    if unknown:
        raise UsageError(
            f"--routers: {unknown[0]!r} is unknown; expected {', '.join(ROUTERS)}, dense"
        )
    if seeds < 1:
        raise UsageError(f"--seeds={seeds} must be 1 or more")
    rows = []
    for name in names:
        choice = {"moe.dense": "true"} if name == DENSE else {"router.name": name}
        runs = []
        for seed in range(seeds):
            workdir = out / name / str(seed)
            settings = overrides | choice | {"seed": str(seed)}
            result = train(cli.load_config(config_file, settings), workdir)
            runs.append((result, read(workdir / "metrics.jsonl")))
        speeds = [r["train/images_per_second"] for _, log in runs for r in log if "train/loss" in r]
        rows.append(
            Row(
                name,
                [result["eval/accuracy"] for result, _ in runs],
                [result["eval/loss"] for result, _ in runs],
                statistics.median(speeds),
            )
        )
        _write(rows, out)
    _print(rows, seeds)
    print(f"wrote {out / 'table.csv'} and {out / 'accuracy.png'}")
    return rows


def _print(rows: list[Row], seeds: int) -> None:
    table = Table("router", f"test accuracy ({seeds} seeds)", "test loss", "images/s")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.mean:.2%} ± {row.deviation:.2%}",
            f"{statistics.mean(row.losses):.4f}",
            f"{row.images_per_second:,.0f}",
        )
    Console(highlight=False).print(table)


def _write(rows: list[Row], out: pathlib.Path) -> None:
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["router", "seed", "accuracy", "loss", "images_per_second"])
        for row in rows:
            for seed, (accuracy, loss) in enumerate(zip(row.accuracies, row.losses, strict=True)):
                writer.writerow([row.name, seed, accuracy, loss, row.images_per_second])
    figure, axis = plt.subplots(figsize=(6, 0.5 + 0.45 * len(rows)))
    for i, row in enumerate(rows):
        axis.scatter(row.accuracies, [i] * len(row.accuracies), color="tab:blue", alpha=0.5)
        axis.errorbar(row.mean, i, xerr=row.deviation, fmt="D", color="black", capsize=4)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy: each seed, mean and standard deviation")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(out / "accuracy.png", dpi=130, bbox_inches="tight")
    plt.close(figure)
