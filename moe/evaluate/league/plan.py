"""Plans a comparison: its rows, its baseline, and every run that it needs, before anything runs."""

import dataclasses
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from moe import cli
from moe import config as configs
from moe.errors import UsageError
from moe.evaluate.league import rows as league_rows
from moe.evaluate.league import tuning
from moe.evaluate.league.rows import DENSE, Row
from moe.evaluate.league.runs import TUNING, Job
from moe.evaluate.league.standings import Entry
from moe.tasks import Metric, Task, task_of
from routers import ROUTERS

MOST_SEEDS, MOST_JOBS = 1000, 256
# Keys that the rows and seeds set, and what to type instead.
CHOSEN = {
    "router.name": "--rows=NAME,NAME",
    "moe.dense": "--rows=dense",
    "seed": "--seeds=N for the seeds 0 to N-1",
}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Says how settings are chosen for each row: "KEY:VALUE,VALUE" of each key, by how many seeds,
    on which split ("": the last tenth of the training split)."""

    grid: Sequence[str] = ()
    seeds: int = 1
    validation: str = ""


class Plan:
    """Holds what is compared.

    Args:
      names: of rows, see `league.rows`; None for dense and all routers that the task can have: a
        causal one leaves out those that look ahead.
      baseline: the row that the others are compared with; "" for dense where it is one, else the
        first.
      metric: a name of `Task.metrics`; "" for the task's best.
      jobs: how many runs are trained at once.

    Raises:
      UsageError: an unknown or repeated row, no seed, a key that the rows set, values that no run
        can have.
    """

    def __init__(
        self,
        config_file: str,
        names: Sequence[str] | None,
        seeds: range,
        out: pathlib.Path,
        overrides: dict[str, str],
        *,
        baseline: str = "",
        metric: str = "",
        jobs: int = 1,
        tuned: Tuning = Tuning(),
    ):
        self.out, self.seeds, self.jobs = out, seeds, jobs
        self._file, self._overrides, self._tuned = config_file, overrides, tuned
        base = cli.read_config(config_file)  # first: the file may register routers
        self.task = task_of(base)
        for key, instead in CHOSEN.items():
            if key in overrides:
                raise UsageError(f"--config.{key}: the rows of a comparison set it; use {instead}")
        _check_numbers(seeds, jobs, tuned)
        self.keys = configs.flatten(base)
        self.keys |= {key: value for key, value in overrides.items() if key in self.keys}
        everything = [*_fitting(self.task, base.router), DENSE]
        words = [league_rows.ALL] if names is None else names
        self.rows = [self._typed(row) for row in league_rows.parse(words, self.keys, everything)]
        folders = [row.folder for row in self.rows]
        for row in self.rows:
            if folders.count(row.folder) > 1:
                raise UsageError(f"--rows: {row.name!r} is named twice; name each row once")
        self.baseline = self._find_baseline(baseline)
        self.choices = self._find_choices()
        self.metric = self._find_metric(metric) if metric else self.task.best

    def job(self, row: Row, seed: int, splits: dict[str, str] | None = None) -> Job:
        """Returns a run of the row, or with `splits` one that helps to choose its settings."""
        made = row.overrides(self.keys) | {"seed": str(seed)} | (splits or {})
        settings = self._overrides | made
        folder = self.out / TUNING if splits else self.out
        config = cli.load_config(self._file, settings)
        return Job(row.name, seed, folder / row.folder / str(seed), self._file, settings, config)

    def chosen(self, row: Row, choice: tuning.Choice) -> Row:
        """Returns the row with the settings that were chosen for it."""
        return self._typed(row.with_settings(choice))

    def tuning_jobs(self, row: Row) -> list[tuple[tuning.Choice, list[Job]]]:
        """Returns the runs that choose a row's settings, for each choice."""
        whole, validation = self.job(row, 0).config.data, self._tuned.validation
        if validation in (whole.train_split, whole.eval_split):
            raise UsageError(
                f"--validation={validation}: expected neither what is trained on "
                f"({whole.train_split}) nor what is reported ({whole.eval_split})"
            )
        train, held = tuning.splits(whole.train_split, validation)
        splits = {"data.train_split": train, "data.eval_split": held}
        seeds = range(self._tuned.seeds)
        return [
            (choice, [self.job(self.chosen(row, choice), seed, splits) for seed in seeds])
            for choice in self.choices
        ]

    def entry(self, row: Row) -> Entry:
        """Returns the row without results yet."""
        return Entry(row.name, row.folder, {}, list(row.overrides(self.keys)))

    def _typed(self, row: Row) -> Row:
        """Returns the row with its values as a config prints them: 1e-3 and 0.001 are one row."""
        values = configs.flatten(self.job(row, 0).config)
        return Row(row.base, {key: str(values[key]) for key in row.settings})

    def _find_baseline(self, text: str) -> str:
        names = [row.name for row in self.rows]
        if not text:
            return DENSE if DENSE in names else names[0]
        try:
            (row,) = league_rows.parse([text], self.keys, ())
            if (name := self._typed(row).name) in names:
                return name
        except (UsageError, ValueError):  # no row at all, or "all" of them
            pass
        raise UsageError(f"--baseline={text} is none of the rows {', '.join(names)}")

    def _find_metric(self, name: str) -> Metric:
        """Returns the metric of that name, which every row's evaluations must have."""
        for row in self.rows:
            known = {metric.name: metric for metric in self.task.metrics(self.job(row, 0).config)}
            if name not in known:
                raise UsageError(
                    f"--metric={name}: an evaluation of the row {row.name!r} has {', '.join(known)}"
                )
        return known[name]

    def _find_choices(self) -> list[tuning.Choice]:
        """Returns what the tuning chooses from; [] without any."""
        choices = tuning.parse(self._tuned.grid, self.keys) if self._tuned.grid else []
        for row in self.rows:
            if own := [key for key in (choices or [{}])[0] if key in row.settings]:
                raise UsageError(f"--tune: the row {row.name!r} sets {own[0]} itself")
        return choices


def _fitting(task: Task, router: ConfigDict) -> list[str]:
    """Returns the routers that a task can have, with their settings in that section."""
    return [
        name
        for name, kind in ROUTERS.items()
        if not (task.causal and kind.why_not_causal(router[name].to_dict()))
    ]


def _check_numbers(seeds: range, jobs: int, tuned: Tuning) -> None:
    if not 1 <= len(seeds) <= MOST_SEEDS:
        raise UsageError(f"--seeds={len(seeds)} must be from 1 to {MOST_SEEDS}")
    if not 1 <= jobs <= MOST_JOBS:
        raise UsageError(f"--jobs={jobs} must be from 1 to {MOST_JOBS}")
    if not 1 <= tuned.seeds <= MOST_SEEDS:
        raise UsageError(f"--tune_seeds={tuned.seeds} must be from 1 to {MOST_SEEDS}")
    if tuned.validation and not tuned.grid:
        raise UsageError("--validation is the split that --tune=KEY:VALUE,VALUE chooses by")
