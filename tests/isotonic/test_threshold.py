"""The threshold solver against bisection in long doubles, on rows that break naive ones."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isotonic.power_links import MagnitudeLink, MaskLink
from isotonic.threshold import threshold
from tests.oracles import exact_threshold

P = [2.0, 1.5, 4 / 3, 3.0]
STRENGTHS = [1e-4, 1e-2, 1.0, 1e2, 1e4]
REQUIRED = {np.float32: 1e-6, np.float64: 1e-12}  # times max(1, max|x|/lam)
# What a two-float threshold gives, max|x|/lam or not: some ten roundings of float32, a thousand of
# float64 (asked no more closely than the oracle's own sums are known).
STRONG = {np.float32: 2e-6, np.float64: 1e-12}

norms = pytest.mark.parametrize("p", P)
links = pytest.mark.parametrize("link", [MaskLink, MagnitudeLink])
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def kinds(n, dtype=float):
    x = np.random.default_rng(n).normal(size=n)
    middle = np.arange(n) == n // 2
    rows = {
        "normal": x,
        "ties": np.round(2 * x) / 2,
        "constant": np.full(n, 0.3),
        "absent": np.where(np.arange(n) % 3 == 1, -np.inf, x),
        "one left": np.where(middle, x, -np.inf),
        "none left": np.full(n, -np.inf),
        "outlier above": np.where(middle, 1e30, x),
        "outlier below": np.where(middle, -1e30, x),
        "huge": 1e30 * x,
        "tiny": 1e-30 * x,
        "offset": 1e4 + x,
        "wild": np.exp(8 * x),
    }
    return {name: row.astype(dtype) for name, row in rows.items()}


@partial(jax.jit, static_argnums=0)
def solve(link, x, k, lam):
    return threshold(link, x, k, lam)


def errors(link, dtype, rows, k, lam):
    """(error, required bound, strong bound) of each row; those of magnitude relative to max|x|.

    For magnitude the error is that of the shrunk row, tau h + x - tau: with tau = 1e-60 the
    selections y/tau have no digits left in float32, and the row does not need any.
    """
    magnitude, p = isinstance(link, MagnitudeLink), link.p
    if magnitude:
        # Zeros are absent, as in `routers.topk`.
        rows = np.where(np.isfinite(rows) & (rows != 0), np.abs(rows), -np.inf)
    x, k, lam = (np.asarray(a, dtype) for a in (rows, k, lam))
    with jax.enable_x64(dtype == np.float64):
        h, tau = jax.device_get(solve(link, jnp.asarray(x), k, lam))
    assert h.dtype == dtype and np.isfinite(h).all() and np.isfinite(tau).all()
    found, case = [], (x, k, lam, h, tau)
    for x, k, lam, h, tau in zip(*case, strict=True):
        exact_h, exact_tau, exact_out = exact_threshold(x, k, lam, p, magnitude)
        real = np.isfinite(x)
        scale = float(np.abs(x[real]).max(initial=0))
        error = np.abs(h - exact_h).max()
        width = lam  # of the link, in units of x
        if magnitude:
            out = np.where(h < 1, np.where(h > 0, h * tau + (x - tau), 0), x)[real]
            error = np.abs(out - exact_out[real]).max(initial=0) / (scale or 1)
            width = lam * np.abs(exact_tau) ** (p - 1)
        assert (h[~real] == 0).all()
        # Two floats hold tau to eps^2; a link narrower than that is a step. Roots magnify it.
        eps = float(np.finfo(dtype).eps)
        step = 4 * eps**2 * np.abs(exact_tau) / width if k < real.sum() else 0
        strong = STRONG[dtype] + step ** min(1, link.exponent)
        found.append((error, REQUIRED[dtype] * max(1, scale / float(lam)), strong))
    return np.asarray(found, float)


def assert_close(link, dtype, rows, ks, strengths):
    cases = list(itertools.product(rows, ks, strengths))
    names, k, lam = zip(*cases, strict=True)
    error, required, strong = errors(link, dtype, np.stack([rows[a] for a in names]), k, lam).T
    worst = {case: bad for case, bad in zip(cases, error - strong, strict=True) if not bad <= 0}
    assert not worst
    if isinstance(link, MaskLink):
        assert (error <= required).all()


@pytest.mark.parametrize("n", [64, pytest.param(1000, marks=pytest.mark.slow)])
@links
@dtypes
@norms
def test_every_kind_of_row(p, dtype, link, n):
    """Every row with its own k and strength, in one batch: no row may disturb another."""
    ks = [1, 8.3, 0.25, n] if n == 64 else [8, n - 0.5]
    strengths = STRENGTHS if n == 64 else [1e-4, 1.0, 1e4]
    assert_close(link(p), dtype, kinds(n, dtype), ks, strengths)


@pytest.mark.parametrize("n", [1, 2])
@links
@dtypes
def test_shortest_rows(dtype, link, n):
    assert_close(link(4 / 3), dtype, kinds(n, dtype), [0.25, 1, n - 0.2, n], STRENGTHS)


SETTINGS = [(MaskLink, np.float32, 100, 1.0), (MagnitudeLink, np.float32, 20_000, 0.1)]
SETTINGS += [(MaskLink, np.float64, 20_000, 1.0), (MagnitudeLink, np.float64, 100, 1e-3)]


@pytest.mark.slow
@pytest.mark.parametrize("p", [4 / 3, 3.0])
@pytest.mark.parametrize(("link", "dtype", "k", "strength"), SETTINGS)
def test_long_rows(link, dtype, k, strength, p):
    rows = kinds(100_000, dtype)
    rows = {name: rows[name] for name in ("normal", "ties", "offset")}
    assert_close(link(p), dtype, rows, [k], [strength])


def every_way(link, x, k, lam):
    """The same rows solved in one batch, mapped, scanned and rematerialised."""

    def one(x, k, lam):
        return threshold(link, x, k, lam).h

    def step(carry, row):
        return carry, one(*row)

    k, lam = (jnp.broadcast_to(a, x.shape[:1]) for a in (k, lam))
    yield jax.jit(one)(x, k, lam)
    yield jax.jit(jax.vmap(one))(x, k, lam)
    yield jax.jit(lambda *rows: jax.lax.scan(step, 0, rows)[1])(x, k, lam)
    yield jax.jit(jax.checkpoint(one))(x, k, lam)


@links
def test_traced_k_and_strength_in_every_transformation(link):
    x = jnp.abs(jnp.asarray(np.stack(list(kinds(32, np.float32).values())[:3])))
    k, lam = jnp.asarray([2.0, 3.7, 32.0]), jnp.asarray([0.1, 1.0, 10.0])
    expected, *others = every_way(link(1.5), x, k, lam)
    for found in others:
        # The same search; XLA orders its sums differently.
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(expected.sum(-1), k, rtol=1e-6)


def passes(link, x, k, lam):
    """How many passes over the batch the search takes."""
    calls = []

    class Counted(type(link)):
        def step(self, gap, tau, k, lam):
            jax.debug.callback(lambda: calls.append(1))
            return super().step(gap, tau, k, lam)

    jax.block_until_ready(threshold(Counted(link.p), x, k, lam))
    jax.effects_barrier()
    return len(calls)


@links
def test_few_passes(link):
    """Neither rows without items, nor ties, outliers or narrow links may hold up a batch."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 64)), jnp.float32)
    assert 3 <= passes(link(4 / 3), jnp.abs(x), 2, 1.0) <= 12
    lam = jnp.asarray(STRENGTHS, jnp.float32)
    most = {"ties": 12, "absent": 30, "outlier above": 30, "wild": 30}
    for name in ("ties", "absent", "outlier above", "wild"):
        x = jnp.abs(jnp.asarray(kinds(64, np.float32)[name]))
        x = jnp.where(jnp.isfinite(x), x, -jnp.inf)
        assert passes(link(2.0), jnp.broadcast_to(x, (len(lam), 64)), 8, lam) <= most[name]
    few = jnp.where(jnp.arange(64) < 3, x, -jnp.inf)
    assert passes(link(2.0), jnp.stack([few, few - jnp.inf]), 8, 1.0) == 0


@links
@norms
def test_derivatives_of_the_root(link, p):
    """d tau/dk and d tau/d lam against the exact roots at k +- 1e-6, lam +- 1e-6."""
    x = np.abs(kinds(16)["normal"])
    magnitude = link is MagnitudeLink
    with jax.enable_x64(True):

        @jax.jit
        def root(k, lam):
            return threshold(link(p), jnp.asarray(x), k, lam).tau

        slopes = jax.grad(root, (0, 1))(4.3, 1.2)
    for slope, dk, dlam in zip(slopes, (1e-6, 0), (0, 1e-6), strict=True):
        up, down = (
            exact_threshold(x, 4.3 + sign * dk, 1.2 + sign * dlam, p, magnitude)[1]
            for sign in (1, -1)
        )
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)
