"""Derivatives of the top-k operators: closed form, finite differences, and never NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from routers import sparse_topk_magnitude, sparse_topk_mask
from tests.derivatives import check_derivatives

P = [2.0, 1.5, 4 / 3, 3.0]
SLOW = [pytest.param(p, "pav", marks=pytest.mark.slow) for p in (1.5, 3.0)]
SOLVERS = [*((p, "threshold") for p in P), (2.0, "pav"), (4 / 3, "pav"), (2.0, "dykstra"), *SLOW]
SOLVERS += [(2.0, "merge"), pytest.param(4 / 3, "merge", marks=pytest.mark.slow)]
WEIGHTS = np.cos(1.7 * np.arange(8))  # a plain sum of the mask is k: its gradient hides everything

operators = pytest.mark.parametrize(
    "operator", [sparse_topk_mask, sparse_topk_magnitude], ids=["mask", "magnitude"]
)
norms = pytest.mark.parametrize("p", P)
solvers = pytest.mark.parametrize(("p", "solver"), SOLVERS)


def loss(operator, p, solver):
    def weighted(x, k, strength):
        y = operator(x, k, p=p, strength=strength, solver=solver)
        return (jnp.asarray(WEIGHTS[: x.shape[-1]], y.dtype) * y).sum()

    return weighted


@operators
@solvers
def test_derivatives_equal_central_differences(p, solver, operator):
    """In x, k and strength, forward and reverse, at points away from the kinks of p = 2."""
    x = np.random.default_rng(6).normal(size=8)
    # Dykstra is inexact: a step across which its residual is small.
    inexact = {"step": 1e-3, "atol": 5e-3} if solver == "dykstra" else {}
    with jax.enable_x64(True):
        check_derivatives(loss(operator, p, solver), (x, 2.6, 1.3), **inexact)


@norms
def test_jacobian_of_the_mask_is_the_closed_form(p):
    lam, k = 1.5, 3
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(7).normal(size=8))
        y = sparse_topk_mask(x, k, p=p, strength=lam)
        u = y ** (p - 1)
        inside = (u > 0) & (u < 1)
        d = jnp.where(inside, jnp.where(inside, u, 1) ** (1 / (p - 1) - 1) / (p - 1) / lam, 0)
        expected = jnp.diag(d) - jnp.outer(d, d) / d.sum()
        for derivative in (jax.jacfwd, jax.jacrev):
            found = jax.jit(derivative(lambda x: sparse_topk_mask(x, k, p=p, strength=lam)))(x)
            np.testing.assert_allclose(found, expected, atol=1e-12)
            np.testing.assert_allclose(found, found.T, atol=1e-12)
            np.testing.assert_allclose(found.sum(-1), 0, atol=1e-12)


ROWS = {
    "ties": [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5],
    "equal": [0.7] * 8,
    "zeros": [0] * 8,
    "absent": [1, -np.inf, 0.5, -np.inf, 0.2, 0.1, -np.inf, 3],
    "mostly absent": [1, *[-np.inf] * 7],
    "already hard": [9, 8, 7, 1, 0.5, 0, -1, -2],
    "touching": [3, 2, 1, 0, -1, -2, -3, -4],  # gaps of exactly the strength
    "outlier": [1e30, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    "huge": list(1e30 * np.linspace(1, -1, 8)),
    "tiny": list(1e-30 * np.linspace(1, -1, 8)),
}


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@operators
@pytest.mark.parametrize(
    ("p", "solver"), [*((p, "threshold") for p in P), (2.0, "pav"), (4 / 3, "pav"), *SLOW]
)
def test_finite_on_degenerate_rows(p, solver, operator, dtype):
    rows = [row for row in ROWS.values() if operator is sparse_topk_mask or np.isfinite(row).all()]
    cases = [(row, k, lam) for row in rows for k in (3, 3.5, 8) for lam in (1e-3, 1, 1e3)]
    x, k, lam = (np.asarray(a, dtype) for a in zip(*cases, strict=True))
    with jax.enable_x64(dtype == np.float64):

        @jax.jit
        def everything(x, k, lam):
            def one(*point):
                f = loss(operator, p, solver)
                ones = tuple(jnp.ones_like(a) for a in point)
                return jax.value_and_grad(f, (0, 1, 2))(*point), jax.jvp(f, point, ones)

            return jax.vmap(one)(x, k, lam)

        for leaf in jax.tree.leaves(everything(x, k, lam)):
            finite = np.isfinite(leaf).reshape(len(cases), -1).all(-1)
            assert finite.all(), [cases[i] for i in np.nonzero(~finite)[0]][:5]


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_gradients_of_magnitude_do_not_depend_on_the_scale(p):
    """out(c x; lam c^(2-p)) = c out(x; lam), so its Jacobian is that at scale 1, also in float32.

    A slope floored at an absolute u = eps was wrong for p = 3 below |x| = 1e-4.
    """
    x, lam = np.random.default_rng(8).normal(size=8), 1.5

    f = jax.jit(jax.jacrev(lambda x, lam: sparse_topk_magnitude(x, 3, p=p, strength=lam)))

    def jacobian(scale):
        return f(jnp.asarray(scale * x, jnp.float32), lam * scale ** (2 - p))

    for scale in (1e-6, 1e-3, 1e3):
        np.testing.assert_allclose(jacobian(scale), jacobian(1.0), atol=2e-4)


@operators
def test_every_transformation_gives_the_same_gradient(operator):
    x = jnp.asarray(np.random.default_rng(9).normal(size=(3, 8)), jnp.float32)
    gradient = jax.grad(lambda x: loss(operator, 4 / 3, "threshold")(x, 2.5, 1.0))
    expected = jnp.stack([jax.jit(gradient)(row) for row in x])
    ways = (
        jax.jit(jax.vmap(gradient)),
        jax.jit(lambda x: jax.lax.map(gradient, x)),
        jax.jit(
            jax.grad(
                lambda x: jax.checkpoint(
                    jax.vmap(lambda row: loss(operator, 4 / 3, "threshold")(row, 2.5, 1.0))
                )(x).sum()
            )
        ),
    )
    for way in ways:
        np.testing.assert_allclose(way(x), expected, atol=1e-5)  # sums in another order


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("solver", ["threshold", pytest.param("merge", marks=pytest.mark.slow)])
def test_second_derivatives_of_the_smooth_mask(solver):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(5).normal(size=7))

        @jax.jit
        def squares(x, k, strength):
            y = sparse_topk_mask(x, k, p=4 / 3, strength=strength, solver=solver)
            return (jnp.asarray(WEIGHTS[:7]) * y**2).sum()

        check_grads(squares, (x, 2.6, 1.3), order=2, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5)
