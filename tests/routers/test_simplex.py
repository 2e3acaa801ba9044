"""Sparsemax and entmax: against the sort of the paper, bisection, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routers import entmax, sparsemax
from tests.derivatives import check_derivatives


def sorted_projection(x):
    """Algorithm 1 of Martins & Astudillo."""
    s = np.sort(x)[::-1]
    totals, ranks = np.cumsum(s), np.arange(1, len(x) + 1)
    size = ranks[1 + ranks * s > totals][-1]
    return np.maximum(x - (totals[size - 1] - 1) / size, 0)


def bisected(x, alpha):
    scaled = (alpha - 1) * x
    low, high = scaled.max() - 1, scaled.max()
    for _ in range(100):
        tau = (low + high) / 2
        y = np.maximum(scaled - tau, 0) ** (1 / (alpha - 1))
        low, high = (tau, high) if y.sum() > 1 else (low, tau)
    return y


def test_sparsemax_is_the_sorted_projection():
    x = np.random.default_rng(0).normal(size=(6, 16)) * np.array([[0.01, 0.3, 1, 2, 5, 100]]).T
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(sparsemax)(jnp.asarray(x)))
    expected = [sorted_projection(row) for row in x]
    np.testing.assert_allclose(found, expected, atol=1e-13)
    assert ((found == 0) == (np.asarray(expected) == 0)).all()


@pytest.mark.parametrize("alpha", [1.1, 1.5, 3.0])
def test_entmax_is_the_bisected_formula(alpha):
    x = np.random.default_rng(1).normal(size=(3, 12)) * np.array([[0.3, 1, 5]]).T
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(lambda x: entmax(x, alpha=alpha, axis=0))(jnp.asarray(x.T)))
    np.testing.assert_allclose(found.T, [bisected(row, alpha) for row in x], atol=1e-12)
    np.testing.assert_allclose(found.sum(0), 1, rtol=1e-13)


def test_entmax_tends_to_softmax():
    x = jnp.asarray(np.random.default_rng(2).normal(size=8), jnp.float32)
    found = jax.jit(lambda x: entmax(x, alpha=1.001))(x)
    np.testing.assert_allclose(found, jax.nn.softmax(x), atol=2e-3)


def test_derivatives_equal_central_differences():
    with jax.enable_x64(True):
        x = np.random.default_rng(3).normal(size=8)
        check_derivatives(lambda x: (jnp.cos(1.7 * jnp.arange(8)) * entmax(x)).sum(), (x,))


def test_finite_on_degenerate_rows():
    x = [
        [1, 1, 0.5, 0.5],
        [0.7] * 4,
        [1, -np.inf, 0.5, -np.inf],
        [9, 1, 0, -1],
        [1e30, 1, 1e30, -1e30],
        [-np.inf] * 4,
    ]

    @jax.jit
    def everything(x):
        y, push = jax.linearize(entmax, x)
        pull = jax.linear_transpose(push, x)
        return y, push(jnp.ones_like(x)), pull(jnp.cos(jnp.arange(24.0)).reshape(6, 4))

    found = everything(jnp.asarray(x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    np.testing.assert_allclose(found[0].sum(-1), [1, 1, 1, 1, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(found[0][3:5], [[1, 0, 0, 0], [0.5, 0, 0.5, 0]], atol=1e-7)


def test_half_precision_is_solved_in_single():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 8)), jnp.bfloat16)
    found = jax.jit(sparsemax)(x)
    assert found.dtype == jnp.bfloat16
    expected = [sorted_projection(row) for row in np.asarray(x, np.float64)]
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=2**-9)


@pytest.mark.parametrize("alpha", [1.0, 0.5, np.inf])
def test_errors_say_what_to_type(alpha):
    with pytest.raises(ValueError, match="alpha must be a finite number above 1, not"):
        entmax(np.ones(3, np.float32), alpha=alpha)
    with pytest.raises(ValueError, match="scores must be real numbers, not complex"):
        sparsemax(np.ones(3, complex))
