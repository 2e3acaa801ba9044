"""The p-norm problems against the min-max formula in float64, and their derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from isotonic.pav import pav
from isotonic.pnorm import isotonic_pnorm
from isotonic.powers import conjugate_exponent
from tests.derivatives import check_derivatives
from tests.isotonic.dykstra_pnorm import dykstra_pnorm

N = 8
RNG = np.random.default_rng(0)
WEIGHTS = {
    "top-k": (np.arange(N) < 3).astype(float),
    "linear": np.linspace(1, 0, N),
    "random": np.sort(RNG.uniform(0.1, 2, N))[::-1].copy(),
    "zero": np.zeros(N),
}
P = [2.0, 1.5, 4 / 3, 3.0, 1.2]

STEEP = pytest.param(3.0, marks=pytest.mark.slow)  # the dearest to compile
norms = pytest.mark.parametrize("p", [STEEP if p == 3.0 else p for p in P])
problems = pytest.mark.parametrize("magnitude", [False, True])
solvers = pytest.mark.parametrize("solver", ["pav", "merge"])


@partial(jax.jit, static_argnames=("p", "magnitude", "solver"))
def solve(s, w, lam, p, magnitude, solver="pav"):
    return isotonic_pnorm(s, w, lam=lam, p=p, magnitude=magnitude, solver=solver)


def scores(magnitude, seed=1, shape=(3, N)):
    s = np.random.default_rng(seed).normal(size=shape)
    return -np.sort(-np.abs(s) if magnitude else -s)


def reference(s, w, lam, p, magnitude):
    """v_i = min over a <= i of max over b >= i of the value of block [a, b], by bisection."""
    n = len(s)
    position = np.arange(n)
    inside = (position[:, None, None] <= position) & (position <= position[None, :, None])
    total = inside @ w
    low, high = np.full((n, n), s.min() - lam * (1 + w.sum()) ** p), np.full((n, n), s.max())
    for _ in range(200):
        g = (low + high) / 2
        d = (s - g[..., None]) / lam
        balance = (inside * np.sign(d) * np.abs(d) ** (1 / (p - 1))).sum(-1)
        above = balance > total * (g if magnitude else 1)
        low, high = np.where(above, g, low), np.where(above, high, g)
    return np.asarray([min(high[a, i:].max() for a in range(i + 1)) for i in range(n)])


@pytest.mark.parametrize("lam", [0.3, 2.0])
@pytest.mark.parametrize("name", WEIGHTS)
@problems
@norms
@solvers
def test_equals_the_min_max_formula(solver, p, magnitude, name, lam):
    s, w = scores(magnitude), WEIGHTS[name]
    expected = np.stack([reference(row, w, lam, p, magnitude) for row in s])
    with jax.enable_x64(True):
        np.testing.assert_allclose(solve(s, w, lam, p, magnitude, solver), expected, atol=1e-12)
    s, w = s.astype(np.float32), w.astype(np.float32)
    np.testing.assert_allclose(solve(s, w, lam, p, magnitude, solver), expected, atol=5e-6)


@problems
@pytest.mark.parametrize("p", [1.5, 4 / 3, 3.0])
def test_equals_projections_that_share_no_pooling(p, magnitude):
    s, w = scores(magnitude)[0], WEIGHTS["top-k"]
    expected, residual, pooled = dykstra_pnorm(s, w, 2.0, p, magnitude)
    assert residual <= 1e-9 * np.abs(s).max()
    with jax.enable_x64(True):
        v = np.asarray(solve(s, w, 2.0, p, magnitude, "merge"))
    # A pool of N amplifies the residual by up to N - 1.
    np.testing.assert_allclose(v, expected, atol=N * 1e-9 * np.abs(s).max())
    np.testing.assert_array_equal(np.diff(v) == 0, pooled)


@problems
@pytest.mark.parametrize("p", [1.5, 4 / 3, 3.0])
def test_reference_minimises_the_objective(p, magnitude):
    s, w, lam, q = scores(magnitude)[0], WEIGHTS["linear"], 0.8, p / (p - 1)

    def objective(v):
        cost = w @ v**2 / 2 if magnitude else w @ v
        return (np.abs(s - v) ** q).sum() / (q * lam ** (q - 1)) + cost

    v = reference(s, w, lam, p, magnitude)
    order = optimize.LinearConstraint(np.eye(N - 1, N) - np.eye(N - 1, N, 1), lb=0)
    optimum = optimize.minimize(objective, s - 0.1, constraints=order, method="SLSQP", tol=1e-12)
    assert objective(v) <= optimum.fun + 1e-9
    np.testing.assert_allclose(optimum.fun, objective(v), rtol=1e-5)


@problems
def test_both_solvers_at_p_2(magnitude):
    s, w = scores(magnitude).astype(np.float32), WEIGHTS["linear"].astype(np.float32)
    exact, iterated = (
        isotonic_pnorm(s, w, magnitude=magnitude, solver=solver) for solver in ("pav", "dykstra")
    )
    np.testing.assert_allclose(iterated, exact, atol=2e-5)
    plain = pav(
        *((s / (1 + w), 1 + w * np.ones_like(s)) if magnitude else (s - w, np.ones_like(s)))
    )
    np.testing.assert_allclose(exact, plain.v, atol=1e-6)


SLOW = [
    pytest.param(p, solver, marks=pytest.mark.slow)
    for p, solver in ((1.5, "pav"), (3.0, "pav"), (3.0, "merge"))
]


@problems
@pytest.mark.parametrize(
    ("p", "solver"), [(4 / 3, "pav"), *((p, "merge") for p in (1.5, 4 / 3)), *SLOW]
)
def test_derivatives_equal_finite_differences(p, solver, magnitude):
    with jax.enable_x64(True):

        def loss(s, w, lam):
            v = solve(s, w, lam, p, magnitude, solver)
            return (jnp.cos(1.7 * jnp.arange(v.size)).reshape(v.shape) * v).sum()

        lam = [[0.5], [1.0], [2.0]]
        check_derivatives(loss, (scores(magnitude, seed=2), WEIGHTS["random"], lam))


@problems
@pytest.mark.parametrize("p", [4 / 3, STEEP])
def test_derivatives_of_the_relaxed_top_k_of_float32(p, magnitude):
    """Through y = ((s - v)/lam)^(q-1), with w = 1_k, where d = 0 on the tail."""
    s, w, lam = scores(magnitude, seed=3)[0], WEIGHTS["top-k"], 1.5
    exponent = conjugate_exponent(p)
    weights = np.cos(1.7 * np.arange(N))

    @jax.jit
    def loss(s, lam):
        d = jnp.maximum(s - solve(s, w.astype(s.dtype), lam, p, magnitude), 1e-20) / lam
        return (weights.astype(s.dtype) * d**exponent).sum()

    with jax.enable_x64(True):
        exact = jax.grad(loss, (0, 1))(jnp.asarray(s), jnp.asarray(lam))
    rounded = jax.grad(loss, (0, 1))(jnp.asarray(s, jnp.float32), jnp.float32(lam))
    for a, b in zip(rounded, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@problems
@pytest.mark.parametrize(("p", "solver"), [(4 / 3, "pav"), (3.0, "merge")])
def test_finite_on_degenerate_rows_and_scales(p, solver, magnitude):
    rows = np.asarray([[2, 2, 2, 1, 1, 1, 0, 0], [1] * N, [0] * N, [7, 3, 2, 1, 0, 0, 0, 0]], float)

    @jax.jit
    def slopes(s, w, lam):
        def loss(s, w, lam):
            return (jnp.cos(jnp.arange(N)) * solve(s, w, lam, p, magnitude, solver)).sum()

        return jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), in_axes=(0, None, None))(s, w, lam)

    for w in WEIGHTS.values():
        for scale in (1e-12, 1.0, 1e12):
            for lam in (1e-12, 1.0, 1e12):
                out = slopes(*(jnp.asarray(a, jnp.float32) for a in (rows * scale, w, lam)))
                assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(out)), (w, scale, lam)


@pytest.mark.parametrize("p", [2.0, 4 / 3])
def test_absent_items_take_no_part(p):
    s = jnp.asarray([3.0, 2.5, 2.4, 1.0, 0.5, *[-jnp.inf] * 3])
    for k in (2, 6):  # also more than there are items
        w = (jnp.arange(N) < k).astype(s.dtype)

        def differences(s, w=w):
            v = isotonic_pnorm(s, w, p=p)
            return jnp.where(s == -jnp.inf, 0, s - v)

        got = differences(s)
        expected = s[:5] - isotonic_pnorm(s[:5], w[:5], p=p)
        np.testing.assert_allclose(got[:5], expected, atol=1e-6)
        assert (got[5:] == 0).all()
        jacobian = jax.jit(jax.jacrev(differences))(s)
        assert jnp.isfinite(jacobian).all()
        assert (jacobian[5:] == 0).all() and (jacobian[:, 5:] == 0).all()
    assert (isotonic_pnorm(jnp.full(4, -jnp.inf), jnp.ones(4), p=p) == -jnp.inf).all()


@pytest.mark.parametrize("p", [4 / 3])
@problems
def test_batches_and_strengths_equal_rows(p, magnitude):
    s = jnp.asarray(scores(magnitude, seed=4, shape=(2, 3, N)), jnp.float32)
    lam = jnp.asarray([[[0.5]], [[2.0]]])
    w = jnp.asarray(WEIGHTS["linear"], jnp.float32)
    rows = jnp.stack(
        [jnp.stack([solve(r, w, lam[i, 0, 0], p, magnitude) for r in s[i]]) for i in (0, 1)]
    )
    np.testing.assert_allclose(solve(s, w, lam, p, magnitude), rows, rtol=1e-6, atol=1e-6)
    mapped = jax.vmap(lambda s, lam: solve(s, w, lam, p, magnitude))(s, lam[:, 0, 0])
    np.testing.assert_allclose(mapped, rows, rtol=1e-6, atol=1e-6)


@problems
def test_mass_is_kept_on_a_long_float32_row(magnitude):
    s = scores(magnitude, seed=5, shape=(20_000,)).astype(np.float32)
    s = s if magnitude else s + np.float32(100)
    w = (np.arange(s.size) < 2_000).astype(np.float32)
    v = np.asarray(solve(s, w, 1.0, 4 / 3, magnitude), np.float64)
    weighted = w * v if magnitude else w
    # Uncentred sums of s^3 would lose all of it: the floats near 100 are 8e-6 apart.
    np.testing.assert_allclose(((s - v) ** 3).sum(), weighted.sum(), rtol=1e-3)


def test_dtypes_lengths_and_errors():
    w = jnp.ones(3)
    assert isotonic_pnorm(jnp.asarray([3, 2, 1]), w).dtype == jnp.float32
    assert isotonic_pnorm(jnp.ones(3, jnp.bfloat16), w, p=1.5).dtype == jnp.bfloat16
    assert isotonic_pnorm(jnp.zeros((2, 0)), jnp.zeros(0), p=3.0).shape == (2, 0)
    np.testing.assert_allclose(isotonic_pnorm(jnp.asarray([2.0]), w[:1], p=1.5), [1.0])
    with pytest.raises(ValueError, match="unknown solver"):
        isotonic_pnorm(jnp.ones(3), w, p=1.5, solver="pool")
    with pytest.raises(ValueError, match="greater than 1"):
        isotonic_pnorm(jnp.ones(3), w, p=1.0)
