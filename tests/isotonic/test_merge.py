"""Merging solved halves, against scipy, PAV and the min-max formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isotonic.blocks import Fit
from isotonic.merge import merge, merge_segments
from isotonic.pav import pav
from isotonic.pnorm import isotonic_pnorm
from tests.isotonic.test_pav import museum, reference, weights_for
from tests.isotonic.test_pnorm import reference as min_max


def apart(y):
    return Fit(y, jnp.broadcast_to(jnp.arange(y.shape[-1], dtype=jnp.int32), y.shape))


@jax.jit
def from_single_positions(y, w):
    """As on accelerators: without the segments that PAV solves first on CPU."""
    fit = merge_segments(lambda m, y, w: (w * (y - m), -w), apart(y), 1, y, w)
    return Fit(*(a[..., : y.shape[-1]] for a in fit))


@pytest.mark.parametrize("weights", ["equal", "random", "uneven"])
def test_equals_scipy_and_the_blocks_of_pav(weights):
    rows = np.stack(list(museum().values()))
    w = np.broadcast_to(weights_for(weights), rows.shape)
    expected = np.stack([reference(*row) for row in zip(rows, w, strict=True)])
    with jax.enable_x64(True):
        for solve in (jax.jit(merge), from_single_positions):
            fit, by_pav = solve(jnp.asarray(rows), jnp.asarray(w)), pav(rows, w)
            np.testing.assert_allclose(fit.v, expected, rtol=1e-13, atol=1e-12)
            np.testing.assert_array_equal(fit.block, by_pav.block)


@pytest.mark.parametrize("n", [1, 3, 40, 300])
def test_any_length_in_float32(n):
    """Also across the segments that PAV solves on CPU; to rounding of the largest entry."""
    rng = np.random.default_rng(n)
    noise = rng.normal(size=(4, n))
    both_ways = jax.jit(merge), from_single_positions
    nearly_sorted = -np.sort(-noise) - 4 * np.linspace(1, 0, n)
    for y in (noise, nearly_sorted, noise + 1e4 * rng.normal(size=(4, 1))):
        y, w = y.astype(np.float32), rng.uniform(0.1, 2, size=y.shape).astype(np.float32)
        expected = np.stack([reference(*row) for row in zip(1.0 * y, 1.0 * w, strict=True)])
        scale = np.abs(y).max()
        for solve in both_ways if n < 100 else both_ways[:1]:
            np.testing.assert_allclose(solve(y, w).v, expected, atol=1e-6 * scale)


def test_depth_is_the_logarithm():
    """Eight times the row costs three more levels, each of one root search."""

    def loops(n):
        row = jnp.zeros(n)
        return str(jax.make_jaxpr(from_single_positions)(row, row)).count("while[")

    assert loops(64) - loops(8) == 3


@pytest.mark.parametrize("p", [2.0, 1.5, 4 / 3, 3.0])
def test_weights_of_any_sign_and_order(p):
    """What a soft sort asks for: there the weights are the entries of x."""
    rng = np.random.default_rng(3)
    s, w = rng.normal(size=9), 3 * rng.normal(size=9)
    with jax.enable_x64(True):
        v = isotonic_pnorm(s, w, lam=0.7, p=p, solver="merge")
        np.testing.assert_allclose(v, signed_min_max(s, w, 0.7, p), atol=1e-12)
    np.testing.assert_allclose(
        signed_min_max(np.sort(s)[::-1], np.abs(w), 0.7, p),
        min_max(np.sort(s)[::-1], np.abs(w), 0.7, p, False),
        atol=1e-9,
    )


def signed_min_max(s, w, lam, p):
    """The min-max formula for weights that may be negative: a wider bracket for its bisections."""
    reach = lam * np.abs(w).sum() ** (p - 1) + lam * np.abs(w).max() ** (p - 1) + np.ptp(s)
    n, position = len(s), np.arange(len(s))
    inside = (position[:, None, None] <= position) & (position <= position[None, :, None])
    low, high = np.full((n, n), s.min() - reach), np.full((n, n), s.max() + reach)
    for _ in range(200):
        g = (low + high) / 2
        d = (s - g[..., None]) / lam
        above = (inside * np.sign(d) * np.abs(d) ** (1 / (p - 1))).sum(-1) > inside @ w
        low, high = np.where(above, g, low), np.where(above, high, g)
    return np.asarray([min(high[a, i:].max() for a in range(i + 1)) for i in range(n)])
