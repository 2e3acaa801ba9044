"""Dykstra's projections, against PAV, and the honesty of what they report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isotonic.dykstra import dykstra
from isotonic.pav import pav

N = 16
solve = jax.jit(dykstra, static_argnames=("tol", "max_iter"))


def rows(seed, weighted):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(6, N))
    y[1] = np.sort(y[1])  # one pool over the whole row
    y[2] = np.sort(y[2])[::-1]  # nothing to do
    y[3] = 0.1
    return y, rng.uniform(0.5, 2, size=y.shape) if weighted else np.ones_like(y)


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_pav_with_its_blocks(weighted):
    y, w = rows(0, weighted)
    with jax.enable_x64(True):
        fit, exact = solve(y, w, tol=1e-12), jax.jit(pav)(y, w)
    np.testing.assert_allclose(fit.v, exact.v, atol=1e-9)
    assert (fit.block == exact.block).all()
    assert fit.iterations[2] == fit.iterations[3] == 0  # feasible rows are left alone


def test_error_is_bounded_by_the_residual():
    y, w = rows(1, weighted=False)
    with jax.enable_x64(True):
        exact = jax.jit(pav)(y, w).v
        for tol in (1e-2, 1e-4, 1e-6):
            fit = solve(y, w, tol=tol)
            assert (fit.residual <= tol * np.abs(y).max(-1)).all()
            error = np.abs(fit.v - exact).max(-1)
            assert (error <= (N - 1) * fit.residual + 1e-12).all()


def test_reports_that_it_has_not_converged():
    y = jnp.sort(jnp.asarray(np.random.default_rng(2).normal(size=256), jnp.float32))
    fit = solve(y, jnp.ones_like(y), max_iter=500)
    assert fit.iterations == 500
    assert fit.residual > 1e-3  # 256^2 sweeps are needed, not 500


def test_rows_do_not_depend_on_their_companions():
    y, w = (a.astype(np.float32) for a in rows(3, weighted=True))
    batch = solve(y, w)
    mapped = jax.jit(jax.vmap(dykstra))(y, w)
    for i in range(len(y)):
        alone = solve(y[i], w[i])
        assert alone.iterations == batch.iterations[i] == mapped.iterations[i]
        np.testing.assert_allclose(alone.v, batch.v[i], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(alone.v, mapped.v[i], rtol=1e-6, atol=1e-6)


def test_single_positions():
    fit = solve(jnp.asarray([[2.0], [3.0]]), jnp.ones((2, 1)))
    assert fit.v.tolist() == [[2.0], [3.0]]
    assert fit.residual.tolist() == [0.0, 0.0]
