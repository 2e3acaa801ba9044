"""The partial Fenchel-Young top-k loss: known values, its limits, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from routers import sparse_topk_loss, sparse_topk_mask, sparsemax, topk_hinge_loss
from routers.perturbed import rarity_margins
from tests.derivatives import check_derivatives

THETA = jnp.asarray([2, 1.4, 1.1, 0.9, -0.5])
EACH = jnp.arange(5)
LOSS = jax.jit(sparse_topk_loss, static_argnums=2, static_argnames="p")


def each(theta, k, **settings):
    """The loss of every label."""
    theta = jnp.asarray(theta)
    return LOSS(jnp.tile(theta, (len(theta), 1)), jnp.arange(len(theta)), k, **settings)


def test_known_values():
    np.testing.assert_allclose(each(THETA, 2), [0, 0.1275, 0.39, 0.59, 1.99], atol=1e-6)
    np.testing.assert_allclose(each(THETA, 2, strength=1e-6), [0, 0, 0.3, 0.5, 1.9], atol=1e-5)
    assert each(THETA, 2)[0] == 0 and (each(THETA, 2, strength=1e-6)[:2] == 0).all()


def test_k_of_one_is_the_sparsemax_loss():
    """Martins and Astudillo 2016, (26): -s_y + sum over the support of (s^2 - tau^2)/2, + 1/2."""
    theta = np.random.default_rng(0).normal(size=5)
    p = np.asarray(sparsemax(jnp.asarray(theta, jnp.float32)), np.float64)
    tau = (theta - p)[p > 0].mean()
    expected = -theta + ((theta**2 - tau**2) * (p > 0)).sum() / 2 + 0.5
    np.testing.assert_allclose(each(theta.astype(np.float32), 1), expected, atol=1e-6)


def test_it_is_the_difference_of_two_maxima():
    """F_k(theta) - [theta_y - lam/p + F_{k-1}(theta without y)], evaluated as it stands."""
    rng = np.random.default_rng(1)
    theta = rng.normal(size=5).astype(np.float32)
    for k, p, lam in ((3, 1.5, 0.7), (4, 2.0, 2.0)):

        def best(x, k, p=p, lam=lam):
            m = np.asarray(sparse_topk_mask(jnp.asarray(x), k, p=p, strength=lam), np.float64)
            return (x * m).sum() - lam / p * (m**p).sum()

        rest = [theta[y] - lam / p + best(np.delete(theta, y), k - 1) for y in range(5)]
        found = each(theta, k, p=p, strength=lam)
        np.testing.assert_allclose(found, best(theta, k) - np.asarray(rest), atol=2e-6)
        assert (found >= 0).all()


def test_a_shift_of_all_scores_changes_nothing():
    for shift in (1e3, -1e3):
        np.testing.assert_allclose(each(THETA + shift, 2), each(THETA, 2), atol=5e-4)


def test_gradient_is_that_of_the_masks_sums_to_0_and_never_rests_on_a_mistake():
    labels, tiled = EACH, jnp.tile(THETA, (5, 1))
    slopes = jax.grad(lambda x: sparse_topk_loss(x, labels, 2).sum())(tiled)
    np.testing.assert_allclose(slopes.sum(-1), np.zeros(5), atol=1e-6)
    assert (slopes[0] == 0).all() and (jnp.diag(slopes)[1:] < 0).all()
    mask = sparse_topk_mask(THETA, 2)
    rest = sparse_topk_mask(THETA.at[3].set(-jnp.inf), 1)
    np.testing.assert_allclose(slopes[3], mask - rest - jnp.eye(5)[3], atol=1e-6)


def test_derivatives():
    with jax.enable_x64(True):
        x, weights = np.random.default_rng(2).normal(size=(2, 5)), jnp.asarray([1.0, 0.7])

        def weighted(x, lam):
            return (sparse_topk_loss(x, jnp.asarray([2, 0]), 2, strength=lam) * weights).sum()

        check_derivatives(weighted, (x, 0.8))


def test_wrong_arguments():
    for k in (0, 5, 1.5):
        with pytest.raises(ValueError, match="k must be"):
            sparse_topk_loss(THETA, 0, k)
    with pytest.raises(ValueError, match="labels must be from 0 to 4"):
        sparse_topk_loss(THETA, 5, 2)
    wrong = jax.jit(lambda label: sparse_topk_loss(THETA, label, 2))(7)
    assert np.isnan(wrong)
    half = sparse_topk_loss(THETA.astype(jnp.bfloat16), 3, 2)
    assert half.dtype == jnp.bfloat16 and float(half) == pytest.approx(0.59, rel=0.01)


def test_margins_of_rare_classes():
    expected = [0.3, 0.3 * (17 / 23) ** 0.25, 0.3 * (17 / 55) ** 0.25]
    np.testing.assert_allclose(rarity_margins((17, 23, 55), 0.3), expected, rtol=1e-6)
    assert rarity_margins((0, 16), 0.2).tolist() == pytest.approx([0.2, 0.1])


def test_hinge_of_the_authors_examples():
    scores = jnp.asarray([[2, 1.5, -3], [7.5, 4, -1.5]])
    key = jax.random.key(0)
    found = topk_hinge_loss(scores, jnp.asarray([0, 2]), key, k=2, strength=1e-6)
    np.testing.assert_allclose(found, [0, 1], atol=1e-4)
