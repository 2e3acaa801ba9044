"""Operators by a threshold on drawn problems: any p, strength, k and row, against long doubles."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routers import sparse_topk_magnitude, sparse_topk_mask
from tests.oracles import WIDE
from tests.routers import operators

N = 12
# From where it is a softmax to where it is a step; drawn once between.
P = [1 + 1e-9, 1.1, 1.37, 1.82, 2.2, 4.0, 100.0]
P += [pytest.param(p, marks=pytest.mark.slow) for p in (1.001, 1.13, 9.5, 1e6)]
MAGNITUDE_P = [2.2, 4.0]


def problems(dtype, seed, number=48):
    """Rows with ties, offsets, clusters, outliers and absent items; k near 0 and n; strengths."""
    rng = np.random.default_rng(seed)
    kinds = [
        lambda x: x,
        lambda x: np.round(x),
        lambda x: x + 10.0 ** rng.integers(2, 7),
        lambda x: np.where(rng.random(N) < 0.5, x, 0.5 + 1e-5 * x),
        lambda x: np.where(np.arange(N) == rng.integers(N), 1e20 * x, x),
        lambda x: np.where(rng.random(N) < 0.3, -np.inf, x),
        lambda x: np.full(N, x[0]),
        lambda x: np.exp(5 * x),
    ]
    rows = [kinds[i % len(kinds)](rng.normal(size=N)) for i in range(number)]
    draws = rng.random(number)
    k = [rng.choice([N * u, 1e-3 * u, N - 1e-3 * u, 1 + math.floor((N - 1) * u)]) for u in draws]
    lam = 10 ** rng.uniform(-3, 3, number)
    return tuple(np.asarray(a, dtype) for a in (rows, k, lam))


def exact_mask(x, k, lam, p):
    """h of a row by bisection: from the lowest selected item for p > 2, else from the cap."""
    x, k, lam = np.asarray(x, np.float64).astype(WIDE), WIDE(k), WIDE(lam)
    real, e = x > -np.inf, 1 / (WIDE(p) - 1)
    if k >= real.sum():
        return 1.0 * real
    if p > 2:
        return _from_the_lowest(x, k, lam, p, lambda item, y: 1)[0]
    s = np.sort(x[real])[::-1]
    place = s[math.ceil(k) - 1]
    # The cap is not below the k-th item, where k are whole, nor all too far above it.
    far = min(lam, lam / e * np.log(2 * len(s) / k)) + s[0] - place

    def below(c):
        v = np.clip((c - (np.where(real, x, place - 2 * lam - far) - place)) / lam, 0, 1)
        return np.where(v < 1, np.exp(e * np.log1p(-np.minimum(v, 1 - WIDE(1e-18)))), 0)

    return below(_bisect(lambda c: below(c).sum(), far, 0, k))


def exact_magnitude(x, k, lam, p):
    """The shrunk row for p > 2, of entries that are not negative."""
    a, lam = np.asarray(x, np.float64).astype(WIDE), WIDE(lam)
    if k >= (a > 0).sum():
        return a
    h, item, y = _from_the_lowest(a, WIDE(k), lam, p, lambda item, y: item - lam * y ** (p - 1))
    shift = lam * y ** (WIDE(p) - 1)
    return np.where(h < 1, np.where(h > 0, h * (item - shift) + (a - item) + shift, 0), a)


def _from_the_lowest(x, k, lam, p, cap):
    """h, the lowest selected item and its power y; items whose powers reach the cap are whole."""
    p = WIDE(p)

    def selected(item, y):
        u = np.where(x > item, (x - item) / lam + y ** (p - 1), 1)
        powers, most = np.where(x == item, y, u ** (1 / (p - 1))), cap(item, y)
        return np.where(x >= item, np.where(powers < most, powers / most, 1), 0)

    item = min(a for a in x[x > -np.inf] if selected(a, WIDE(0)).sum() < k)
    y = _bisect(lambda y: selected(item, y).sum(), 0, cap(item, WIDE(0)), k)
    return selected(item, y), item, y


def _bisect(total, low, high, k):
    """Where the total is k, which is below k at `low` and not at `high`."""
    low, high = WIDE(low), WIDE(high)
    for _ in range(250):
        middle = (low + high) / 2
        if (found := total(middle)) == k:
            break
        low, high = (middle, high) if found < k else (low, middle)
    return middle


dtypes = pytest.mark.parametrize(
    "dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)]
)


@dtypes
@pytest.mark.parametrize("p", P)
def test_masks_are_the_exact_ones_for_every_p(p, dtype):
    x, k, lam = problems(dtype, seed=int(100 * p))
    with jax.enable_x64(dtype == np.float64):
        y = jax.jit(lambda x, k, lam: sparse_topk_mask(x, k, p=p, strength=lam))(x, k, lam)
    y, eps = np.asarray(y, float), np.finfo(dtype).eps
    expected = np.asarray([exact_mask(*row, p) for row in zip(x, k, lam, strict=True)], float)
    # Two floats hold a threshold to eps^2; above p = 2 it lies at an item, which is exact.
    size = np.abs(np.where(x > -np.inf, x, 0)).max(-1)
    step = 4 * eps**2 * size / (lam * min(p - 1, 1)) if p <= 2 else 0
    assert (np.abs(y - expected).max(-1) <= 8 * eps + step).all()
    total = np.minimum(k, (x > -np.inf).sum(-1))
    assert (np.abs(y.sum(-1) - total) <= (16 * eps + step) * total).all()


@dtypes
@pytest.mark.parametrize("p", MAGNITUDE_P)
def test_magnitudes_are_the_exact_ones_above_two(p, dtype):
    x, k, lam = problems(dtype, seed=int(100 * p))
    x = np.abs(np.where(x > -np.inf, x, 0))
    with jax.enable_x64(dtype == np.float64):
        y = jax.jit(lambda x, k, lam: sparse_topk_magnitude(x, k, p=p, strength=lam))(x, k, lam)
    expected = [exact_magnitude(*row, p) for row in zip(x, k, lam, strict=True)]
    error = np.abs(np.asarray(y, float) - np.asarray(expected, float)).max(-1)
    assert (error <= 8 * np.finfo(dtype).eps * x.max(-1)).all()


@pytest.mark.parametrize("p", [1.01, 4.1, 100.0])
def test_magnitudes_of_other_p_are_refused(p):
    with pytest.raises(ValueError, match=r"p must be from 1\.1 to 4 for magnitudes"):
        sparse_topk_magnitude(np.ones(5, np.float32), 2, p=p)


INFINITE = {  # what three scores of +inf, k = 2, share
    **dict.fromkeys(("mask", "smooth mask", "steep mask", "lapsum", "sinkhorn"), 2 / 3),
    **dict.fromkeys(("mask, pav", "mask, merge", "mask, dykstra", "sorted sinkhorn"), 2 / 3),
    **dict.fromkeys(("sparsemax", "entmax"), 1 / 3),
    "sigmoid": 1 / 2,  # at the midpoint of two of them
}


@pytest.mark.parametrize("name", INFINITE)
def test_infinite_scores_share_what_the_largest_floats_would(name):
    """As the limit of three equal scores that grow; one or two of them are chosen whole."""

    @jax.jit
    def run(x):
        y, pull = jax.vjp(lambda x: operators.ALL[name](x, 2, 1.0), x)
        return y, pull(jnp.cos(1.7 * jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))[0]

    inf, items = np.inf, lambda y: y.sum(-1) if y.ndim == 2 else y
    y, slope = run(jnp.array([inf, 0, inf, 1, inf, -inf], jnp.float32))
    np.testing.assert_allclose(items(y), INFINITE[name] * np.array([1, 0, 1, 0, 1, 0]), rtol=1e-6)
    assert jnp.isfinite(slope).all()
    y, slope = run(jnp.array([inf, 0, -1, 1, -inf, -inf], jnp.float32))
    assert items(y)[0] == 1 and jnp.isfinite(y).all() and jnp.isfinite(slope).all()
