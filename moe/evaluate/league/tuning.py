"""Chooses settings for each row by one rule: the best on a validation split, never on the test.

The validation split is the last tenth of the training split, on which the runs that choose do not
train; the runs of the table train on all of it, with what was chosen.
"""

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence

from moe.errors import UsageError
from moe.evaluate.league.rows import full_key
from moe.tasks import Metric

_SLICE = re.compile(r"(\w+)(?:\[(\d*)(%?):(\d*)(%?)\])?")
Choice = dict[str, str]  # a value for each key


def parse(texts: Sequence[str], keys: Mapping[str, object]) -> list[Choice]:
    """Returns every combination of the values, "learning_rate:1e-3,3e-3" of each key.

    Raises:
      UsageError: a key is unknown, one of a router alone or twice there, or has no two values.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        name, colon, values = text.partition(":")
        values = [value.strip() for value in values.split(",")]
        if not colon or "" in values:
            raise UsageError(f"--tune={text}: expected KEY:VALUE,VALUE")
        try:
            key = full_key(name.strip(), keys)
        except UsageError as error:
            raise UsageError(f"--tune={text}: {error}") from None
        if key.startswith("router."):
            raise UsageError(f"--tune={text}: {key} is of one router; tune what all rows have")
        if key in grid or len(set(values)) < max(2, len(values)):
            raise UsageError(f"--tune={text}: expected each key once, with different values")
        grid[key] = values
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def splits(train: str, validation: str = "") -> tuple[str, str]:
    """Returns what to train on and what to choose by: all but the last tenth of a split, and that.

    Args:
      train: the training split, "train" or a slice such as "train[:50%]".
      validation: a split of its own, if the data have one; the training split then stays whole.

    Raises:
      UsageError: the slice cannot be divided.
    """
    if validation:
        return train, validation
    match = _SLICE.fullmatch(train)
    name, low, low_unit, high, high_unit = match.groups() if match else ("", "", "", "", "")
    whole = match and low is None
    percent = whole or "%" in (low_unit, high_unit)
    plain = match and not whole and not percent
    if whole:
        low, high = "", ""
    mixed = bool(low) and bool(high) and low_unit != high_unit
    if not match or mixed or (plain and not high):
        raise UsageError(
            f"--tune: the split {train!r} cannot be divided: name a split to choose by, "
            "--validation=SPLIT, or slice it as train[:50%]"
        )
    start, end = int(low or 0), int(high or 100)
    middle, unit = start + (end - start) * 9 // 10, "%" if percent else ""
    if not start < middle < end:
        raise UsageError(f"--tune: {train!r} is too small to divide; say --validation=SPLIT")
    first = f"{low}{low_unit}" if low else ""
    last = f"{high}{high_unit}" if high else ""
    return f"{name}[{first}:{middle}{unit}]", f"{name}[{middle}{unit}:{last}]"


def choose(scores: Sequence[tuple[Choice, Sequence[float | None]]], metric: Metric) -> Choice:
    """Returns the choice of the best mean; of equal ones the first. A run that failed loses all.

    Raises:
      UsageError: every choice has a run that failed.
    """
    whole = [(choice, values) for choice, values in scores if values and None not in values]
    if not whole:
        raise UsageError("no value has complete runs")
    best = max(metric.score(statistics.fmean(values)) for _, values in whole)
    return next(c for c, values in whole if metric.score(statistics.fmean(values)) == best)
