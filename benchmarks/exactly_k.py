"""Sets of exactly k items: the time of their marginals and samples beside `lax.top_k`'s."""

from typing import NamedTuple

import jax
import numpy as np

from benchmarks.candidates import Problem, hard_router
from benchmarks.report import Table
from benchmarks.timing import Candidate, compiled, device, measure, summary, with_gradient
from routers.exactly_k import exactly_k_marginals, exactly_k_sample

SHOW = ("size", "candidate", "device", "status", "ms", "ms_q1", "ratio", "error", "sum_error")
NOTE = (
    "Float32 normal scores, strength 1, compiled, in turns. `ratio`: of the time to `lax.top_k` "
    "alone. `error`: largest difference of the marginals to a float64 sum over the sets, in "
    "logarithms; `sum_error`: largest |sum - k| of a row. `with gradient` is forward and backward; "
    "a step of the router is a sample, the marginals and their derivative."
)


class Size(NamedTuple):
    """Holds the size of a problem: rows, items of a row, items to select."""

    rows: int
    n: int
    k: int

    def __str__(self):
        return f"{self.rows}x{self.n}, k={self.k}"


def tables(quick: bool) -> list[Table]:
    """Returns one table: each candidate at 4096x64, k = 8."""
    size, budget = (Size(64, 16, 4), 0.3) if quick else (Size(4096, 64, 8), 20.0)
    x, c = np.random.default_rng(0).standard_normal((2, size.rows, size.n), np.float32)
    problem = Problem(x, c, size.k)
    found = _candidates(jax.random.key(0))
    timings = measure(found, problem, budget)
    exact, rows = marginals(x, size.k), []
    for one in found:
        timing = timings[one.name]
        row = {"size": str(size), "candidate": one.name, "device": device(one.runs_on)}
        row |= summary(timing, timings[found[0].name])
        if timing.output is not None and one.exact:
            y = np.asarray(timing.output[0], np.float64)
            row["error"] = float(np.abs(y - exact).max())
            row["sum_error"] = float(np.abs(y.sum(-1) - size.k).max())
        rows.append(row)
        print(f"  {one.name}: {row.get('ms')} ms, {row['status']}")
    return [Table("exactly_k", "Sets of exactly k", NOTE, SHOW, rows)]


def _candidates(key) -> list[Candidate]:
    """Returns what is timed; all others are compared with the first."""

    def forward(function):
        return lambda p: compiled(lambda x: (function(x, p.k),), p.x)

    def both(function):
        return lambda p: compiled(with_gradient(lambda x: function(x, p.k)), p.x, p.c)

    def sample(x, k):
        return exactly_k_sample(x, k, key)

    def straight_through(x, k):
        y = exactly_k_marginals(x, k)
        return sample(x, k) - jax.lax.stop_gradient(y) + y

    return [
        Candidate("lax.top_k", forward(lambda x, k: jax.lax.top_k(x, k)[0])),
        Candidate("hard router, with gradient", both(hard_router)),
        Candidate("exactly_k_marginals", forward(exactly_k_marginals), "marginals"),
        Candidate("exactly_k_marginals, with gradient", both(exactly_k_marginals), "marginals"),
        Candidate("exactly_k_sample", forward(sample)),
        Candidate("a step of the router", both(straight_through)),
    ]


def marginals(x, k: int) -> np.ndarray:
    """Returns each item's probability to be one of k, in float64: log-domain polynomials of the
    items before it and of those after it."""
    x = np.asarray(x, np.float64)
    before, after = _log_polynomials(x, k), _log_polynomials(x[..., ::-1], k)[::-1]
    others = before[:-1, ..., :k] + after[1:, ..., k - 1 :: -1]  # k - 1 of the other items
    y = np.logaddexp.reduce(others, -1) - before[-1, ..., k]
    return np.exp(x + np.moveaxis(y, 0, -1))


def _log_polynomials(x, k: int) -> np.ndarray:
    """Returns log e_j of the first i items at [i, ..., j], j up to k."""
    found = [np.full((*x.shape[:-1], k + 1), -np.inf)]
    found[0][..., 0] = 0
    for item in np.moveaxis(x, -1, 0):
        last = found[-1].copy()
        last[..., 1:] = np.logaddexp(last[..., 1:], found[-1][..., :-1] + item[..., None])
        found.append(last)
    return np.stack(found)
