"""Digits and range of the isotonic solvers: long rows, huge numbers, and what is not a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from isotonic import isotonic_pnorm, isotonic_regression

solvers = pytest.mark.parametrize("solver", ["pav", "merge"])
LONG = 60_000


def long_rows():
    """Rows in which the rounding of a running mean always errs to one side, or is far from 0."""
    i = np.arange(LONG)
    return {
        "ramp": 1000 + i / LONG,
        "steps": 300 + 0.1 * (i // 1000),
        "teeth": np.where(i % 2 == 0, 0.1, 7.3) + i / LONG,
        "powers": 1.001 ** (i / 10) / 400,
    }


@solvers
def test_long_structured_rows_keep_their_digits(solver):
    y = np.stack(list(long_rows().values())).astype(np.float32)
    w = np.full(LONG, 0.1, np.float32)  # whose running sum rounds too
    v = isotonic_regression(y, w, increasing=False, solver=solver)
    for name, row, fit in zip(long_rows(), y, np.asarray(v, np.float64), strict=True):
        exact = optimize.isotonic_regression(row.astype(np.float64), increasing=False).x
        np.testing.assert_allclose(fit, exact, atol=2**-22 * np.abs(row).max(), err_msg=name)


@solvers
def test_the_largest_and_the_smallest_floats_are_fitted(solver):
    y = (
        np.asarray([[1, 2, 3, 3.2], [-3.3, 3.3, -3.3, 3.3], [3.4, 3.4, 3.4, 3.4]], np.float64)
        * 1e38
    )
    for scale in (1, 1e-60):
        for weight in (1e-30, 1.0, 3e38):
            v = isotonic_regression(
                (y * scale).astype(np.float32), [weight] * 4, increasing=False, solver=solver
            )
            exact = np.repeat(y.mean(-1, keepdims=True), 4, -1)
            exact[1] = [0, 0, 0, 0]
            np.testing.assert_allclose(np.asarray(v, np.float64), exact * scale, rtol=1e-6)
    beside = isotonic_regression(jnp.asarray([3e38, 1e-9, 3e-9]), increasing=False, solver=solver)
    np.testing.assert_allclose(beside, [3e38, 2e-9, 2e-9], rtol=1e-6)


@solvers
@pytest.mark.parametrize("p", [2.0, 3.0])
def test_absent_items_are_never_pooled(solver, p):
    v = isotonic_pnorm([0, 0, -np.inf], [4, 4, 0], p=p, solver=solver)
    np.testing.assert_array_equal(v, [-(4 ** (p - 1))] * 2 + [-np.inf])


def test_wrong_arguments_are_errors():
    y = jnp.asarray([1.0, 2, 3])
    wrong = [
        (lambda: isotonic_pnorm(y, [1, 0, 0], p=np.inf), "p must be greater than 1 and finite"),
        (lambda: isotonic_pnorm(y, [1, 0, 0], p=np.nan), "p must be greater than 1 and finite"),
        (lambda: isotonic_pnorm(y, [1, 0, 0], p=100), "p must be at most 6.48 in float32"),
        (lambda: isotonic_pnorm(y, [1, 0, 0], lam=0.0), "lam must be finite and above 0"),
        (lambda: isotonic_pnorm(y, [1, 0, 0], lam=np.nan), "lam must be finite and above 0"),
        (lambda: isotonic_pnorm(y, [1, 0]), "w of shape .* does not broadcast"),
        (
            lambda: isotonic_pnorm(y, [1, 0, -1], magnitude=True),
            "w must be finite and not negative",
        ),
        (
            lambda: isotonic_pnorm(y, [1, 0, -1], p=1.5, solver="pav"),
            "w must be finite and not negative",
        ),
        (lambda: isotonic_pnorm(y, [1, 0, 0], p=1.5, solver="dykstra"), "use 'merge'"),
        (lambda: isotonic_pnorm(1.0, 1.0), "an axis of items"),
        (lambda: isotonic_regression(y, axis=3), "axis 3"),
        (lambda: isotonic_regression(1.0), "axis -1"),
        (lambda: isotonic_regression(y, [1.0, np.nan, 1]), "must not be"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("solver", ["pav", "merge", "dykstra"])
def test_nan_and_traced_weights_below_0_spoil_their_own_row_alone(solver):
    y = jnp.asarray([[1.0, 2, 0], [1, jnp.nan, 0], [1, 2, 0]])
    w = jnp.asarray([[1.0, 1, 1], [1, 1, 1], [1, -1, 1]])

    @jax.jit
    def both(y, w):
        v, pull = jax.vjp(lambda y: isotonic_regression(y, w, solver=solver), y)
        return v, pull(jnp.ones_like(v))[0]

    for result in both(y, w):
        assert np.isfinite(result[0]).all() and np.isnan(result[1:]).all()

    @jax.jit
    def residual(s, w, lam):
        return isotonic_pnorm(s, w, lam=lam, magnitude=True, solver=solver)

    v = residual(-jnp.sort(-y), w[:, ::-1], jnp.asarray([[1.0], [1], [1]]))
    assert np.isfinite(v[0]).all() and np.isnan(v[1:]).all()
    v = residual(jnp.abs(y[:1]), w[:1], -1.0)
    assert np.isnan(v).all()


def test_projections_that_have_not_converged_warn():
    """Also from compiled code; a row of 8192 needs some 10^7 sweeps."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=512), jnp.float32)
    y = jnp.stack([jnp.sort(y), -jnp.sort(-y)])  # one pool, and none
    with pytest.warns(RuntimeWarning, match=r"left 1 of 2 rows unsolved.*'pav' and 'merge'"):
        jax.jit(lambda y: isotonic_regression(y, increasing=False, solver="dykstra"))(y)
        jax.effects_barrier()
