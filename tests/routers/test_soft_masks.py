"""LapSum, both forms of SOFT, and DFTopK: against slow references and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from routers import (
    lapsum_topk_mask,
    sigmoid_topk_mask,
    sinkhorn_topk_mask,
    sorted_sinkhorn_topk,
)
from tests.derivatives import check_derivatives

REAL = {"lapsum": lapsum_topk_mask, "sinkhorn": sinkhorn_topk_mask}  # k real, per row, traced
WHOLE = {"sigmoid": sigmoid_topk_mask, "sorted": sorted_sinkhorn_topk}
ALL = REAL | WHOLE
CDF = {
    "lapsum": lambda u: np.where(u > 0, 1 - np.exp(-np.abs(u)) / 2, np.exp(-np.abs(u)) / 2),
    "sinkhorn": expit,
}


jitted_sorted = jax.jit(sorted_sinkhorn_topk, static_argnames=("k", "tol"))


def scores(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def bisected(cdf, x, k, lam):
    low, high = x.min() - 50 * lam, x.max() + 50 * lam
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if cdf((x - tau) / lam).sum() > k else (low, tau)
    return cdf((x - tau) / lam)


def plain_sinkhorn(x, k, lam):
    """The plan of the docstring's program by alternating scalings of its rows and columns."""
    keep = k if k == len(x) else k + 1
    kernel = np.exp(-((x[:, None] - np.arange(k, -1, -1)[:keep]) ** 2) / (2 * lam))
    mass = np.append(np.ones(k), len(x) - k)[:keep]
    column = np.ones(keep)
    for _ in range(5000):
        row = 1 / (kernel @ column)
        column = mass / (row @ kernel)
    return (row[:, None] * kernel * column)[:, :k]


def sigmoid_formula(x, k, lam):
    return expit((x - np.sort(x)[::-1][k - 1 : k + 1].mean()) / lam)


REFERENCES = {
    **{name: partial(bisected, cdf) for name, cdf in CDF.items()},
    "sigmoid": sigmoid_formula,
    "sorted": plain_sinkhorn,
}


def weighted(operator, **fixed):
    """A plain sum of a mask is k: its gradient hides everything."""

    def loss(x, *rest):
        y = operator(x, *rest[:-1], strength=rest[-1], **fixed)
        return (jnp.cos(1.7 * jnp.arange(y.size)).reshape(y.shape).astype(y.dtype) * y).sum()

    return loss


@pytest.mark.parametrize("name", REAL)
def test_weights_are_the_bisected_ones(name):
    x, k, lam = scores((4, 12), seed=1), np.array([2, 3.5, 11.9, 0.1]), np.array([0.02, 1, 0.4, 30])
    expected = [bisected(CDF[name], *row) for row in zip(x, k, lam, strict=True)]
    with jax.enable_x64(True):
        found = jax.jit(REAL[name])(jnp.asarray(x), k, strength=lam)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        np.testing.assert_allclose(found.sum(-1), k, rtol=1e-13)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_sorted_plan_is_that_of_plain_sinkhorn(k):
    x, lam = scores((3, 7), seed=2), np.array([0.2, 1, 5])
    expected = [plain_sinkhorn(row, k, row_lam) for row, row_lam in zip(x, lam, strict=True)]
    with jax.enable_x64(True):
        found = jitted_sorted(jnp.asarray(x), k=k, strength=lam, tol=1e-11)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    if k == 1:
        mask = [bisected(expit, row, 1, row_lam) for row, row_lam in zip(x, lam, strict=True)]
        np.testing.assert_allclose(found[..., 0], mask, atol=1e-9)


def test_sorted_needs_few_iterations_at_any_strength():
    """Sinkhorn's own steps left errors of up to 8e-4 here after a thousand."""
    spread = scores((8, 60), seed=3)
    x = np.concatenate([spread, np.round(2 * spread), 100 * np.round(spread) + 0.01 * spread])
    strengths = np.array([1e-6, 0.01, 0.1, 1, 30, 1e4])[:, None]
    with jax.enable_x64(True):
        found = jitted_sorted(jnp.tile(x, (6, 1, 1)), k=20, strength=strengths, tol=1e-9)
        np.testing.assert_allclose(found.sum(-2), 1, atol=1e-8)


def test_sorted_places_are_hard_where_the_gaps_allow_and_rows_do_not_meet():
    x = jnp.asarray([[9.0, -3.0, 4.0, 0.0, 6.5], [0.3, 0.1, -0.4, 0.2, 0.0]])
    found = jitted_sorted(x, k=3, strength=0.05)
    places = [[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(found[0], places, atol=2 * np.exp(-2.5 / 2 / 0.05))
    np.testing.assert_allclose(found.sum(1), 1, atol=3e-6)
    others = jitted_sorted(x[jnp.array([1, 1])], k=3, strength=0.05)
    np.testing.assert_array_equal(found[1], others[1])


def test_sigmoid_is_the_formula_with_the_closed_form_jacobian():
    x, k, lam = scores(9, seed=3), 4, 0.7
    order = np.argsort(-x)
    expected = sigmoid_formula(x, k, lam)
    slope = expected * (1 - expected) / lam
    jacobian = np.diag(slope)
    jacobian[:, order[3:5]] -= slope[:, None] / 2
    with jax.enable_x64(True):
        f = partial(sigmoid_topk_mask, k=k, strength=lam)
        y, *found = jax.jit(lambda x: (f(x), jax.jacfwd(f)(x), jax.jacrev(f)(x)))(jnp.asarray(x))
    np.testing.assert_allclose(y, expected, atol=1e-14)
    np.testing.assert_allclose(found, [jacobian] * 2, atol=1e-14)
    assert (np.argsort(-expected)[:k] == order[:k]).all()
    assert abs(expected.sum() - k) > 0.1


@pytest.mark.parametrize("name", ALL)
def test_derivatives_equal_central_differences(name):
    """In x, strength and, where k is real, in k."""
    x = scores(6, seed=4)
    with jax.enable_x64(True):
        fixed = {"sigmoid": {"k": 2}, "sorted": {"k": 2, "tol": 1e-13}}.get(name, {})
        point = (x, 2.6, 0.8) if name in REAL else (x, 0.8)
        check_derivatives(weighted(ALL[name], **fixed), point)


ROWS = {
    "ties": [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5],
    "equal": [0.7] * 8,
    "absent": [1, -np.inf, 0.5, -np.inf, 0.2, 0.1, -np.inf, 3],
    "mostly absent": [1, *[-np.inf] * 7],
    "nothing": [-np.inf] * 8,
    "infinite": [np.inf, 1, np.inf, 0, np.inf, np.inf, 0.5, -np.inf],
    "already hard": [9, 8, 7, 1, 0.5, 0, -1, -2],
    "outlier": [1e30, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    "huge": list(1e30 * np.linspace(1, -1, 8)),
    "tiny": list(1e-30 * np.linspace(1, -1, 8)),
}


@pytest.mark.parametrize("name", ALL)
def test_finite_and_of_the_right_sum_on_degenerate_rows(name):
    cases = [(row, lam) for row in ROWS.values() for lam in (1e-3, 1, 1e3)]
    x, lam = (np.asarray(a, np.float32) for a in zip(*cases, strict=True))

    def everything(x, lam, k):
        y, push = jax.linearize(lambda x, lam: ALL[name](x, k, strength=lam), x, lam)
        pull = jax.linear_transpose(push, x, lam)
        weights = jnp.cos(1.7 * jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return y, push(jnp.ones_like(x), jnp.ones_like(lam)), pull(weights)

    everything = jax.jit(everything, static_argnums=() if name in REAL else 2)
    for k in (3, 8):
        found = everything(x, lam, k)
        for leaf in jax.tree.leaves(found):
            assert np.isfinite(leaf).all()
        mask = found[0].sum(-1) if name == "sorted" else found[0]
        assert (mask[np.isneginf(x)] == 0).all()
        if name != "sigmoid":
            total = np.minimum(k, (x > -np.inf).sum(-1))
            np.testing.assert_allclose(mask.sum(-1), total, rtol=1e-5)
        elif k == 8:
            np.testing.assert_array_equal(mask, x > -np.inf)


@pytest.mark.parametrize("name", ALL)
def test_axes_and_dtypes(name):
    x = jnp.asarray(scores((2, 5, 3), seed=5), jnp.bfloat16)
    lam = np.array([[0.5, 1, 2], [3, 4, 5]])
    run = jax.jit(ALL[name], static_argnames=("k", "axis"))
    found = run(x, k=2, strength=lam, axis=1)
    assert found.dtype == jnp.bfloat16
    for i, j in np.ndindex(2, 3):
        expected = REFERENCES[name](np.asarray(x, np.float64)[i, :, j], 2, lam[i, j])
        np.testing.assert_allclose(found[i, :, j].astype(np.float32), expected, atol=2**-8)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        *((name, {"k": 6}, "k must be above 0 and at most 5, the length of axis") for name in ALL),
        *((name, {"strength": 0.0}, "strength must be above 0; got 0.0") for name in ALL),
        *(
            (name, {"x": np.ones(5, complex)}, "scores must be real numbers, not complex")
            for name in ALL
        ),
        *((name, {"k": 2.5}, "k must be a whole number.* not traced; got 2.5") for name in WHOLE),
    ],
)
def test_errors_say_what_to_type(name, change, message):
    with pytest.raises(ValueError, match=message):
        ALL[name](**{"x": np.ones(5, np.float32), "k": 2, **change})
