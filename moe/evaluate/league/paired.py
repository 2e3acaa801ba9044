"""Says how sure a difference between two rows is, from runs that share their seeds.

Runs of one seed see the same batches and start from the same weights outside the experts, so their
difference has less noise than either value. Of n differences d with mean m and standard deviation
s, the interval is m -+ t s / sqrt(n), t the quantile of Student's distribution with n - 1 degrees
of freedom. It is that of training once more with other seeds; another test set is another matter.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import special

LEVEL = 0.95


class Difference(NamedTuple):
    """Holds a mean difference over `seeds` pairs, its interval and the two-sided p-value.

    The last three are None where nothing can be said: of one pair, or of pairs that all differ by
    the same amount, whose spread is not known.
    """

    mean: float
    seeds: int
    low: float | None
    high: float | None
    p: float | None


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Returns the difference to the baseline over the seeds that both have; None without any."""
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    n, mean = len(seeds), statistics.fmean(differences)
    if not any(differences) and n > 1:
        return Difference(0.0, n, 0.0, 0.0, 1.0)  # the same runs, as far as they can be told apart
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else 0.0
    if error <= 1e-12 * abs(mean):
        return Difference(mean, n, None, None, None)
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(n - 1, -abs(mean) / error))
    return Difference(mean, n, mean - half, mean + half, p)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Returns p-values adjusted so that all of them together err in 5 % of cases (Holm 1979).

    The i-th smallest of m, from i = 0, is multiplied by m - i, and is at least the one before it.
    Rows without a p-value are no tests.
    """
    order = sorted((i for i, p in enumerate(values) if p is not None), key=lambda i: values[i])
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(found: Difference | None, adjusted: float | None, higher: bool) -> str:
    """Says in a word whether a row is better than the baseline, as far as its seeds can tell."""
    if found is None:
        return "no common seed"
    if adjusted is None:
        return "one seed" if found.seeds == 1 else "no spread"
    if adjusted >= 1 - LEVEL:
        return "not told apart"
    return "better" if (found.mean > 0) == higher else "worse"
