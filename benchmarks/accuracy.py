"""Is the float32 mask right at any strength? Against a float64 oracle of the same scores."""

import jax
import numpy as np

from benchmarks import oracles
from benchmarks.report import Table
from benchmarks.topk import SIZES, Size, problem
from routers.topk import sparse_topk_mask

STRENGTHS = (1e-4, 1e-2, 1.0, 1e2, 1e4)
LINKS = {"p=2": 2.0, "p=4/3": 4 / 3}
SHOW = ("size", "p", "strength", "error", "bound", "sum_error", "nonzeros", "nonzeros_exact")
SHOW += ("rows_that_differ", "result")


def tables(quick: bool) -> list[Table]:
    """Returns one row for each size, p and strength."""
    sizes = SIZES[:1] if quick else [*SIZES, Size(1, 1_000_000, 100_000)]
    rows = [row for size in sizes for row in check(size)]
    failed = sum(row["result"] != "pass" for row in rows)
    note = (
        "`sparse_topk_mask` in float32 against bisection in float64. `bound`: 1e-6 max(1, "
        "max|x|/strength); a row passes if `error` is within it. `nonzeros`: in the whole batch, "
        "and what they should be, k where x_(k) - x_(k+1) >= strength; "
        "`rows_that_differ`: rows that have another number of them than the oracle, as when an "
        f"item lies on the threshold to the last digit of float32. {failed} of {len(rows)} failed."
    )
    return [Table("accuracy", "Accuracy in float32", note, SHOW, rows)]


def hard_rows(x, k, lam):
    """Rows whose mask is the hard one by theory: there bisection stops anywhere in an interval."""
    x = np.asarray(x, np.float64)
    last = np.partition(x, (x.shape[-1] - k - 1, x.shape[-1] - k), axis=-1)
    return last[:, -k] - last[:, -k - 1] >= float(lam)


def check(size: Size, strengths=STRENGTHS) -> list[dict]:
    """Errors of one size for every p and strength."""
    x, _, k = problem(size)
    rows = []
    for link, p in LINKS.items():
        solve = jax.jit(lambda x, lam, p=p: sparse_topk_mask(x, k, p=p, strength=lam))
        for lam in strengths:
            lam = np.float32(lam)  # both are to solve for the same number
            y = np.asarray(solve(x, lam), np.float64)
            exact = oracles.mask(x, None, k, link, float(lam)).y
            found = (y > 0).sum(-1)
            due = np.where(hard_rows(x, k, lam), k, (exact > 0).sum(-1))
            row = {"size": str(size), "p": link, "strength": f"{lam:g}"}
            row["error"] = oracles.error(y, exact)
            row["bound"] = 1e-6 * max(1.0, float(np.abs(x).max() / lam))
            row["sum_error"] = float(np.abs(y.sum(-1) - k).max())
            row |= {"nonzeros": int(found.sum()), "nonzeros_exact": int(due.sum())}
            row["rows_that_differ"] = int((found != due).sum())
            row["result"] = "pass" if row["error"] <= row["bound"] else "FAIL"
            rows.append(row)
        print(f"  {size}, {link}: error at most {max(row['error'] for row in rows):.1e}")
    return rows
