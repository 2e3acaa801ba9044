"""Isotonic regression: every solver against scipy and scikit-learn, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from sklearn.isotonic import IsotonicRegression
from sklearn.isotonic import isotonic_regression as sklearn_regression

from isotonic.regression import SOLVERS, isotonic_regression
from tests.derivatives import check_derivatives

N = 10
# Dykstra stops at a relative residual of 1e-6, and pools of N amplify it by up to N - 1.
ATOL = {"pav": 2e-6, "dykstra": 3e-5}
RNG = np.random.default_rng(0)
ROWS = {
    "noise": RNG.normal(size=N),
    "sorted": np.sort(RNG.normal(size=N)),
    "reversed": np.sort(RNG.normal(size=N))[::-1].copy(),
    "constant": np.full(N, 0.3),
    "ties": np.round(RNG.normal(size=N)),
    "duplicates of the minimum": np.maximum(RNG.normal(size=N), 0),
}
WEIGHTS = {"none": None, "random": RNG.uniform(0.3, 2, N), "ones": np.ones(N)}

solvers = pytest.mark.parametrize("solver", sorted(SOLVERS))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", ROWS)
@solvers
def test_equals_scipy_and_sklearn(solver, name, increasing, weights):
    y, w = ROWS[name].astype(np.float32), WEIGHTS[weights]
    v = isotonic_regression(y, w, increasing=increasing, solver=solver)
    atol = ATOL.get(solver, ATOL["pav"])
    expected = optimize.isotonic_regression(y, weights=w, increasing=increasing).x
    np.testing.assert_allclose(v, expected, atol=atol)
    expected = sklearn_regression(y, sample_weight=w, increasing=increasing)
    np.testing.assert_allclose(v, expected, atol=atol)


@pytest.mark.parametrize("solver", [None, "merge"])
@pytest.mark.parametrize("increasing", [True, False])
def test_zero_weights_drop_out_as_in_sklearn(increasing, solver):
    w = np.asarray([1, 0, 2, 0, 0, 1, 0.5, 0, 1, 0.0])
    for y in ROWS.values():
        v = isotonic_regression(y.astype(np.float32), w, increasing=increasing, solver=solver)
        model = IsotonicRegression(increasing=increasing).fit(np.arange(N), y, sample_weight=w)
        np.testing.assert_allclose(v[w > 0], model.predict(np.arange(N)[w > 0]), atol=1e-5)
        assert (np.diff(v) * (1 if increasing else -1) >= 0).all()
    y = ROWS["noise"].astype(np.float32)
    nothing = isotonic_regression(y, np.zeros(N), increasing=increasing, solver=solver)
    np.testing.assert_allclose(nothing, isotonic_regression(y, increasing=increasing), atol=1e-6)


@pytest.mark.parametrize("bounds", [(-0.5, 0.4), (None, 0.1), (0.0, None)])
@pytest.mark.parametrize("increasing", [True, False])
def test_bounds_as_in_sklearn(increasing, bounds):
    low, high = bounds
    for y in ROWS.values():
        for w in (None, WEIGHTS["random"]):
            v = isotonic_regression(
                y.astype(np.float32), w, increasing=increasing, y_min=low, y_max=high
            )
            expected = sklearn_regression(
                y, sample_weight=w, increasing=increasing, y_min=low, y_max=high
            )
            np.testing.assert_allclose(v, expected, atol=2e-6)


@solvers
def test_batches_axes_and_transforms(solver):
    y = jnp.asarray(np.random.default_rng(1).normal(size=(2, N, 3)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, size=(2, N, 3)), jnp.float32)

    def fit(y, w, axis=-1):
        return isotonic_regression(y, w, solver=solver, axis=axis)

    loop = jnp.stack(
        [jnp.stack([fit(y[i, :, j], w[i, :, j]) for j in range(3)], -1) for i in (0, 1)]
    )
    for v in (
        fit(y, w, axis=1),
        jax.jit(fit, static_argnames="axis")(y, w, axis=1),
        jax.vmap(jax.vmap(fit, in_axes=1, out_axes=1))(y, w),
    ):
        np.testing.assert_allclose(v, loop, rtol=1e-6, atol=1e-6)
    shared = fit(y, w[:1, :, :1], axis=1)
    np.testing.assert_allclose(shared[0, :, 0], loop[0, :, 0], rtol=1e-6, atol=1e-6)


@solvers
def test_lengths_and_dtypes(solver):
    fit = isotonic_regression
    assert fit(jnp.zeros((3, 0)), solver=solver).shape == (3, 0)
    assert fit(jnp.zeros((0, 3)), solver=solver).shape == (0, 3)
    assert fit([7.0], solver=solver).tolist() == [7.0]
    integers = fit([1, 3, 2], solver=solver)
    assert integers.dtype == jnp.float32
    np.testing.assert_allclose(integers, [1, 2.5, 2.5], atol=1e-5)
    for dtype in (jnp.bfloat16, jnp.float16):
        y = jnp.asarray(ROWS["noise"], dtype)
        v = fit(y, solver=solver)
        assert v.dtype == dtype
        precise = fit(y.astype(jnp.float32), solver=solver)
        np.testing.assert_array_equal(v.astype(jnp.float32), precise.astype(dtype))


def test_errors_say_what_to_type():
    y = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"unknown solver 'pool'; known: dykstra, merge, pav"):
        isotonic_regression(y, solver="pool")
    with pytest.raises(ValueError, match="must not be negative"):
        isotonic_regression(y, [1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="use solver='pav'"):
        isotonic_regression(y, [1.0, 0.0, 1.0], solver="dykstra")
    with pytest.raises(ValueError, match="do not broadcast"):
        isotonic_regression(y, [1.0, 1.0])


def loss(y, w, increasing=True, solver="pav"):
    v = isotonic_regression(y, w, increasing=increasing, solver=solver)
    return (jnp.cos(1.7 * jnp.arange(v.size)).reshape(v.shape) * v).sum()


@pytest.mark.parametrize("solver", ["pav", "merge"])
@pytest.mark.parametrize("increasing", [True, False])
def test_derivatives_equal_finite_differences(increasing, solver):
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        point = rng.normal(size=(4, N)), rng.uniform(0.3, 2, (4, N))
        check_derivatives(lambda y, w: loss(y, w, increasing, solver), point)


@solvers
def test_solvers_agree_on_derivatives(solver):
    rng = np.random.default_rng(4)
    y = jnp.asarray(rng.normal(size=(4, N)), jnp.float32)
    w = jnp.asarray(rng.uniform(0.3, 2, (4, N)), jnp.float32)
    slope = jax.jit(jax.grad(loss, (0, 1)), static_argnames="solver")
    for a, b in zip(slope(y, w, solver=solver), slope(y, w), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_jacobian_of_a_pool_is_its_mean():
    jacobian = jax.jacrev(isotonic_regression)(jnp.asarray([0.0, 3.5, 1.0, 2.0, 5.0]))
    pool = np.zeros((5, 5))
    pool[0, 0] = pool[4, 4] = 1
    pool[1:4, 1:4] = 1 / 3
    np.testing.assert_allclose(jacobian, pool, atol=1e-6)


slopes = jax.jit(jax.grad(loss, (0, 1)), static_argnames="solver")


@pytest.mark.parametrize("solver", ["pav", "merge"])
@pytest.mark.parametrize("weights", [np.ones(N), np.zeros(N), np.arange(N) % 2])
@pytest.mark.parametrize("name", ROWS)
def test_derivatives_are_finite(name, weights, solver):
    y, w = jnp.asarray(ROWS[name], jnp.float32), jnp.asarray(weights, jnp.float32)
    for g in slopes(y, w, solver=solver):
        assert jnp.isfinite(g).all()
