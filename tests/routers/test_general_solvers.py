"""Every operator by every general solver, against long doubles, on rows of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routers import (
    permutahedron_projection,
    soft_rank,
    soft_sort,
    sparse_topk_magnitude,
    sparse_topk_mask,
)
from tests.routers.exact_projection import cotangents, project

N = 12
STRENGTHS = (1e-3, 0.11, 1.3, 30)


def rows(rng):
    """Scores that float32 holds, with what makes them hard in their names."""
    noise = rng.normal(size=N)
    absent = np.where(rng.permutation(N) < 3, -np.inf, noise)
    return {
        "noise": noise,
        "small": 1e-5 * noise,
        "ties": np.round(noise),
        "equal": np.full(N, 0.3),
        "offset": 1e6 + np.round(8 * noise) / 8,
        "clusters": np.where(noise > 0, 1e4, -1e4) + np.round(64 * noise) / 64,
        "outlier": np.where(np.arange(N) == 4, 1e9, noise),
        "absent": absent,
    }


def cases(seed):
    """Rows x, strengths and numbers k: real, near 0 and near n."""
    rng = np.random.default_rng(seed)
    each = [(x, lam) for x in rows(rng).values() for lam in STRENGTHS]
    x, lam = (np.asarray(a, np.float32) for a in zip(*each, strict=True))
    k = rng.choice([0.04, 1, 2.5, 7, N - 0.03, N], size=len(lam)).astype(np.float32)
    return x, lam, np.minimum(k, np.isfinite(x).sum(-1)).astype(np.float32)


def top(k):
    return np.clip(k - np.arange(N), 0, 1)


def expected(name, x, lam, k, p, u):
    """The value of a row and J^T u, by the oracle."""
    if name == "sort":
        places, w = np.arange(N, 0, -1), -np.sort(-x)
        solution = project(places, w, lam, p)
        pull = cotangents(solution, places, w, lam, p, u[::-1])[1]
        back = np.empty_like(pull)
        back[np.argsort(-x, kind="stable")] = pull
        return solution.y[::-1], back
    magnitude = name == "magnitude"
    a = np.abs(x) if magnitude else x
    w = {"rank": np.arange(N, 0, -1.0), "project": WEIGHTS}.get(name, top(k))
    sign = np.sign(x) if magnitude else 1
    solution = project(a, w, lam, p, magnitude)
    y = solution.y + (np.float64(lam) * solution.d if magnitude else 0)
    return sign * y, sign * cotangents(solution, a, w, lam, p, sign * u, magnitude)[0]


WEIGHTS = np.asarray([9, 7, 3, 3, 3, 1, 0.5, 0.1, 0, 0, -1, -4])
OPERATORS = {
    "mask": lambda x, lam, k, **rest: sparse_topk_mask(x, k, strength=lam, **rest),
    "magnitude": lambda x, lam, k, **rest: sparse_topk_magnitude(x, k, strength=lam, **rest),
    "rank": lambda x, lam, k, **rest: soft_rank(x, strength=lam, **rest),
    "sort": lambda x, lam, k, **rest: soft_sort(x, strength=lam, **rest),
    "project": lambda x, lam, k, **rest: permutahedron_projection(x, WEIGHTS, strength=lam, **rest),
}
SIGNED = ("sort", "project")  # their weights may be negative, which PAV solves for p = 2 alone
QUICK = [("mask", "merge", 2.0), ("rank", "pav", 2.0), ("sort", "merge", 3.0), ("mask", "pav", 1.5)]
ALL = [
    (name, solver, p)
    for name in OPERATORS
    for solver in ("merge", "pav", "dykstra")
    for p in (2.0, 1.5, 4 / 3, 1.2, 3.0, 4.0)
    if p == 2 or solver == "merge" or (solver == "pav" and name not in SIGNED)
]


def both(name, solver, p):
    """The function that gives values and J^T u of all rows."""

    @jax.jit
    def run(x, lam, k, u):
        y, pull = jax.vjp(lambda x: OPERATORS[name](x, lam, k, p=p, solver=solver), x)
        return y, pull(u)[0]

    return run


@pytest.mark.parametrize(
    ("name", "solver", "p"),
    QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK],
)
def test_equals_long_doubles_on_rows_of_all_kinds(name, solver, p):
    x, lam, k = cases(seed=11)
    if name in ("magnitude", "sort"):
        x, lam, k = (a[np.isfinite(x).all(-1)] for a in (x, lam, k))
    u = np.random.default_rng(12).normal(size=x.shape).astype(np.float32)
    values, slopes = (np.asarray(a, np.float64) for a in both(name, solver, p)(x, lam, k, u))
    for i, (row, row_lam, row_k) in enumerate(zip(x, lam, k, strict=True)):
        y, slope = (np.asarray(a, np.float64) for a in expected(name, row, row_lam, row_k, p, u[i]))
        # Dykstra's pools are not the exact ones in every last pair. Those of magnitude, which an
        # offset does change, are open where scores agree to six digits; and its slopes are bounded
        # where d is below eps.
        with np.errstate(invalid="ignore"):  # of two absent items
            gaps = np.diff(np.sort(np.abs(row)))
        clear = (gaps[gaps > 0].min(initial=1) > 1e-5 * np.abs(row).max()) and (
            p <= 2 or np.abs(row).max() > 1e-3
        )
        where = f"{name} {solver} p={p} {row} k={row_k} strength={row_lam}"
        # A few roundings of the largest weight; Dykstra stops at 1e-6 of it a pair, 11 in a pool.
        atol = (2e-5 if solver == "dykstra" else 2e-6) * max(np.abs(y).max(), 1e-3)
        np.testing.assert_allclose(values[i], y, atol=atol, err_msg=where)
        if solver == "dykstra" or (name == "magnitude" and not clear):
            continue
        atol = 1e-4 * np.abs(slope).max() + 1e-6 * max(1, 1 / row_lam)
        np.testing.assert_allclose(slopes[i], slope, rtol=1e-3, atol=atol, err_msg=where)


@pytest.mark.parametrize("solver", ["merge", "pav", "dykstra"])
def test_an_offset_of_the_row_changes_nothing(solver):
    """v, of the size of the scores, holds no digit of s - v, of the size of the strength."""
    x = jnp.asarray([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3])
    ranks, mask = (
        jax.jit(f)(x)
        for f in (
            lambda x: soft_rank(x, strength=1e-3, solver=solver),
            lambda x: sparse_topk_mask(x, 2, strength=2.0, solver=solver),
        )
    )
    np.testing.assert_allclose(ranks, [1, 2, 3, 4], rtol=1e-6)
    np.testing.assert_allclose(mask, [0, 0.25, 0.75, 1], atol=3e-6)
    projected = permutahedron_projection(x, [1.0, 2, 3, 4], strength=1e-3, solver=solver)
    np.testing.assert_allclose(projected, [1, 2, 3, 4], rtol=1e-6)
    sorted_ = soft_sort(x[::-1], strength=1e-9, solver=solver)
    np.testing.assert_array_equal(sorted_, x)


@pytest.mark.parametrize("solver", ["merge", "pav"])
def test_absent_items_are_never_pooled(solver):
    """Also where a weight times the strength is large: a floor below the others was not enough."""
    z, w = jnp.asarray([0, 0.3, -0.5, -jnp.inf]), jnp.asarray([10.0, 10, 10, 0])
    y = permutahedron_projection(z, w, p=3, solver=solver)
    np.testing.assert_allclose(y, [10, 10, 10, 0], rtol=1e-6)
    ranks = soft_rank(z, p=3, strength=1e-3, solver=solver)
    np.testing.assert_allclose(ranks, [3, 4, 2, 0], rtol=1e-6)
    falling = soft_rank(z, p=3, strength=1e-3, descending=True, solver=solver)
    np.testing.assert_allclose(falling, [2, 1, 3, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [list, np.int64, np.uint8, np.int32, np.float64, np.float16])
def test_numbers_of_every_kind(dtype):
    x = [3, 1, 2] if dtype is list else np.asarray([3, 1, 2], dtype)
    out = np.float16 if dtype is np.float16 else np.float32
    for y, exact in (
        (soft_sort(x, strength=10.0), [1.9, 2, 2.1]),
        (soft_sort(x, strength=0.1, descending=True), [3, 2, 1]),
        (soft_rank(x), [3, 1, 2]),
        (soft_rank(x, descending=True), [1, 3, 2]),
        (permutahedron_projection(x, [1, 2, 6]), [4, 2, 3]),
    ):
        assert y.dtype == out
        np.testing.assert_allclose(y, exact, rtol=1e-6 if out is np.float32 else 1e-3)


def test_wrong_numbers_are_errors_or_rows_of_nan():
    x = jnp.asarray([[0.1, 0.5, -0.2], [0.3, jnp.nan, 0.4], [2.0, 1.0, 0.0]])
    for f in (soft_rank, soft_sort):
        for change in ({"axis": 3}, {"strength": -1.0}, {"strength": jnp.nan}, {"p": jnp.inf}):
            with pytest.raises(ValueError):
                f(x, **change)
        with pytest.raises(ValueError):
            f(jnp.float32(1.0))
        y, slope = jax.jit(
            lambda x, lam, f=f: (
                f(x, strength=lam),
                jax.grad(lambda x: (f(x, strength=lam) ** 2).sum())(x),
            )
        )(x, jnp.asarray([1.0, 1.0, -1.0]))
        for a in (y, slope):
            assert np.isnan(a[1:]).all() and np.isfinite(a[0]).all()
        np.testing.assert_allclose(y[0], f(x[0]), rtol=1e-6)
