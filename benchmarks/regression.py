"""Isotonic regression: this project's solvers, scikit-learn and scipy row by row."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import oracles
from benchmarks.paper import SWEEPS, dykstra_fit
from benchmarks.report import Table, panels, save, styles
from benchmarks.timing import Candidate, compiled, device, measure, summary, with_gradient

SHAPES = [(512, 64), (128, 1024), (1, 100_000), (1, 1_000_000)]
SHOW = ("input", "size", "candidate", "device", "status", "ms", "ms_q1", "ratio")
SHOW += ("error", "gradient_error")
SEQUENTIAL = 20_000  # longest row that accelerators, which step slowly, are asked to pool
LONGEST = 100_000  # beyond it 500 sweeps take half a minute on a CPU
NOTE = (
    "Decreasing fit of float32 rows. Ours and jaxopt: forward and backward, compiled. scipy and "
    "scikit-learn: forward only, row by row from Python; jaxopt's needs numba. `ratio`: to "
    "scipy. `error`: to scipy in float64 of the same data; `gradient_error`: to the means over "
    "its blocks."
)


class Problem(NamedTuple):
    """Holds data y and a direction c, float32 `[rows, n]`."""

    y: np.ndarray
    c: np.ndarray


def noise(rng, rows, n):
    """Makes noise, with nothing to fit: a few wide pools."""
    return rng.standard_normal((rows, n))


def nearly_sorted(rng, rows, n):
    """Makes sorted scores minus (n, ..., 1)/n, as in soft ranking: many small pools."""
    s = -np.sort(-rng.standard_normal((rows, n)), axis=-1)
    return s - np.arange(n, 0, -1) / n


def top_k(rng, rows, n):
    """Makes sorted scores minus n/8 ones, as behind a top-k mask: a single pool."""
    s = -np.sort(-rng.standard_normal((rows, n)), axis=-1)
    return s - (np.arange(n) < n // 8)


INPUTS = {"noise": noise, "nearly sorted": nearly_sorted, "top-k": top_k}


def candidates() -> list[Candidate]:
    """The first is what the others are compared with."""
    from isotonic.regression import SOLVERS

    ours = [_solver(name, name in SOLVERS) for name in ("pav", "merge")]
    return [
        Candidate("scipy", _rows(_scipy), "fit", "scipy", "numpy"),
        Candidate("scikit-learn", _rows(_sklearn), "fit", "sklearn", "numpy"),
        *ours,
        Candidate(
            f"dykstra {SWEEPS}",
            _jax(lambda: dykstra_fit),
            "fit",
            covers=lambda task: task.y.shape[-1] <= LONGEST,
        ),
        # 1,000 times slower without numba.
        Candidate("jaxopt isotonic_l2_pav", _jax(_jaxopt), "fit", "numba"),
        *forward_only(),
    ]


def forward_only() -> list[Candidate]:
    """Leaves out the sums over blocks of the derivative, which all solvers of ours share."""
    from isotonic.blocks import Fit
    from isotonic.dykstra import dykstra
    from isotonic.merge import merge, merge_segments
    from isotonic.pav import pav

    def least_squares(m, y, w):
        return w * (y - m), -w

    def halves(y, w):
        index = jnp.broadcast_to(jnp.arange(y.shape[-1], dtype=jnp.int32), y.shape)
        fit = merge_segments(least_squares, Fit(y, index), 1, y, w)
        return Fit(*(a[..., : y.shape[-1]] for a in fit))

    def forward(solve):
        step = functools.cache(lambda: lambda y, c: (solve(y, jnp.ones_like(y)).v, None))
        return lambda task: compiled(step(), task.y, task.c)

    def sweeps(y, w):
        return dykstra(y, w, tol=0.0, max_iter=SWEEPS)

    def short(task):
        return task.y.shape[-1] <= LONGEST

    return [
        Candidate("forward: pav", forward(pav), "fit"),
        Candidate("forward: merge", forward(merge), "fit"),
        Candidate("forward: merge, no PAV", forward(halves), "fit", covers=short),
        Candidate(f"forward: dykstra {SWEEPS}", forward(sweeps), "fit", covers=short),
    ]


def _solver(name, there) -> Candidate:
    from isotonic import isotonic_regression

    def load():
        if not there:
            raise ImportError(f"no solver {name}")
        return functools.partial(isotonic_regression, increasing=False, solver=name)

    short = jax.default_backend() != "cpu" and name == "pav"
    limit = SEQUENTIAL if short else math.inf
    return Candidate(name, _jax(load), "fit", covers=lambda task: task.y.shape[-1] <= limit)


def _jax(load):
    """`make` for a function of all rows."""
    step = functools.cache(lambda: with_gradient(load()))
    return lambda task: compiled(step(), task.y, task.c)


def _rows(load):
    """`make` for a function of single rows, in a Python loop."""

    def make(task):
        solve = load()
        return lambda: (np.stack([solve(row) for row in task.y]), None)

    return make


def _scipy():
    from scipy.optimize import isotonic_regression

    return lambda row: isotonic_regression(row, increasing=False).x


def _sklearn():
    from sklearn.isotonic import isotonic_regression

    return lambda row: isotonic_regression(row, increasing=False)


def _jaxopt():
    from jaxopt.isotonic import isotonic_l2_pav

    return jax.vmap(isotonic_l2_pav)


def exact(task: Problem):
    """Returns the fit and J^T c by scipy in float64; without scipy by scikit-learn."""
    y, c = task.y.astype(np.float64), task.c.astype(np.float64)
    try:
        solve = _scipy()
    except ImportError:
        solve = _sklearn()
    v = np.stack([solve(row) for row in y])
    edge = np.concatenate([np.ones((len(v), 1), bool), np.diff(v, axis=-1) != 0], -1)
    block = np.cumsum(edge.ravel()) - 1
    mean = np.bincount(block, c.ravel()) / np.bincount(block)
    return oracles.Exact(v, mean[block].reshape(v.shape), None)


def tables(quick: bool) -> list[Table]:
    """Returns a row for every candidate on every input and shape."""
    shapes, budget = (SHAPES[:1], 0.3) if quick else (SHAPES, 2.0)
    found = candidates()  # once, so that each compiles once for all inputs of a shape
    rows = [
        row
        for name in INPUTS
        for shape in shapes
        if name == "noise" or shape[-1] <= LONGEST  # the longest once
        for row in compare(found, name, shape, budget)
    ]
    return [Table("regression", "Isotonic regression", NOTE, SHOW, rows)]


def compare(found, name: str, shape, budget: float) -> list[dict]:
    """Returns a row for each candidate on one input."""
    rng = np.random.default_rng(0)
    y = INPUTS[name](rng, *shape).astype(np.float32)
    task = Problem(y, rng.standard_normal(shape, np.float32))
    timings, answer = measure(found, task, budget), exact(task)
    rows = []
    for candidate in found:
        timing = timings[candidate.name]
        row = {"input": name, "size": f"{shape[0]}x{shape[1]}", "rows": shape[0], "n": shape[1]}
        row |= {"candidate": candidate.name, "device": device(candidate.runs_on)}
        row |= summary(timing, timings[found[0].name])
        if timing.output is not None:
            v, gradient = timing.output
            row["error"] = oracles.error(v, answer.y)
            if gradient is not None:
                row["gradient_error"] = oracles.error(gradient, answer.gradient)
        rows.append(row)
        print(
            f"  {name} {row['size']} {candidate.name}: {row.get('ms', math.nan):.3g} ms, "
            f"{row['status']}"
        )
    return rows


def plot(tables: list[Table], out) -> None:
    """Draws regression.png, nanoseconds a point against the length of a row."""
    rows = [row for row in tables[0].rows if "ms" in row]
    figure, axes = panels(list(INPUTS), "length of a row, n", "ns per point")
    for axis, title in zip(axes, INPUTS, strict=True):
        for name, style in styles(row["candidate"] for row in rows).items():
            mine = [row for row in rows if row["candidate"] == name and row["input"] == title]
            cost = [1e6 * row["ms"] / (row["rows"] * row["n"]) for row in mine]
            axis.plot([r["n"] for r in mine], cost, marker="o", markersize=4, label=name, **style)
    save(figure, axes, out / "regression.png")
