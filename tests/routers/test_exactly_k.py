"""Sets of exactly k items: marginals against all sets, samples against the marginals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from routers import exactly_k_marginals, exactly_k_sample, sinkhorn_topk_mask
from tests.derivatives import check_derivatives


def enumerate_sets(x, k):
    """Returns masks of all sets of k items, their probabilities, and the marginals."""
    masks = np.array([m for m in itertools.product((0, 1), repeat=len(x)) if sum(m) == k])
    logits = np.where(masks, x, 0).sum(-1)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return masks, weights, weights @ masks


ROWS = {
    "normal": np.random.default_rng(0).normal(size=12),
    "wide": 30 * np.random.default_rng(1).normal(size=10),
    "ties": np.array([2.0, 2, 2, 1, 1, 1, 0, 0, 0]),
    "equal": np.full(7, 3.0),
    "far": 1e4 + np.random.default_rng(2).normal(size=8),
    "nearly hard": np.array([40.0, 0, -0.5, -41, 39]),
    "low ties": np.array([0.0, -3e3, -3e3, -3e3]),
}


SLOW = ("wide", "equal", "far")  # a program for each length
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ROWS]


@pytest.mark.parametrize("name", NAMES)
def test_marginals_are_sums_over_all_sets(name):
    x = ROWS[name]
    for k in (1, 3, len(x) - 1, len(x)):
        _, _, expected = enumerate_sets(x, k)
        y = np.asarray(exactly_k_marginals(np.float32(x), k), np.float64)
        # In float32 scores of 1e4 are known to 5e-4.
        np.testing.assert_allclose(y, expected, atol=1e-3 if name == "far" else 1e-6)
        np.testing.assert_allclose(y.sum(), k, rtol=2e-6)
    with jax.enable_x64(True):
        expected = enumerate_sets(x, 3)[2]
        np.testing.assert_allclose(exactly_k_marginals(x, 3), expected, atol=1e-12)


def test_derivatives_are_differences_and_the_covariance():
    x, k, lam = np.random.default_rng(3).normal(size=7), 3, 0.7
    weights = np.cos(1.7 * np.arange(7))

    def loss(x, lam):
        return (weights * exactly_k_marginals(x, k, strength=lam)).sum()

    masks, p, mean = enumerate_sets(x / lam, k)
    covariance = np.einsum("s,si,sj->ij", p, masks - mean, masks - mean) / lam
    with jax.enable_x64(True):
        check_derivatives(loss, (x, lam))
        jacobian = jax.jacrev(lambda x: exactly_k_marginals(x, k, strength=lam))(jnp.asarray(x))
        np.testing.assert_allclose(jacobian, covariance, atol=1e-12)
        check_derivatives(lambda x: (jax.grad(loss)(x, lam) * weights).sum(), (x,))


def test_between_the_hard_mask_and_k_over_n():
    x = np.float32([3, 1, 2, 0])
    np.testing.assert_array_equal(exactly_k_marginals(x, 2, strength=1e-3), [1, 0, 1, 0])
    np.testing.assert_allclose(exactly_k_marginals(x, 2, strength=1e6), 0.5, atol=1e-6)
    np.testing.assert_allclose(
        exactly_k_marginals(x, 1, strength=2.0), jax.nn.softmax(x / 2), rtol=1e-6
    )
    # The coins alone are only right on average.
    mean_field = sinkhorn_topk_mask(x, 2)
    assert 0.01 < np.abs(exactly_k_marginals(x, 2) - mean_field).max() < 0.2


def test_absent_items_other_axes_and_rows_apart():
    x = np.float32([[1, -np.inf, 0.5, 2], [-np.inf, 3, -np.inf, -np.inf], [0, np.nan, 1, 2]])
    y = np.asarray(exactly_k_marginals(x.T, 2, axis=0)).T
    np.testing.assert_allclose(y[0, [0, 2, 3]], enumerate_sets(x[0, [0, 2, 3]], 2)[2], atol=1e-6)
    assert y[0, 1] == 0 and y[1].tolist() == [0, 1, 0, 0] and np.isnan(y[2]).all()
    masks = np.asarray(exactly_k_sample(x, 2, jax.random.key(0)))
    assert masks[0].sum() == 2 and masks[0, 1] == 0 and masks[1].tolist() == [0, 1, 0, 0]
    assert np.isnan(masks[2]).all()
    slopes = jax.grad(lambda x: (exactly_k_marginals(x, 2)[:2] * x[1, 1]).sum())(x)
    assert np.isfinite(slopes[:2]).all()
    for k in (0, 5, 1.5):
        with pytest.raises(ValueError, match="k must be"):
            exactly_k_marginals(x, k)


@pytest.mark.parametrize("name", ["normal", "ties", "nearly hard"])
def test_samples_have_k_items_and_come_as_often_as_they_should(name):
    x, k, draws = ROWS[name][:6], 3, 20_000
    many = np.broadcast_to(np.float32(x), (draws, len(x)))
    found = np.asarray(jax.jit(lambda x: exactly_k_sample(x, k, jax.random.key(7)))(many))
    assert (found.sum(-1) == k).all() and set(np.unique(found)) == {0, 1}
    masks, p, _ = enumerate_sets(x, min(k, len(x)))
    seen = (found[:, None] == masks[None]).all(-1).sum(0)
    assert seen.sum() == draws and not seen[p < 1e-9].any()
    likely = p * draws >= 5
    rare = (seen[~likely].sum(), p[~likely].sum() * draws)
    observed, expected = np.append(seen[likely], rare[0]), np.append(p[likely] * draws, rare[1])
    kept = expected > 0.5
    assert stats.chisquare(observed[kept], expected[kept], sum_check=False).pvalue > 1e-3


def test_samples_of_rows_and_keys_differ():
    x = np.zeros((64, 16), np.float32)
    a, b = (exactly_k_sample(x, 4, jax.random.key(seed)) for seed in (0, 1))
    assert (a != b).any() and (a != a[:1]).any()
    slopes = jax.grad(lambda x: exactly_k_sample(x, 4, jax.random.key(0)).sum())(x)
    assert not np.asarray(slopes).any()
