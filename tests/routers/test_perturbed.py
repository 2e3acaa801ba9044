"""Operators smoothed by noise: expectations in closed form, to four standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from routers import perturbed_kth_value, perturbed_topk_mask, topk_hinge_loss
from tests.derivatives import check_derivatives

KEY = jax.random.key(0, impl="rbg")  # which compiles four times faster than the default
OPERATORS = {"mask": perturbed_topk_mask, "value": perturbed_kth_value}


def scores(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def replicates(f, number=200):
    """f of many keys: their mean, and its standard error."""
    found = jax.jit(jax.vmap(f))(jax.random.split(jax.random.key(0), number))
    found = np.concatenate([np.reshape(leaf, (number, -1)) for leaf in jax.tree.leaves(found)], 1)
    return found.mean(0), found.std(0) / np.sqrt(number)


def assert_within_errors(f, expected, smallest):
    """Four standard errors either way, which are themselves small enough to tell."""
    mean, error = replicates(f)
    assert error.max() < smallest
    assert (np.abs(mean - expected) <= 4 * error + 1e-6).all(), (mean, expected, error)


def test_mask_of_two_items_and_its_derivatives_are_unbiased():
    """P(x_1 + lam Z_1 > x_2 + lam Z_2) is a normal probability; an absent third changes nothing."""
    x, lam = jnp.asarray([0.5, -np.inf, -0.2]), 0.8
    spread = lam * np.sqrt(2)
    a = 0.7 / spread
    density = norm.pdf(a)
    value = [norm.cdf(a), 0, norm.cdf(-a)]
    slopes = [density / spread, 0, -density / spread, -density * a / lam]

    def estimates(key):
        def first(x, lam):
            y = perturbed_topk_mask(x, 1, key, num_samples=1000, strength=lam)
            return y[0], y

        (_, y), gradients = jax.value_and_grad(first, (0, 1), has_aux=True)(x, lam)
        return y, gradients

    assert_within_errors(estimates, [*value, *slopes], 5e-3)


def test_derivative_of_the_mask_is_that_of_the_mean_mask():
    """Against differences of means over the same draws: their bias is some step^2/6 = 4e-4."""
    x, direction, step = jnp.asarray(scores(5)), jnp.asarray(scores(5, seed=1)), 0.05

    def disagreement(key):
        def mask(x):
            return perturbed_topk_mask(x, 2, key, num_samples=1000, strength=0.7)

        up, down = (mask(x + sign * step * direction) for sign in (1, -1))
        return jax.jvp(mask, (x,), (direction,))[1] - (up - down) / (2 * step)

    mean, error = replicates(disagreement)
    assert error.max() < 1e-2
    assert (np.abs(mean) < 4 * error + 4e-4).all()


def test_largest_of_two_and_its_derivatives_are_unbiased():
    """Clark's formula for the mean of the larger of two normal variables."""
    x, lam = jnp.asarray([0.5, -0.2]), 0.8
    spread = lam * np.sqrt(2)
    a = 0.7 / spread
    value = 0.5 * norm.cdf(a) - 0.2 * norm.cdf(-a) + spread * norm.pdf(a)
    slopes = [norm.cdf(a), norm.cdf(-a), np.sqrt(2) * norm.pdf(a)]

    def estimates(key):
        def largest(x, lam):
            return perturbed_kth_value(x, 1, key, num_samples=1000, strength=lam)

        return jax.value_and_grad(largest, (0, 1))(x, lam)

    assert_within_errors(estimates, [value, *slopes], 5e-3)


def test_forward_and_reverse_derivatives_of_the_mask_agree():
    x, lam = jnp.asarray(scores((2, 6))), jnp.asarray([0.5, 2.0])

    def mask(x, lam):
        return perturbed_topk_mask(x, 2, KEY, num_samples=20, strength=lam)

    forward, reverse = jax.jit(
        lambda *point: (jax.jacfwd(mask, (0, 1))(*point), jax.jacrev(mask, (0, 1))(*point))
    )(x, lam)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), forward, reverse)
    # Rows do not move each other, and the sum stays k.
    np.testing.assert_array_equal(forward[0][0, :, 1], 0)
    np.testing.assert_allclose(forward[0].sum(1), 0, atol=1e-5)


ROWS = [
    [1, 1, 1, 1, 0.5, 0.5],
    [0.7] * 6,
    [1, -np.inf, 0.5, -np.inf, 0.2, -np.inf],
    [9, 8, 7, 1, 0.5, 0],
    [1e30, 1, 1e30, 1e30, 1e30, -1e30],
]


@pytest.mark.parametrize("k", [2, 6])
def test_finite_and_of_the_right_sum_on_degenerate_rows(k):
    x = jnp.asarray(ROWS)

    @jax.jit
    def everything(x, lam):
        def both(x, lam):
            return [f(x, k, KEY, num_samples=9, strength=lam) for f in OPERATORS.values()]

        values, push = jax.linearize(both, x, lam)
        weights = [jnp.cos(1.7 * jnp.arange(y.size)).reshape(y.shape) for y in values]
        tangents = (jnp.ones_like(x), jnp.ones_like(lam))
        return *values, (push(*tangents), jax.linear_transpose(push, x, lam)(weights))

    for lam in (1e-3, 1.0):
        y, value, derivatives = everything(x, jnp.float32(lam))
        count = np.isfinite(x).sum(-1)
        np.testing.assert_allclose(y.sum(-1), np.minimum(k, count), rtol=1e-6)
        assert (np.isfinite(value) == (count >= k)).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(derivatives))


@pytest.mark.parametrize("name", OPERATORS)
def test_axes_and_dtypes(name):
    x, lam = jnp.asarray(scores((2, 5, 3)), jnp.bfloat16), np.array([[0.5, 1, 2], [3, 4, 5]])
    run = jax.jit(OPERATORS[name], static_argnames=("k", "axis"))
    found = run(x, k=2, key=KEY, strength=lam, axis=1)
    assert found.dtype == jnp.bfloat16
    rows = run(x.swapaxes(1, 2).astype(jnp.float32), k=2, key=KEY, strength=lam)
    expected = rows.swapaxes(1, 2) if name == "mask" else rows
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8)


def test_hinge_loss_is_the_formula_where_noise_is_negligible():
    s, labels = scores((4, 8), seed=2), np.array([0, 3, 7, 3])
    margins = np.linspace(0.2, 2, 8)
    own, next_best = s[np.arange(4), labels], np.sort(s, -1)[:, -4]
    run = jax.jit(topk_hinge_loss, static_argnames="k")
    for m, chosen in ((None, 1), (margins, margins[labels])):
        loss = run(s, labels, KEY, k=3, strength=1e-6, margins=m)
        np.testing.assert_allclose(loss, np.maximum(chosen + next_best - own, 0), atol=1e-5)


def test_derivatives_of_the_loss_and_of_the_value():
    with jax.enable_x64(True):
        labels = jnp.asarray([1, 0, 5])

        def loss(s, lam, margins):
            return topk_hinge_loss(s, labels, KEY, k=2, strength=lam, margins=margins).sum()

        check_derivatives(loss, (scores((3, 6)), 0.4, np.ones(6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, "k must be above 0 and at most 5, the length of axis -1; got 6"),
        ({"k": 1.5}, "k must be a whole number"),
        ({"strength": 0.0}, "strength must be above 0; got 0.0"),
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"x": np.ones(5, complex)}, "scores must be real numbers, not complex"),
    ],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_errors_say_what_to_type(name, change, message):
    with pytest.raises(ValueError, match=message):
        OPERATORS[name](**{"x": np.ones(5, np.float32), "k": 2, "key": KEY, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k must be at least 1 and below 5, the classes; got 5"),
        ({"labels": np.ones(2)}, r"labels must be whole numbers \(2,\), not float.* \(2,\)"),
        ({"labels": np.ones(3, int)}, r"labels must be whole numbers \(2,\), not int.* \(3,\)"),
        ({"margins": np.ones(2)}, r"margins must be of shape \(5,\), not \(2,\)"),
    ],
)
def test_errors_of_the_loss_say_what_to_type(change, message):
    arguments = {"scores": np.ones((2, 5), np.float32), "labels": np.ones(2, int), "k": 2, **change}
    with pytest.raises(ValueError, match=message):
        topk_hinge_loss(**arguments, key=KEY)


@pytest.mark.parametrize("k", [2, 9])  # maxima one by one, and a search
def test_the_mask_is_the_mean_over_draws(k):
    rng, key = np.random.default_rng(0), jax.random.key(1)
    x = rng.normal(size=(4, 15)).astype(np.float32)
    x[1, :5], x[2, 0] = -np.inf, np.nan
    noisy = x + 0.5 * np.asarray(jax.random.normal(key, (20, 4, 15), jnp.float32))
    expected = (np.argsort(np.argsort(-noisy, -1), -1) < k).mean(0)
    expected[2] = np.nan
    found = perturbed_topk_mask(x, k, key, num_samples=20, strength=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
