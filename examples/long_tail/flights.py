"""Reads the flights from New York in 2013 as a classification with a long tail of classes.

What is asked is the destination; carrier, airport, weekday, date and scheduled hour are known. Many
destinations share all of these, so that one guess cannot be right, as with species in a photograph.
"""

from typing import NamedTuple

import numpy as np

from moe.errors import UsageError

CATEGORIES = ("carrier", "origin", "weekday", "hour")
VALIDATION, TEST = (10,), (11, 12)  # months; what is before is for training


class Part(NamedTuple):
    """Holds flights: categories int32 [N, 4] (see `CATEGORIES`), numbers float32 [N, 4] in [-1, 1]
    (the places of the date in the year and of the time in the day, on circles), labels int32 [N].
    """

    categories: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray


class Flights(NamedTuple):
    """Holds the three parts; `sizes` of the categories, `counts` [V] of the training labels.

    `unseen` flights of the other parts, to places without one in training, are left out.
    """

    train: Part
    validation: Part
    test: Part
    sizes: tuple[int, ...]
    counts: np.ndarray
    unseen: int


def make(arrays: dict[str, np.ndarray]) -> Flights:
    """Returns the flights of nycflights13's columns.

    Raises:
      UsageError: a part has none.
    """
    month = arrays["month"].astype(int)
    years = (arrays["year"].astype(int) - 1970).astype("datetime64[Y]").astype("datetime64[M]")
    days = (years + (month - 1)).astype("datetime64[D]") + (arrays["day"].astype(int) - 1)
    minutes = arrays["sched_dep_time"].astype(int)
    minutes = minutes // 100 * 60 + minutes % 100
    of_year = (days - days.astype("datetime64[Y]")).astype(int) / 365.25
    circles = [f(2 * np.pi * x) for x in (of_year, minutes / 1440) for f in (np.sin, np.cos)]
    columns = {
        "carrier": arrays["carrier"],
        "origin": arrays["origin"],
        "weekday": (days.astype(int) + 3) % 7,  # 1970-01-01 was a Thursday, 0 is Monday
        "hour": minutes // 60,
    }
    coded = [np.unique(columns[name], return_inverse=True) for name in CATEGORIES]
    training = ~np.isin(month, (*VALIDATION, *TEST))
    places = np.unique(arrays["dest"][training])
    seen = np.isin(arrays["dest"], places)
    everything = Part(
        np.stack([codes for _, codes in coded], -1).astype(np.int32),
        np.stack(circles, -1).astype(np.float32),
        np.searchsorted(places, arrays["dest"]).astype(np.int32),
    )
    rows = {"training": training, "validation": np.isin(month, VALIDATION) & seen}
    rows["test"] = np.isin(month, TEST) & seen
    if empty := [name for name, own in rows.items() if not own.any()]:
        raise UsageError(f"there are no flights for {empty[0]}: expected all twelve months")
    parts = [Part(*(column[own] for column in everything)) for own in rows.values()]
    counts = np.bincount(parts[0].labels, minlength=len(places))
    return Flights(*parts, tuple(len(values) for values, _ in coded), counts, int((~seen).sum()))


def frequencies(train: Part, part: Part, classes: int) -> np.ndarray:
    """Returns scores [N, V] that need no learning: how often flights of the same carrier, airport
    and hour went there, and before that, as a tie-break, how often any did."""
    chosen = [CATEGORIES.index(name) for name in ("carrier", "origin", "hour")]
    keys = np.concatenate([train.categories, part.categories])[:, chosen]
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    table = np.zeros((group.max() + 1, classes), np.float32)
    np.add.at(table, (group[: len(train.labels)], train.labels), 1)
    total = table.sum(0)
    return table[group[len(train.labels) :]] + total / (total.sum() + 1)
