"""Error against the number of steps: Dykstra's projections, and the solvers that finish.

The paper runs 500 sweeps of Dykstra's projections, and judges by time alone. A pool of m items
needs some m^2 sweeps; PAV takes at most 2 n sequential steps, merging halves log2(n).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import oracles
from benchmarks.report import Table, panels, save, styles
from benchmarks.topk import Size, problem
from isotonic import isotonic_regression
from isotonic.dykstra import dykstra
from isotonic.regression import SOLVERS
from routers.topk import sparse_topk_mask

SIZES = [Size(4, 64, 8), Size(4, 400, 28), Size(4, 1024, 64), Size(4, 8192, 512)]
SWEEPS = (1, 3, 10, 30, 100, 300, 500, 1000, 3000, 5000)
SHOW = ("size", "solver", "steps", "error", "status")
NOTE = (
    "Largest error of the p = 2 mask at strength 1, float32, over four rows. Steps: sweeps of "
    "Dykstra; pushes and merges of PAV, the most of any row; levels of merge, log2(n). The "
    "threshold solver takes a few passes, of which it keeps no count."
)


def tables(quick: bool) -> list[Table]:
    """One row for each number of sweeps, and one for each solver that is exact."""
    rows = [row for size in SIZES[: 1 if quick else None] for row in trace(size)]
    return [Table("convergence", "Error against steps", NOTE, SHOW, rows)]


def trace(size: Size, sweeps=SWEEPS) -> list[dict]:
    """Errors of one size."""
    x, _, k = problem(size)
    s = -np.sort(-x, axis=-1)
    y = s - (np.arange(size.n) < k).astype(np.float32)
    exact = oracles.mask(s, None, k, "p=2").y

    def row(solver, steps, mask, status="ok"):
        wrong = None if mask is None else oracles.error(mask, exact)
        print(f"  {size} {solver}, {steps} steps: {wrong}")
        return {"size": str(size), "solver": solver, "steps": steps, "error": wrong} | {
            "status": status
        }

    # The number of sweeps is traced, so that this compiles once.
    after = jax.jit(lambda y, m: dykstra(y, jnp.ones_like(y), tol=0.0, max_iter=m).v)
    rows = [row("dykstra", m, s - after(y, m)) for m in sweeps]
    for name, steps in (("pav", _pav_steps(y)), ("merge", math.ceil(math.log2(size.n)))):
        if name in SOLVERS:
            fit = isotonic_regression(y, increasing=False, solver=name)
            rows.append(row(name, steps, s - fit))
        else:
            rows.append(row(name, steps, None, "not available"))
    return [*rows, row("threshold", None, sparse_topk_mask(s, k))]


def _pav_steps(y) -> int:
    """Pushes of n items, and a merge for every item that does not start a block of its own."""
    fit = SOLVERS["pav"](y, jnp.ones_like(y))
    merged = (np.asarray(fit.block) != np.arange(y.shape[-1])).sum(-1)
    return int(y.shape[-1] + merged.max())


def plot(tables: list[Table], out) -> None:
    """Draws convergence.png, with a panel for each size."""
    rows = [row for row in tables[0].rows if row["error"] is not None]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, axes = panels([size.split("x")[1] for size in sizes], "steps", "largest error")
    looks = styles(row["solver"] for row in rows)
    for axis, size in zip(axes, sizes, strict=True):
        for name, style in looks.items():
            mine = [row for row in rows if row["size"] == size and row["solver"] == name]
            error = [max(row["error"], 1e-8) for row in mine]
            if name == "threshold":
                axis.axhline(
                    error[0], **style | {"linestyle": "--"}, label="threshold (few passes)"
                )
            else:
                axis.plot(
                    [r["steps"] for r in mine], error, label=name, marker="o", markersize=5, **style
                )
        axis.axvline(
            500, color="grey", linewidth=0.8, linestyle=":", label="the paper's 500 sweeps"
        )
        axis.set_title("n=" + axis.get_title())
    save(figure, axes, out / "convergence.png")
