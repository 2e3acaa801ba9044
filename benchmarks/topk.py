"""Top-k masks, forward and backward: time beside the hard router's, and distance to the oracle."""

import functools
import math
from typing import NamedTuple

import numpy as np

from benchmarks import oracles
from benchmarks.candidates import Problem, candidates, simplex_candidates
from benchmarks.report import Table
from benchmarks.timing import device, measure, summary

SHOW = ("size", "candidate", "device", "status", "ms", "ms_q1", "ratio")
SHOW += ("error", "gradient_error", "sum_error")
EXACT = {f"mask {p}": functools.partial(oracles.mask, link=p) for p in ("p=2", "p=3/2", "p=4/3")}
EXACT |= {
    f"mask {p}, strength 1/2": functools.partial(oracles.mask, link=p, lam=0.5)
    for p in ("p=2", "p=4/3")
}
EXACT |= {
    "hard": oracles.hard,
    "magnitude": oracles.magnitude,
    "lapsum": functools.partial(oracles.mask, link="laplace"),
    "sinkhorn": functools.partial(oracles.mask, link="logistic"),
    "sigmoid": oracles.midpoint,
    # Of items that add up to 1 none exceeds it, so that the upper bound of a mask is idle.
    "entmax 1.5": functools.partial(oracles.mask, link="p=3/2", lam=2.0),
}


class Size(NamedTuple):
    """Holds a problem's size; `only` names the candidates that matter here, all if empty."""

    rows: int
    n: int
    k: int
    only: tuple[str, ...] = ()

    def __str__(self):
        return f"{self.rows}x{self.n}, k={self.k}"


SIZES = [(512, 64, 8), (128, 1024, 32), (16384, 8, 2), (16384, 64, 2), (4096, 256, 8)]
SIZES = [Size(*size) for size in [*SIZES, (32, 400, 28), (32, 4096, 128)]]
QUICK_SIZES = [Size(64, 64, 8)]
# The threshold solver is to be 100 times faster than 500 sweeps of Dykstra here.
PAIR = Size(4096, 64, 8, ("hard", "mask p=2", "dykstra 500, p=2", "jaxopt box section, p=2"))
NOTE = (
    "Float32 normal scores, strength 1 where no other is named, forward and backward together, "
    "compiled, in turns. `ms`: median; `ms_q1`: lower quartile; `ratio`: to the hard router "
    "(softmax, the k largest, scatter), median over the rounds. `error`, `gradient_error`: "
    "largest difference to a float64 oracle of the same problem; for p = 2 gradients, rows with "
    "an item within 1e-5 of a kink are left out. `sum_error`: largest |sum - k| of a row. Each "
    "candidate solves its own problem: times compare between different problems, errors do not."
)


def tables(quick: bool) -> list[Table]:
    """Returns the tables of the masks, with geometric means, and of the simplex (k = 1)."""
    sizes, budget = (QUICK_SIZES, 0.3) if quick else (SIZES, 12.0)
    rows = compare(candidates(), sizes, budget)
    means, pair = geometric_means(rows), [] if quick else compare(candidates(), [PAIR], budget)
    simplex_sizes = [Size(64, 64, 1)] if quick else [Size(16384, 64, 1), Size(128, 1024, 1)]
    simplex = compare(simplex_candidates(), simplex_sizes, budget)
    note = (
        "Sparsemax and 1.5-entmax are the masks of p = 2 and, with strength 2, p = 3/2 for k = 1."
    )
    return [
        overview(rows, means),
        Table("topk", "Top-k masks", f"{NOTE} {_times_faster(pair)}", SHOW, rows + means + pair),
        Table("simplex", "Sparsemax and entmax", f"{note} Columns as above.", SHOW, simplex),
    ]


def problem(size: Size, seed: int = 0) -> Problem:
    """Makes normal scores and a normal direction."""
    rng = np.random.default_rng(seed)
    shape = (2, size.rows, size.n)
    x, c = rng.standard_normal(shape, np.float32)
    return Problem(x, c, size.k)


def compare(found, sizes, budget: float) -> list[dict]:
    """A row for each candidate and size; the first candidate is the reference."""
    rows = []
    for size in sizes:
        here = [c for c in found if not size.only or c.name in size.only]
        task = problem(size)
        timings = measure(here, task, budget)
        exact = {name: EXACT[name](*task) for name in {c.exact for c in here} if name}
        for candidate in here:
            timing = timings[candidate.name]
            row = {"size": str(size), "rows": size.rows, "n": size.n, "k": size.k}
            row |= {"candidate": candidate.name, "device": device(candidate.runs_on)}
            row |= summary(timing, timings[here[0].name])
            if timing.output is not None:
                row |= _errors(candidate, timing.output, exact, size)
            rows.append(row)
            print(f"  {size} {candidate.name}: {row.get('ms', math.nan):.3g} ms, {row['status']}")
    return rows


def _errors(candidate, output, exact, size) -> dict:
    # A tensor of PyTorch may live on an accelerator.
    output = (a.cpu() if candidate.runs_on == "torch" else a for a in output)
    y, gradient = (np.asarray(a, np.float64) for a in output)
    columns = {}
    answer = exact.get(candidate.exact)
    if answer is not None:
        columns["error"] = oracles.error(y, answer.y)
        columns["gradient_error"] = oracles.error(gradient, answer.gradient)
    if answer is None or answer.total is not None:
        columns["sum_error"] = float(np.abs(y.sum(-1) - size.k).max())
    return columns


def geometric_means(rows) -> list[dict]:
    """Returns the mean of each candidate's ratios over the sizes that it was timed at."""
    sizes = len({row["size"] for row in rows})
    means = []
    for name in dict.fromkeys(row["candidate"] for row in rows):
        ratios = [row["ratio"] for row in rows if row["candidate"] == name and "ratio" in row]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            status = f"{len(ratios)} of {sizes} sizes"
            row = {"size": "geometric mean", "candidate": name, "status": status, "ratio": mean}
            means.append(row)
    return means


def overview(rows, means) -> Table:
    """Returns a line for each candidate, with a column for each size."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    lines = {row["candidate"]: {"candidate": row["candidate"]} for row in rows}
    for row in rows:
        short = row["status"].split(":")[0]
        lines[row["candidate"]][row["size"]] = (
            f"{row['ratio']:.3g} ({row['ms']:.3g} ms)" if "ratio" in row else short
        )
    for row in means:
        lines[row["candidate"]]["geometric mean"] = f"{row['ratio']:.3g}, {row['status']}"
    show = ("candidate", *sizes, "geometric mean")
    note = "Time as a multiple of the hard router's, and median milliseconds. Details below."
    return Table("topk_overview", "Top-k masks at a glance", note, show, list(lines.values()))


def _times_faster(pair) -> str:
    """Returns a sentence on the largest comparison with the paper's solver."""
    ms = {row["candidate"]: row["ms"] for row in pair if "ms" in row}
    slow, fast = ms.get("dykstra 500, p=2"), ms.get("mask p=2")
    if not (slow and fast):
        return ""
    return f"At {PAIR} the threshold solver is {slow / fast:.0f} times as fast as 500 sweeps."
