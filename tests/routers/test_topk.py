"""The public top-k operators: against a generic solver, each other, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from routers import sparse_topk_magnitude, sparse_topk_mask
from tests.oracles import exact_threshold

P = [2.0, 1.5, 4 / 3, 3.0]
OPERATORS = [sparse_topk_mask, sparse_topk_magnitude]
# Every norm with every solver that applies to it.
SOLVERS = [(p, s) for p in P for s in ("threshold", "pav")] + [(2.0, "dykstra")]

operators = pytest.mark.parametrize("operator", OPERATORS, ids=["mask", "magnitude"])
norms = pytest.mark.parametrize("p", P)
solvers = pytest.mark.parametrize(("p", "solver"), SOLVERS)
jitted = jax.jit(
    lambda operator, p, solver, x, k, strength: operator(
        x, k, p=p, strength=strength, solver=solver
    ),
    static_argnums=(0, 1, 2),
)


def scores(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def generic_mask(x, k, p, lam):
    """The docstring's program, by sequential quadratic programming."""
    found = optimize.minimize(
        lambda y: lam / p * (y**p).sum() - x @ y,
        np.full(len(x), k / len(x)),
        jac=lambda y: lam * y ** (p - 1) - x,
        bounds=[(0, 1)] * len(x),
        constraints={"type": "eq", "fun": lambda y: y.sum() - k, "jac": np.ones_like},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-15},
    )
    return found.x


def generic_magnitude(x, k, p, lam):
    """min over u of R*(|x| - u) + 1/2 (sum of the k largest u_i^2), in epigraph form.

    The sum of the k largest a_i is the least k t + sum_i r_i with r_i >= a_i - t, r >= 0.
    """
    a, n, q = np.abs(x), len(x), p / (p - 1)

    def split(z):
        return z[:n], z[n], z[n + 1 :]

    def objective(z):
        u, t, r = split(z)
        conjugate = (np.abs(a - u) ** q).sum() / (q * lam ** (q - 1))
        return conjugate + (k * t + r.sum()) / 2

    def slack(z):
        u, t, r = split(z)
        return r - (u**2 - t)

    z = optimize.minimize(
        objective,
        np.concatenate([a / 2, [0], a**2]),
        bounds=[(0, v) for v in a] + [(None, None)] + [(0, None)] * n,
        constraints={"type": "ineq", "fun": slack},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-15},
    ).x
    shift = np.maximum(a - z[:n], 0)
    return np.sign(x) * ((shift / lam) ** (q - 1) + shift)


@operators
@solvers
def test_equals_a_generic_solver(p, solver, operator):
    x, k, strength = scores((3, 7), seed=1), np.asarray([2, 3, 2.4]), np.asarray([0.3, 1.5, 0.8])
    generic = generic_mask if operator is sparse_topk_mask else generic_magnitude
    cases = zip(x, k, strength, strict=True)
    expected = np.stack([generic(row, row_k, p, lam) for row, row_k, lam in cases])
    with jax.enable_x64(True):
        found = jitted(operator, p, solver, jnp.asarray(x), k, strength)
    # SLSQP stops when the objective is flat, to 1e-15: a power 1/q of it away.
    np.testing.assert_allclose(found, expected, atol=2e-3 if p == 4 / 3 else 2e-4)


@operators
@solvers
def test_solvers_agree_with_the_exact_root(p, solver, operator):
    n = 12 if solver == "dykstra" else 50  # Dykstra needs n^2 sweeps
    x = scores((4, n), seed=2).astype(np.float32)
    k, lam = np.asarray([1, 2.5, n // 3, n]), np.asarray([0.1, 1, 3, 1], np.float32)
    magnitude = operator is sparse_topk_magnitude
    expected = []
    for row, row_k, row_lam in zip(x, k, lam, strict=True):
        h, _, out = exact_threshold(np.abs(row) if magnitude else row, row_k, row_lam, p, magnitude)
        expected.append(np.sign(row) * out if magnitude else h)
    found = jitted(operator, p, solver, x, k, lam)
    # The threshold: a few roundings. Sorted solvers: y from s - v, each rounded; for p = 3 by a
    # square root, infinitely steep at 0. Dykstra stops at a residual of 1e-6 max|x|.
    atol = {"threshold": 1e-6, "pav": 1e-3 if p == 3 else 5e-6, "dykstra": 1e-4}[solver]
    np.testing.assert_allclose(found, expected, atol=atol)


@operators
def test_axes_batches_and_dtypes(operator):
    x, k = jnp.asarray(scores((2, 5, 3), seed=3), jnp.float32), jnp.asarray([[1.0, 2, 3]] * 2)
    along = jax.jit(operator, static_argnames="axis")
    rows = along(x.swapaxes(1, 2), k)
    np.testing.assert_allclose(along(x, k, axis=1), rows.swapaxes(1, 2), atol=1e-6)
    for dtype, atol in ((jnp.bfloat16, 2**-7), (jnp.float16, 2**-9)):  # half a unit, values < 4
        rounded = x.astype(dtype)
        found = along(rounded, k, axis=-2)
        assert found.dtype == dtype
        wide = along(rounded.astype(jnp.float32), k, axis=-2)
        np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=atol)
    with jax.enable_x64(True):
        assert jax.eval_shape(lambda: operator(jnp.ones(3, jnp.float64), 2)).dtype == jnp.float64


@norms
def test_mask_is_hard_exactly_where_the_gap_allows(p):
    x = jnp.asarray(np.linspace(3, 0, 13) ** 2 + 1, jnp.float32)  # growing gaps
    for k in (1, 4, 9, 13):
        gap = np.inf if k == 13 else float(x[k - 1] - x[k])
        hard = (jnp.arange(13) < k).astype(x.dtype)
        assert (
            jitted(sparse_topk_mask, p, "threshold", x, k, min(0.999 * gap, 99.0)) == hard
        ).all()
        if k < 13:
            soft = jitted(sparse_topk_mask, p, "threshold", x, k, 1.05 * gap)
            assert (soft != hard).any()
            soft = jitted(sparse_topk_mask, p, "threshold", x, k, 30 * gap)
            assert (soft > 0).sum() > k
            np.testing.assert_allclose(soft.sum(), k, rtol=1e-6)


@norms
def test_magnitude_is_hard_exactly_where_the_gap_allows(p):
    x = jnp.asarray([3.0, -2.0, 1.0, -0.5, 0.0, 0.1])
    lam = 1.0 / 1.0 ** (p - 1)  # |x|_(2) - |x|_(3) = 1 = lam |x|_(3)^(p-1)
    hard = jnp.where(jnp.abs(x) >= 2, x, 0)
    assert (jitted(sparse_topk_magnitude, p, "threshold", x, 2, 0.999 * lam) == hard).all()
    assert (jitted(sparse_topk_magnitude, p, "threshold", x, 2, 1.1 * lam) != hard).any()
    few = jnp.where(jnp.arange(6) < 2, x, 0)
    assert (jitted(sparse_topk_magnitude, p, "threshold", few, 4, lam) == few).all()


@operators
@norms
def test_permutations_signs_and_absent_entries(p, operator):
    x = jnp.asarray(scores(20, seed=4), jnp.float32)
    order = np.random.default_rng(4).permutation(20)
    y = jitted(operator, p, "threshold", x, 4, 2.0)
    permuted = jitted(operator, p, "threshold", x[order], 4, 2.0)
    np.testing.assert_allclose(permuted, y[order], atol=1e-6)  # sums in another order
    if operator is sparse_topk_magnitude:
        assert (jitted(operator, p, "threshold", -x, 4, 2.0) == -y).all()
    else:
        found = jitted(operator, p, "threshold", jnp.where(order < 8, -jnp.inf, x), 4, 2.0)
        np.testing.assert_allclose(
            found[order >= 8], jitted(operator, p, "threshold", x[order >= 8], 4, 2.0), atol=1e-6
        )
        assert (found[order < 8] == 0).all()


@pytest.mark.parametrize("p", [2.0, 4 / 3])
@operators
def test_pav_on_a_long_row(p, operator):
    x = jnp.asarray(scores(100_000, seed=5), jnp.float32)
    found, expected = (jitted(operator, p, s, x, 20_000, 1.0) for s in ("pav", "threshold"))
    # PAV adds up a pool of 10^5 float32 pairwise at best, and not in that order.
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.0}, "p must be a finite number above 1, not 1.0"),
        ({"p": np.inf}, "p must be a finite number"),
        ({"solver": "sort"}, "unknown solver 'sort'"),
        ({"k": 6}, "k must be above 0 and at most 5, the length of axis -1; got 6"),
        ({"k": 0}, "k must be above 0"),
        ({"strength": 0.0}, "strength must be above 0; got 0.0"),
        ({"strength": -1.0}, "strength must be above 0"),
        ({"x": np.ones(5, complex)}, "scores must be real numbers, not complex"),
    ],
)
@operators
def test_errors_say_what_to_type(operator, change, message):
    arguments = {"x": np.ones(5, np.float32), "k": 2, **change}
    with pytest.raises(ValueError, match=message):
        operator(**arguments)
