"""The table of masks: sums, order, and what makes their widths comparable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.masks import MASKS, soft_mask

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 12))


@pytest.mark.parametrize("name", MASKS)
def test_rows_sum_to_k_and_follow_their_items(name):
    mask = np.asarray(soft_mask(name, X, 4, 0.3, KEY))
    if MASKS[name].sums_to_k:
        np.testing.assert_allclose(mask.sum(-1), 4, rtol=1e-5)
    if name != "perturbed":  # whose draws belong to places
        order = np.random.default_rng(0).permutation(12)
        moved = soft_mask(name, X[:, order], 4, 0.3, KEY)
        np.testing.assert_allclose(moved, mask[:, order], atol=2e-6)
    hard = np.asarray(soft_mask("hard", X, 4, 1.0))
    np.testing.assert_allclose(soft_mask(name, X, 4, 1e-4, KEY), hard, atol=1e-6)
    if not MASKS[name].exact_zeros:
        assert (mask > 0).all()
    slope = jax.grad(lambda x: (soft_mask(name, x, 4, 0.3, KEY) * jnp.cos(x)).sum())(X)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


@pytest.mark.parametrize("name", ["sparse", "sparse_smooth", "lapsum", "sinkhorn"])
def test_a_width_is_the_standard_deviation_of_the_noise(name):
    """Half of many items are taken, at the level 0: an item's weight is F of its own score."""
    u = jnp.linspace(-30, 30, 60_001)
    mask = soft_mask(name, u, 30_000.5, 1.0)
    density = np.diff(np.asarray(mask, np.float64))
    middle = np.asarray(u[1:] + u[:-1], np.float64) / 2
    mean = (density * middle).sum() / density.sum()
    spread = np.sqrt((density * (middle - mean) ** 2).sum() / density.sum())
    np.testing.assert_allclose(spread, 1, rtol=2e-3)


def test_straight_through():
    def loss(x):
        return (soft_mask("hard", x, 1, 0.5) * jnp.array([1.0, 2.0, 3.0])).sum()

    value, slope = jax.value_and_grad(loss)(jnp.array([0.0, 5.0, 1.0]))
    assert value == 2
    np.testing.assert_array_equal(slope, [2, 4, 6])
