"""Works out what a comparison shows, from the results of its rows: means, differences, budgets."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from moe.evaluate.league.paired import Difference, difference, holm, verdict
from moe.evaluate.league.results import Result
from moe.tasks import Metric

PRUNED = ("kept", "nonzero", "trained")  # what a result has of pruning


@dataclasses.dataclass
class Entry:
    """Holds a row's results, and what is known of how it was made.

    Attributes:
      settings: the keys of its runs that count, with their values.
      own: those of them that the row itself set.
      tuned: keys that a validation split chose, with the values.
      parameters: None where nobody counted them.
      failed: what went wrong with runs, by seed.
    """

    name: str
    folder: str
    settings: Mapping[str, object]
    own: Sequence[str]
    tuned: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parameters: int | None = None
    results: list[Result] = dataclasses.field(default_factory=list)
    failed: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> dict[int, float]:
        return {result.seed: result.value for result in self.results}

    @property
    def rate(self) -> float | None:
        """Returns the median units a second: a slow minute of a shared machine does not count."""
        rates = [result.rate for result in self.results if result.rate]
        return statistics.median(rates) if rates else None

    @property
    def seconds(self) -> float | None:
        """Returns the time of training at the row's rate, without compiling and evaluating."""
        rate = self.rate
        return None if rate is None else _steps(self) * self.results[0].units / rate


@dataclasses.dataclass(frozen=True)
class Standing:
    """Holds what the table says of a row; None where there is nothing to say.

    Attributes:
      deviation: standard deviation over the seeds.
      flops: of training, for a unit of the task.
      at_flops, at_seconds: the mean metric when each row had spent what the cheapest row spends.
      kept, nonzero, trained: of a pruned row, the means; see `results.Result`.
      difference, p_holm, verdict: of the paired seeds to the baseline; see `paired`.
    """

    name: str
    seeds: int
    mean: float
    deviation: float | None
    loss: float
    rate: float | None
    seconds: float | None
    flops: float
    experts: float | None
    at_flops: float | None
    at_seconds: float | None
    difference: Difference | None
    p_holm: float | None
    verdict: str
    kept: float | None = None
    nonzero: float | None = None
    trained: float | None = None


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Holds what the cheapest row spends on training: FLOPs, and seconds where all were timed."""

    flops: float
    seconds: float | None

    def at_flops(self, result: Result) -> float | None:
        return at([(flops, value) for _, value, flops in result.curve], self.flops)

    def at_seconds(self, entry: Entry, result: Result) -> float | None:
        if self.seconds is None or not entry.rate:
            return None
        pace = result.units / entry.rate
        return at([(step * pace, value) for step, value, _ in result.curve], self.seconds)


def budgets(entries: Sequence[Entry]) -> Budgets:
    """Returns the smallest budgets among the rows."""
    seconds = [entry.seconds for entry in entries]
    return Budgets(
        min(result.flops for entry in entries for result in entry.results),
        None if None in seconds else min(seconds),
    )


def at(curve: Sequence[tuple[float, float]], budget: float) -> float | None:
    """Returns the value of a curve at a budget, on the line between the evaluations around it.

    A run that ends before it has its last value; None before the first evaluation.
    """
    before = None
    for x, value in curve:
        if x >= budget * (1 - 1e-9):
            if x <= budget * (1 + 1e-9):
                return value
            if before is None:
                return None
            x0, value0 = before
            return value0 + (value - value0) * (budget - x0) / (x - x0)
        before = x, value
    return before and before[1]


def standings(entries: Sequence[Entry], baseline: str, metric: Metric) -> list[Standing]:
    """Returns what the table says of each row; every row has a result."""
    spent = budgets(entries)
    base = next((entry for entry in entries if entry.name == baseline), None)
    others = [None if base in (entry, None) else _difference(entry, base) for entry in entries]
    adjusted = holm([None if found is None else found.p for found in others])
    return [
        _standing(entry, spent, found, p, baseline, metric)
        for entry, found, p in zip(entries, others, adjusted, strict=True)
    ]


def _difference(entry: Entry, base: Entry) -> Difference | None:
    return difference(entry.values, base.values)


def _standing(entry: Entry, spent: Budgets, found, p, baseline: str, metric: Metric) -> Standing:
    values, results = list(entry.values.values()), entry.results
    chosen = [result.experts for result in results if result.experts is not None]
    word = "baseline" if entry.name == baseline else verdict(found, p, metric.higher)
    return Standing(
        name=entry.name,
        seeds=len(values),
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        loss=statistics.fmean(result.loss for result in results),
        rate=entry.rate,
        seconds=entry.seconds,
        flops=statistics.fmean(r.flops / (r.units * r.curve[-1][0]) for r in results),
        experts=statistics.fmean(chosen) if chosen else None,
        at_flops=_mean(spent.at_flops(result) for result in results),
        at_seconds=_mean(spent.at_seconds(entry, result) for result in results),
        difference=found,
        p_holm=p,
        verdict=word,
        **{name: _mean(getattr(r, name) for r in results) for name in PRUNED},
    )


def _steps(entry: Entry) -> int:
    return int(entry.results[0].curve[-1][0])


def _mean(values) -> float | None:
    """Returns the mean; None where a value is missing: other seeds alone would be another mean."""
    values = list(values)
    return None if None in values else statistics.fmean(values)
