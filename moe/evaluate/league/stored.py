"""Keeps a comparison as table.json, reads it back, and merges several of them."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moe import outputs
from moe.errors import UsageError
from moe.evaluate.league.results import Result
from moe.evaluate.league.standings import Budgets, Entry, Standing
from moe.tasks import TASKS, Metric, Task

FILE = "table.json"
VERSION = 2


class League(NamedTuple):
    """Holds what a comparison is made of; all else follows from it.

    `data` is the fingerprint of the test split, "" where nobody looked.
    """

    task: str
    metric: Metric
    baseline: str
    data: str
    entries: list[Entry]

    @property
    def learns(self) -> Task:
        return TASKS[self.task]


def write(folder: pathlib.Path, league: League, rows: Sequence[Standing], spent: Budgets) -> None:
    """Writes the runs, and what was worked out of them."""
    standings = {row.name: dataclasses.asdict(row) for row in rows}
    for row in standings.values():
        row["difference"] = row["difference"] and row["difference"]._asdict()
    content = {
        "version": VERSION,
        "task": league.task,
        "metric": league.metric._asdict(),
        "baseline": league.baseline,
        "data": league.data,
        "equal": dataclasses.asdict(spent),
        "standings": list(standings.values()),
        "rows": [_plain(entry) for entry in league.entries],
    }
    outputs.write_json(folder / FILE, content)


def _plain(entry: Entry) -> dict[str, Any]:
    plain = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
    plain["own"], plain["settings"] = list(entry.own), dict(entry.settings)
    plain["results"] = [dataclasses.asdict(result) for result in entry.results]
    return plain


def read(folder: pathlib.Path) -> League | None:
    """Returns the comparison in a folder, None where there is none.

    Raises:
      UsageError: its table.json cannot be read, or is something else.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_text())
        if content["version"] > VERSION:
            raise UsageError(f"{file} was written by a newer program")
        entries = [_entry(row) for row in content["rows"]]
        if content["task"] not in TASKS:
            raise UsageError(f"{file} is of the task {content['task']!r}, which is unknown here")
        metric = Metric(**content["metric"])
        return League(content["task"], metric, content["baseline"], content["data"], entries)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is no table of a comparison ({type(error).__name__}): move it away; the "
            "comparison's own command writes it anew"
        ) from error


def _entry(row: dict[str, Any]) -> Entry:
    results = [Result(**result) for result in row["results"]]
    failed = {int(seed): wrong for seed, wrong in row["failed"].items()}
    return Entry(**(row | {"results": results, "failed": failed}))


def merge(folders: Sequence[pathlib.Path], baseline: str = "") -> League:
    """Returns one comparison of the runs of several.

    Args:
      baseline: the row to compare with; "" for that of the first.

    Raises:
      UsageError: a folder has no table, or the runs cannot stand in one.
    """
    leagues = []
    for folder in folders:
        league = read(folder)
        if league is None:
            raise UsageError(f"--merge: {folder} has no {FILE}; compare.py writes it there")
        leagues.append(league)
    first, entries = leagues[0], {}
    for folder, league in zip(folders, leagues, strict=True):
        if league.task != first.task:
            raise UsageError(f"--merge: {folders[0]} is of task {first.task}, {folder} of another")
        if league.metric != first.metric:
            names = f"{first.metric.name}, {folder} by {league.metric.name}"
            raise UsageError(f"--merge: {folders[0]} is by {names}: say --metric when making them")
        if league.data and first.data and league.data != first.data:
            raise UsageError(f"--merge: {folders[0]} and {folder} were tested on other examples")
        for entry in league.entries:
            entries[entry.name] = _joined(entries.get(entry.name), entry, folder)
    merged = list(entries.values())
    check_alike(merged)
    baseline = baseline or first.baseline
    if baseline not in entries:
        raise UsageError(f"--baseline={baseline} is none of the rows {', '.join(entries)}")
    return League(first.task, first.metric, baseline, first.data, merged)


def _joined(old: Entry | None, new: Entry, folder: pathlib.Path) -> Entry:
    """Returns a row with the runs of both."""
    if old is None:
        return new
    if changed := list(_differences(old, new, ())):
        raise UsageError(
            f"--merge: the row {new.name!r} of {folder} has other settings: {'; '.join(changed)}"
        )
    runs = {run.seed: run for run in old.results}
    for run in new.results:
        if runs.setdefault(run.seed, run).value != run.value:
            raise UsageError(
                f"--merge: {new.name}, seed {run.seed} of {folder} has another result "
                f"({run.value:.6g}, not {runs[run.seed].value:.6g}): leave one of them out"
            )
    failed = {seed: wrong for seed, wrong in (old.failed | new.failed).items() if seed not in runs}
    results = [runs[seed] for seed in sorted(runs)]
    return dataclasses.replace(
        old, results=results, failed=failed, parameters=old.parameters or new.parameters
    )


def check_alike(entries: Sequence[Entry]) -> None:
    """Raises UsageError where rows differ in a setting that neither has for its own."""
    first = entries[0]
    for entry in entries[1:]:
        if changed := list(_differences(first, entry, {*first.own, *entry.own})):
            raise UsageError(
                f"the rows {first.name!r} and {entry.name!r} cannot be compared: "
                f"{'; '.join(changed[:4])}"
            )


def _differences(a: Entry, b: Entry, own) -> Iterator[str]:
    for key in sorted({*a.settings, *b.settings} - {*own}):
        if own != () and (key.startswith("router.") or key == "moe.dense"):
            continue
        old, new = (json.dumps(entry.settings.get(key)) for entry in (a, b))
        if old != new:
            yield f"{key} is {old} and {new}"
