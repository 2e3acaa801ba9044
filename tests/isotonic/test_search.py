"""Batches of many rows, whose last ones are solved apart: the same as each row among few."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from isotonic.power_links import MagnitudeLink, MaskLink
from isotonic.rows import LARGE, row_sum, row_total
from isotonic.search import MANY_ROWS
from isotonic.threshold import threshold
from tests.isotonic.test_threshold import STRENGTHS, kinds


def batch(rows, n):
    """Returns hard cases among easy ones, with a row of NaN: x `[rows, n]`, k and lam `[rows]`."""
    hard = list(itertools.product(kinds(n, np.float32).values(), [1, 2.3, n], STRENGTHS))
    x = np.random.default_rng(0).normal(size=(rows, n)).astype(np.float32)
    k, lam = np.full(rows, 2, np.float32), np.ones(rows, np.float32)
    places = np.random.default_rng(1).permutation(rows)[: len(hard)]
    for place, case in zip(places, hard, strict=True):
        x[place], k[place], lam[place] = case
    x[7, 1] = np.nan
    return x, k, lam


@pytest.mark.parametrize("n", [8, LARGE // MANY_ROWS])
@pytest.mark.parametrize("link", [MaskLink(2.0), MaskLink(4 / 3), MagnitudeLink(1.5)])
def test_a_row_among_many_is_solved_as_among_few(link, n):
    x, k, lam = batch(MANY_ROWS, n)
    if isinstance(link, MagnitudeLink):
        x = np.where((x == 0) | (np.abs(x) == np.inf), -np.inf, np.abs(x))

    @jax.jit
    def solve(x, k, lam):
        h, tau = threshold(link, x, k, lam)
        if isinstance(link, MaskLink):
            return h
        # Selections of a wide link have no digits; what is shrunk by them has those of its scores.
        out = jnp.where((h > 0) & (h < 1), h * tau[:, None] + (x - tau[:, None]), h * x)
        return jnp.where(x < 0, 0, out / x.max(-1, keepdims=True))

    found = solve(x, k, lam)
    few = [solve(*part) for part in zip(*(np.split(a, 2) for a in (x, k, lam)), strict=True)]
    np.testing.assert_allclose(found, np.concatenate(few), atol=2e-6)
    assert np.isnan(found).any(-1).sum() == np.isnan(x).any(-1).sum() == 1


@pytest.mark.slow
def test_many_rows_on_several_devices():
    x, k, lam = batch(2 * MANY_ROWS, 8)
    spread = PartitionSpec("d")

    def solve(*rows):
        return threshold(MaskLink(4 / 3), *rows).h

    expected = jax.jit(solve)(x, k, lam)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
        rows = (jax.device_put(a, NamedSharding(mesh, spread)) for a in (x, k, lam))
        mapped = jax.shard_map(solve, mesh=mesh, in_specs=spread, out_specs=spread)
        for found in jax.jit(lambda *rows, f=mapped: (solve(*rows), f(*rows)))(*rows):
            np.testing.assert_allclose(found, expected, atol=2e-6)


def test_totals_are_sums():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, LARGE // 4)), jnp.float32)
    for part in (x, x[:, :8], x[:, :6], x[0, :4]):
        np.testing.assert_allclose(row_total(part), row_sum(part), atol=1e-3)
