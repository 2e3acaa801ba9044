"""Trains one config with several rows and seeds, and compares them: the work behind compare.py."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from moe import outputs
from moe.errors import UsageError
from moe.evaluate.league import results, runs, stored, tuning
from moe.evaluate.league.plan import Plan
from moe.evaluate.league.rows import Row
from moe.evaluate.league.runs import Job
from moe.evaluate.league.showing import files_of, show, write_tables
from moe.evaluate.league.standings import Entry
from moe.evaluate.league.stored import League
from moe.models.build import count_parameters
from moe.screen import say
from moe.store import workdir as workdirs
from moe.tasks.task import Source
from moe.train.run import set_up
from moe.train.trainer import train


def compare(
    config_file: str,
    names: Sequence[str] | None,
    seeds: range,
    out: pathlib.Path,
    overrides: dict[str, str],
    **options,
) -> list[Entry]:
    """Trains every row with every seed that is not there yet; prints and writes the comparison.

    The arguments are those of `league.plan.Plan`.

    Raises:
      UsageError: before anything is trained, what cannot be compared or written; after all others
        are done, that a run failed.
    """
    comparison = Comparison(Plan(config_file, names, seeds, out, overrides, **options))
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
    for file in files_of(league.metric, out):
        outputs.check(file)
    show(league, out)
    return league.entries


class Comparison:
    """Makes a plan come true, from what is there of it already."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.entries = {row.name: plan.entry(row) for row in plan.rows}
        self._data, self._parameters = "", {}  # what is looked up once, and kept in table.json
        with contextlib.suppress(UsageError):  # a damaged table is written anew
            if before := stored.read(plan.out):
                self._data = before.data
                self._parameters = {entry.folder: entry.parameters for entry in before.entries}

    def check(self) -> None:
        """Raises UsageError if a run could not be trained, or the results not be written."""
        plan = self.plan
        for file in files_of(plan.metric, plan.out):
            outputs.check(file)
        if plan.jobs > 1:  # this process only looks: its children need the accelerator's memory
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        opened: dict[str, Source] = {}  # most rows have the same data, which may take long to read

        def open_split(config: ConfigDict, split: str) -> Source:
            key = f"{split}\n{config.data}"
            if key not in opened:
                opened[key] = plan.task.open(config, split)
            return opened[key]

        for row in plan.rows:
            if plan.choices:
                jobs = [job for _, several in plan.tuning_jobs(row) for job in several]
            else:
                jobs = [plan.job(row, seed) for seed in plan.seeds]
            if jobs := missing(jobs):
                self._check_row(row, jobs, open_split)

    def _check_row(
        self, row: Row, jobs: Sequence[Job], open_split: Callable[[ConfigDict, str], Source]
    ) -> None:
        first, reported = jobs[0].config, self.plan.job(row, 0).config
        run = set_up(first, open_split(first, first.data.train_split))
        if not self.plan.choices:
            self._parameters[row.folder] = count_parameters(run.params)
        for job in jobs:
            workdirs.check_place(job.workdir)
        for tested in (first, reported):
            source = open_split(tested, tested.data.eval_split)
        self._data = self._data or source.fingerprint

    def run(self) -> League:
        """Trains what is missing, writes the tables after every run; returns the comparison."""
        plan = self.plan
        rows = self._tune() if plan.choices else {row.name: row for row in plan.rows}
        # Seed by seed, so that the table of a comparison that was ended early has pairs.
        named = [(name, row, seed) for seed in plan.seeds for name, row in rows.items()]
        jobs = [plan.job(row, seed)._replace(row=name) for name, row, seed in named]
        for job in jobs:
            self._note(job)
        left = missing(jobs)
        if left and len(left) < len(jobs):
            say(f"{len(jobs) - len(left)} of {len(jobs)} runs are complete")

        def done(job: Job, wrong: str) -> None:
            if wrong:
                self.entries[job.row].failed[job.seed] = wrong
            else:
                self._note(job)
            write_tables(self._league(), plan.out)

        self._train(left, plan.out / runs.LOGS, done)
        return self._league()

    def _tune(self) -> dict[str, Row]:
        """Chooses the settings of each row; returns the rows with them, but those that failed."""
        plan, wrong = self.plan, {}
        plans = {row.name: plan.tuning_jobs(row) for row in plan.rows}
        # A run that chooses is named by its row's folder, which says the settings, too.
        jobs = missing([job for several in plans.values() for _, some in several for job in some])
        logs = plan.out / runs.LOGS / runs.TUNING
        self._train(jobs, logs, lambda job, said: wrong.update({job.row: said} if said else {}))
        told, rows = {}, {}
        for row in plan.rows:
            entry, scores = self.entries[row.name], []
            for choice, some in plans[row.name]:
                scores.append((choice, [self._value(job) for job in some]))
            told[row.name] = [{"settings": c, "validation": values} for c, values in scores]
            try:
                choice = tuning.choose(scores, plan.metric)
            except UsageError as error:
                names = {job.row for _, some in plans[row.name] for job in some}
                said = "; ".join(wrong[name] for name in names & wrong.keys())
                entry.failed[plan.seeds[0]] = f"tuning: {error} ({said})"
                continue
            chosen = rows[row.name] = plan.chosen(row, choice)
            entry.tuned = {key: chosen.settings[key] for key in choice}
            entry.folder, entry.own = chosen.folder, [*entry.own, *choice]
        outputs.write_json(plan.out / "tuning.json", told)
        return rows

    def _train(
        self, jobs: Sequence[Job], logs: pathlib.Path, done: Callable[[Job, str], None]
    ) -> None:
        if self.plan.jobs > 1 and jobs:
            runs.run_side_by_side(jobs, self.plan.jobs, logs, done)
        else:
            runs.run_here(jobs, train, done)

    def _note(self, job: Job) -> None:
        """Puts the job's result, if there is one, into its row's entry."""
        entry = self.entries[job.row]
        if (found := results.find(job.config, job.workdir, self.plan.metric)) is None:
            return
        others = [result for result in entry.results if result.seed != job.seed]
        entry.results = sorted([*others, found], key=lambda result: result.seed)
        if not entry.settings:
            saved = workdirs.saved_config(job.workdir)
            entry.settings = results.settings(saved)
            entry.parameters = self._parameters.get(entry.folder) or _parameters(saved)

    def _league(self) -> League:
        """Returns the rows that have a result."""
        entries = [entry for entry in self.entries.values() if entry.results]
        plan = self.plan
        return League(plan.keys["task"], plan.metric, plan.baseline, self._data, entries)

    def _value(self, job: Job) -> float | None:
        found = results.find(job.config, job.workdir, self.plan.metric)
        return None if found is None else found.value


def missing(jobs: Sequence[Job]) -> list[Job]:
    """Returns the jobs that are not complete."""
    return [job for job in jobs if results.find(job.config, job.workdir) is None]


def _parameters(config: ConfigDict) -> int | None:
    """Counts a run's parameters; None where its mesh does not fit the devices at hand."""
    try:
        return count_parameters(set_up(config).params)
    except UsageError:
        return None
