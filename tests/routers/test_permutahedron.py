"""Soft ranks, soft sorts and projections onto permutahedra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from routers.permutahedron import permutahedron_projection, soft_rank, soft_sort
from tests.derivatives import check_derivatives

N = 7
X = np.random.default_rng(0).normal(size=(3, N))
norms = pytest.mark.parametrize("p", [2.0, 4 / 3])
operators = pytest.mark.parametrize("operator", [soft_rank, soft_sort])


@norms
def test_projection_solves_its_program(p):
    """Against SLSQP on the 2^n - 2 inequalities that define the permutahedron."""
    rng = np.random.default_rng(1)
    z, w, lam = rng.normal(size=4), np.abs(rng.normal(size=4)), 0.8
    subsets = np.asarray([[m >> i & 1 for i in range(4)] for m in range(1, 15)])
    most = np.asarray([np.sort(w)[::-1][: int(row.sum())].sum() for row in subsets])
    inside = [
        optimize.LinearConstraint(subsets, ub=most),
        optimize.LinearConstraint(np.ones((1, 4)), w.sum(), w.sum()),
    ]

    def cost(y):
        return (lam / p) * (np.abs(y) ** p).sum() - z @ y

    optimum = optimize.minimize(
        cost, np.full(4, w.mean()), constraints=inside, method="SLSQP", tol=1e-12
    )
    with jax.enable_x64(True):
        y = np.asarray(permutahedron_projection(z, w, p=p, strength=lam))
    np.testing.assert_allclose(y, optimum.x, atol=1e-5)
    np.testing.assert_allclose(y.sum(), w.sum(), rtol=1e-12)


@pytest.mark.parametrize("descending", [False, True])
@norms
def test_small_strengths_sort_and_rank(p, descending):
    with jax.enable_x64(True):
        sign = -1 if descending else 1
        ranks = soft_rank(X, p=p, strength=1e-6, descending=descending)
        expected = np.stack([stats.rankdata(sign * row) for row in X])
        np.testing.assert_allclose(ranks, expected, atol=1e-9)
        values = soft_sort(X, p=p, strength=1e-9, descending=descending)
        np.testing.assert_allclose(values, sign * np.sort(sign * X), atol=1e-6)
        tied = soft_rank(jnp.asarray([1.0, 3.0, 1.0]), p=p, strength=1e-6, descending=descending)
        np.testing.assert_allclose(tied, [1.5, 3, 1.5] if not descending else [2.5, 1, 2.5])


@operators
@norms
def test_derivatives_equal_finite_differences(p, operator):
    with jax.enable_x64(True):
        c = np.cos(1.7 * np.arange(X.size)).reshape(X.shape)
        f = lambda x, strength: (c * operator(x, p=p, strength=strength)).sum()  # noqa: E731
        check_derivatives(f, (X, 0.7), rtol=1e-5)


@operators
def test_solvers_agree(operator):
    values = [operator(X.astype(np.float32), solver=s) for s in (None, "pav", "merge", "dykstra")]
    for value in values[1:]:
        np.testing.assert_allclose(value, values[0], atol=5e-5)  # Dykstra stops at 1e-6 a pair


@pytest.mark.parametrize(("p", "operator"), [(2.0, soft_sort), (4 / 3, soft_rank)])
def test_finite_on_rows_that_break_others(p, operator):
    rows = np.asarray([[0] * N, [1, 1, 2, 2, 3, 3, 3], np.arange(N) * 1e6, np.arange(N) * 1e-6])

    @jax.jit
    def both(x):
        return jax.vmap(jax.value_and_grad(lambda x: (jnp.arange(N) * operator(x, p=p)).sum()))(x)

    for value in both(jnp.asarray(rows, jnp.float32)):
        assert jnp.isfinite(value).all()


def test_axes_and_dtypes():
    x = jnp.asarray(X, jnp.bfloat16)
    assert soft_rank(x).dtype == soft_sort(x).dtype == jnp.bfloat16
    columns = soft_sort(jnp.asarray(X.T, jnp.float32), axis=0)
    np.testing.assert_allclose(columns.T, soft_sort(jnp.asarray(X, jnp.float32)), rtol=1e-6)
    with pytest.raises(ValueError, match="above 1"):
        soft_rank(X, p=1.0)
