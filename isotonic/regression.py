"""Isotonic regression, weighted, in both directions and differentiable: the public face."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from isotonic.blocks import Fit, block_sum
from isotonic.dykstra import dykstra
from isotonic.merge import merge
from isotonic.pav import pav

# A solver takes (y, w), both [..., n] and of one float dtype, and returns the decreasing fit with
# fields `v` and `block`, see `isotonic.blocks.Fit`.
SOLVERS = {"pav": pav, "merge": merge, "dykstra": dykstra}


def isotonic_regression(
    y, weights=None, *, increasing=True, solver=None, axis=-1, y_min=None, y_max=None
):
    r"""Solve  argmin_v  1/2 \sum_i w_i (y_i - v_i)^2  subject to v monotone along `axis`,
    and y_min <= v_i <= y_max.

    Args:
      y: data, any shape; every line along `axis` is a problem of its own, of any length n >= 0.
      weights: w >= 0, of a shape that broadcasts to y's along its last axes; 1 if None. A point
        of zero weight has no say in the values of the others, which are what scikit-learn's
        `IsotonicRegression` fits after dropping the point; its own value is the limit of small
        equal weights, which keeps the fit continuous. Solver "dykstra" takes no zeros.
      increasing: v_1 <= ... <= v_n if True, v_1 >= ... >= v_n if False; static.
      solver: "pav" (exact, sequential), "merge" (exact, data-parallel, of depth log n), "dykstra"
        (iterative, slow to converge on wide pools), or None: "pav" on CPU, where no other is
        faster (docs/benchmarks.md), and "merge" elsewhere, where a sequential
        solver pays a kernel launch for every position.
      axis: the axis along which v is monotone.
      y_min, y_max: bounds on v, scalars or arrays that broadcast to y; no bound if None. The
        bounded fit is the unbounded one, clipped.

    Returns:
      v, of y's shape and float dtype; integers become the default float. float16 and bfloat16
      are solved in float32.

    Raises:
      ValueError: on an unknown solver, on weights of the wrong shape, and, if the weights are
        concrete, on negative ones or on zeros that the solver cannot take.

    Derivative, forward and reverse, with B the block of position i and W its weight:
      dv_i = \sum_{j in B} (w_j dy_j + (y_j - v_i) dw_j) / W.
    Where y lies between two sets of blocks, those of the solver are used. In a block without
    weight dv is the plain mean of dy.
    """
    solve = _automatic if solver is None else find_solver(solver)
    y = jnp.asarray(y)
    dtype = y.dtype if jnp.issubdtype(y.dtype, jnp.floating) else jnp.result_type(float)
    precise = jnp.promote_types(dtype, jnp.float32)
    y = y.astype(precise)
    if weights is None:
        w = jnp.ones_like(y)
    else:
        _check_weights(weights, y.shape, solver)
        w = jnp.broadcast_to(jnp.asarray(weights, precise), y.shape)
    if y.size == 0:
        return y.astype(dtype)
    y, w = (jnp.moveaxis(a, axis, -1) for a in (y, w))
    fit = jax.jit(_fit, static_argnums=0)  # so that eager calls do not retrace the loops
    # Negating keeps the order of positions, so that both directions share one layout of blocks.
    v = -fit(solve, -y, w).v if increasing else fit(solve, y, w).v
    v = jnp.moveaxis(v, -1, axis)
    if y_min is not None or y_max is not None:
        v = jnp.clip(v, y_min, y_max)
    return v.astype(dtype)


def _automatic(y, w) -> Fit:
    return jax.lax.platform_dependent(y, w, cpu=pav, default=merge)


def find_solver(name: str):
    """The solver of that name in `SOLVERS`."""
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; known: {', '.join(sorted(SOLVERS))}")
    return SOLVERS[name]


def _check_weights(weights, shape, solver):
    given = np.shape(weights)
    fits = zip(given[::-1], shape[::-1], strict=False)
    if len(given) > len(shape) or any(a not in (1, b) for a, b in fits):
        raise ValueError(f"weights of shape {given} do not broadcast to y's {shape}")
    if isinstance(weights, jax.core.Tracer):
        return
    weights = np.asarray(weights)
    if (weights < 0).any():
        raise ValueError(f"weights must not be negative, got {weights.min()}")
    if solver == "dykstra" and (weights == 0).any():
        raise ValueError("solver 'dykstra' needs positive weights; use solver='pav' for zeros")


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fit(solve, y, w) -> Fit:
    fit = solve(y, w)
    return Fit(fit.v, fit.block)


@_fit.defjvp
def _fit_jvp(solve, primals, tangents):
    y, w = primals
    dy, dw = tangents
    fit = _fit(solve, y, w)
    total = block_sum(w, fit.block)
    weighted = total > 0
    count = block_sum(jnp.ones_like(w), fit.block)
    total = jnp.where(weighted, total, count)
    share = jnp.where(weighted, w, 1) / total
    # Without weight the fit does not depend on small equal weights.
    pull = jnp.where(weighted, (y - fit.v) / total, 0)
    dv = block_sum(share * dy + pull * dw, fit.block)
    return fit, Fit(dv, np.zeros(fit.block.shape, jax.dtypes.float0))
