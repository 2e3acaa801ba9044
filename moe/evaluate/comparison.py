"""Trains one config with several rows and seeds, and compares them: the work behind compare.py."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from moe import cli, outputs
from moe import config as configs
from moe.errors import UsageError
from moe.evaluate.league import charts, results, runs, stored, tables, tuning
from moe.evaluate.league import rows as league_rows
from moe.evaluate.league.rows import DENSE, Row
from moe.evaluate.league.runs import Job
from moe.evaluate.league.standings import Entry, budgets, standings
from moe.evaluate.league.stored import League
from moe.models.build import count_parameters
from moe.screen import say
from moe.store import workdir as workdirs
from moe.tasks import Task, task_of
from moe.train.run import set_up
from moe.train.trainer import train
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


class Comparison:
    """Holds what is compared, once all that can be known wrong before any training was looked for.

    Args:
      names: of rows, see `league.rows`; None for dense and all routers that the task can have: a
        causal one leaves out those that look ahead.
      baseline: the row that the others are compared with; "" for dense where it is one, else the
        first.
      jobs: how many runs are trained at once.

    Raises:
      UsageError: an unknown or repeated row, no seed, a key that the rows set, a run that cannot
        start, or a directory that cannot be written to.
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
        jobs: int = 1,
        tuned: Tuning = Tuning(),
    ):
        self.file, self.out, self.overrides, self.seeds = config_file, out, overrides, seeds
        base = cli.read_config(config_file)  # first: the file may register routers
        self.task, self.jobs, self.tuned = task_of(base), jobs, tuned
        for key, instead in CHOSEN.items():
            if key in overrides:
                raise UsageError(f"--config.{key}: the rows of a comparison set it; use {instead}")
        self._keys = configs.flatten(base)
        self._keys |= {key: value for key, value in overrides.items() if key in self._keys}
        everything = [*_fitting(self.task, base), DENSE]
        found = league_rows.parse(
            [league_rows.ALL] if names is None else names, self._keys, everything
        )
        self.rows = [self._typed(row) for row in found]
        for name in (names := [row.folder for row in self.rows]):
            if names.count(name) > 1:
                raise UsageError(f"--rows: {name!r} is named twice; name each row once")
        self.baseline = self._find_baseline(baseline)
        _check_numbers(seeds, jobs, tuned)
        self.choices = self._find_choices()
        self.entries = {row.name: self._entry(row) for row in self.rows}
        self.data, self._known = "", {}
        with contextlib.suppress(UsageError):  # a damaged table is written anew
            if before := stored.read(out):
                self.data = before.data
                self._known = {entry.folder: entry.parameters for entry in before.entries}

    def _typed(self, row: Row) -> Row:
        """Returns the row with its values as a config prints them: 1e-3 and 0.001 are one row."""
        values = configs.flatten(self._job(row, 0).config)
        return Row(row.base, {key: str(values[key]) for key in row.settings})

    def _find_baseline(self, text: str) -> str:
        names = [row.name for row in self.rows]
        if not text:
            return DENSE if DENSE in names else names[0]
        (row,) = league_rows.parse([text], self._keys, [])[:1] or [Row(text, {})]
        if (name := self._typed(row).name) not in names:
            raise UsageError(f"--baseline={text} is none of the rows {', '.join(names)}")
        return name

    def _find_choices(self) -> list[tuning.Choice]:
        """Returns what the tuning chooses from; [] without any."""
        choices = tuning.parse(self.tuned.grid, self._keys) if self.tuned.grid else []
        for row in self.rows:
            if own := [key for key in (choices or [{}])[0] if key in row.settings]:
                raise UsageError(f"--tune: the row {row.name!r} sets {own[0]} itself")
        return choices

    def _entry(self, row: Row) -> Entry:
        return Entry(row.name, row.folder, {}, list(row.overrides(self._keys)))

    def _job(self, row: Row, seed: int, splits: dict[str, str] | None = None) -> Job:
        """Returns a run of the row, or with `splits` one that helps to choose its settings."""
        settings = self.overrides | row.overrides(self._keys) | {"seed": str(seed)} | (splits or {})
        folder = self.out / runs.TUNING if splits else self.out
        config = cli.load_config(self.file, settings)
        return Job(row.name, seed, folder / row.folder / str(seed), self.file, settings, config)

    def files(self) -> list[pathlib.Path]:
        return files_of(self.task, self.out)

    def tuning_jobs(self, row: Row) -> list[tuple[tuning.Choice, list[Job]]]:
        """Returns the runs that choose a row's settings, for each choice."""
        names = ("train_split", "eval_split")
        whole = self._job(row, 0).config.data
        split = tuning.splits(whole.train_split, self.tuned.validation)
        if self.tuned.validation in (whole.train_split, whole.eval_split):
            raise UsageError(
                f"--validation={self.tuned.validation}: expected neither what is trained on nor "
                "what is reported"
            )
        splits = {f"data.{name}": value for name, value in zip(names, split, strict=True)}
        found = []
        for choice in self.choices:
            chosen = self._typed(row.with_settings(choice))
            jobs = [self._job(chosen, seed, splits) for seed in range(self.tuned.seeds)]
            found.append((choice, jobs))
        return found

    def check(self) -> None:
        """Raises UsageError if a run could not be trained, or the results not be written."""
        for file in self.files():
            outputs.check(file)
        if self.jobs > 1:  # this process only looks: its children need the accelerator's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        for row in self.rows:
            jobs = [self._job(row, seed) for seed in self.seeds]
            if self.choices:
                jobs = [job for _, several in self.tuning_jobs(row) for job in several]
            jobs = missing(jobs)
            if not jobs:
                continue
            data = jobs[0].config.data
            run = set_up(jobs[0].config, self.task.open(jobs[0].config, data.train_split))
            self._known[row.folder] = count_parameters(run.params)
            for job in jobs:
                sizes = run.config.to_dict() | {"seed": job.seed}
                workdirs.check_place(job.workdir)
                if not self.choices:
                    workdirs.check_config(ConfigDict(sizes), job.workdir)
            tested = self._job(row, 0).config
            self.data = self.data or self.task.open(tested, tested.data.eval_split).fingerprint
            if self.choices:
                self.task.open(jobs[0].config, jobs[0].config.data.eval_split)

    def tune(self) -> None:
        """Chooses the settings of each row, and says what they are."""
        plans = {row.name: self.tuning_jobs(row) for row in self.rows}
        jobs = missing([job for plan in plans.values() for _, some in plan for job in some])
        wrong: list[str] = []

        def done(job: Job, said: str) -> None:
            if said:
                wrong.append(f"{job.row}, seed {job.seed}: {said}")

        self._run(jobs, self.out / runs.LOGS / runs.TUNING, done)
        told, rows = {}, []
        for row in self.rows:
            scores = [(choice, _values(some)) for choice, some in plans[row.name]]
            told[row.name] = [{"settings": c, "validation": values} for c, values in scores]
            try:
                choice = tuning.choose(scores, self.task.best)
            except UsageError as error:
                self.entries[row.name].failed[0] = f"tuning: {error}; {'; '.join(wrong[:2])}"
                continue
            chosen = self._typed(row.with_settings(choice))
            entry = self.entries[row.name]
            entry.tuned = {key: chosen.settings[key] for key in choice}
            entry.folder, entry.own = chosen.folder, [*entry.own, *choice]
            self._known.setdefault(chosen.folder, self._known.get(row.folder))
            rows.append((row.name, chosen))
        outputs.write_json(self.out / "tuning.json", told)
        self._chosen = rows

    def run(self) -> League:
        """Trains what is missing, writes the tables after every run; returns the comparison."""
        if self.choices:
            self.tune()
        else:
            self._chosen = [(row.name, row) for row in self.rows]
        jobs = [
            self._job(row, seed)._replace(row=name)
            for seed in self.seeds  # an aborted comparison has paired seeds
            for name, row in self._chosen
        ]
        for job in jobs:
            self._note(job)
        left = missing(jobs)
        if left and len(left) < len(jobs):
            say(f"{len(jobs) - len(left)} of {len(jobs)} runs are complete")

        def done(job: Job, wrong: str) -> None:
            if wrong:
                self.entries[job.row].failed[job.seed] = wrong
            self._note(job)
            write_tables(self.league(), self.out)

        self._run(left, self.out / runs.LOGS, done)
        return self.league()

    def _run(self, jobs: list[Job], logs: pathlib.Path, done) -> None:
        if self.jobs > 1 and jobs:
            runs.run_side_by_side(jobs, self.jobs, logs, done)
        else:
            runs.run_here(jobs, train, done)

    def _note(self, job: Job) -> None:
        """Puts the job's result, if there is one, into its row's entry."""
        entry = self.entries[job.row]
        if (found := results.find(job.config, job.workdir)) is None:
            return
        entry.failed.pop(job.seed, None)
        others = [result for result in entry.results if result.seed != job.seed]
        entry.results = sorted([*others, found], key=lambda result: result.seed)
        if not entry.settings:
            saved = workdirs.saved_config(job.workdir)
            entry.settings = results.settings(saved)
            entry.parameters = self._known.get(entry.folder) or _parameters(saved)

    def league(self) -> League:
        """Returns the rows that have a result."""
        entries = [entry for entry in self.entries.values() if entry.results]
        return League(self.task_name, self.baseline, self.data, entries)

    @property
    def task_name(self) -> str:
        return self._keys["task"]


def compare(
    config_file: str,
    names: Sequence[str] | None,
    seeds: range,
    out: pathlib.Path,
    overrides: dict[str, str],
    **options,
) -> list[Entry]:
    """Trains every row with every seed that is not there yet; prints and writes the comparison.

    The arguments are those of `Comparison`.

    Raises:
      UsageError: as there; and after all others are done, where a run failed.
    """
    comparison = Comparison(config_file, names, seeds, out, overrides, **options)
    comparison.check()
    league = comparison.run()
    if league.entries:
        show(league, out)
    entries = comparison.entries.values()
    runs.complain((e.name, seed, wrong) for e in entries for seed, wrong in e.failed.items())
    return league.entries


def merge(folders: Sequence[pathlib.Path], out: pathlib.Path, baseline: str = "") -> list[Entry]:
    """Makes one comparison of the tables of several; prints and writes it.

    Raises:
      UsageError: they do not belong together, or the result cannot be written.
    """
    league = stored.merge(folders, baseline)
    for file in files_of(league.learns, out):
        outputs.check(file)
    show(league, out)
    return league.entries


def files_of(task: Task, out: pathlib.Path) -> list[pathlib.Path]:
    """Returns what a comparison writes beside its runs."""
    names = ("table.csv", "table.md", stored.FILE)
    names += (f"{task.best.name}.png", charts.CURVES, charts.LAYERS)
    return [out / name for name in names]


def write_tables(league: League, out: pathlib.Path) -> None:
    """Writes the tables of the runs that there are."""
    if not league.entries:
        return
    task, entries = league.learns, league.entries
    rows = standings(entries, league.baseline, task.best)
    texts = {
        "table.csv": tables.comma_separated(task, entries),
        "table.md": tables.markdown(task, entries, rows, league.baseline),
    }
    for name, text in texts.items():
        outputs.write(out / name, lambda fresh, text=text: fresh.write_text(text))
    stored.write(out, league, rows, budgets(entries))


def show(league: League, out: pathlib.Path) -> None:
    """Prints the tables, writes them, draws the pictures."""
    task, entries = league.learns, league.entries
    stored.check_alike(entries)
    rows = standings(entries, league.baseline, task.best)
    write_tables(league, out)
    tables.print_tables(task, entries, rows, league.baseline)
    if any(row.at_flops is None or row.at_seconds is None for row in rows):
        print(
            "at equal FLOPs or time there is nothing where a run has no evaluation before: more of "
            "them by --config.eval.every=N, in runs that are yet to come"
        )
    *written, picture, curves, layers = files_of(task, out)
    charts.draw_rows(picture, entries, rows, task.best)
    charts.draw_curves(curves, entries, task.best)
    written += [picture, curves] + [layers] * charts.draw_layers(layers, entries)
    print(f"wrote {', '.join(str(file) for file in written)}")


def missing(jobs: Sequence[Job]) -> list[Job]:
    """Returns the jobs that are not complete."""
    return [job for job in jobs if results.find(job.config, job.workdir) is None]


def _values(jobs: Sequence[Job]) -> list[float | None]:
    found = [results.find(job.config, job.workdir) for job in jobs]
    return [None if result is None else result.value for result in found]


def _fitting(task: Task, config: ConfigDict) -> list[str]:
    """Returns the routers that a task can have, with their settings in the config."""
    return [
        name
        for name, router in ROUTERS.items()
        if not (task.causal and router.why_not_causal(config.router[name].to_dict()))
    ]


def _parameters(config: ConfigDict) -> int | None:
    """Counts a run's parameters; None where its mesh does not fit the devices at hand."""
    try:
        return count_parameters(set_up(config).params)
    except UsageError:
        return None


def _check_numbers(seeds: range, jobs: int, tuned: Tuning) -> None:
    if not 1 <= len(seeds) <= MOST_SEEDS:
        raise UsageError(f"--seeds={len(seeds)} must be from 1 to {MOST_SEEDS}")
    if not 1 <= jobs <= MOST_JOBS:
        raise UsageError(f"--jobs={jobs} must be from 1 to {MOST_JOBS}")
    if not 1 <= tuned.seeds <= MOST_SEEDS:
        raise UsageError(f"--tune_seeds={tuned.seeds} must be from 1 to {MOST_SEEDS}")
    if tuned.validation and not tuned.grid:
        raise UsageError("--validation is the split that --tune=KEY:VALUE,VALUE chooses by")
