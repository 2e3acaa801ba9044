r"""The isotonic problems behind top-k operators regularised by a p-norm.

Sander et al., "Fast, Differentiable and Sparse Top-k: a Convex Analysis Perspective" (ICML 2023,
arXiv 2302.01425): with s the sorted scores and v the solution, y = ((s - v)/lam)^(q-1) is the
relaxed mask, or magnitude, of the sorted scores; q = p/(p - 1).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from isotonic.blocks import Fit, block_sum
from isotonic.dykstra_pnorm import dykstra_pnorm
from isotonic.merge import merge_pnorm
from isotonic.pav_pnorm import pav_pnorm
from isotonic.powers import conjugate_exponent, power
from isotonic.regression import find_solver, isotonic_regression

# (s, w, lam, *, p, magnitude) -> Fit, for any p > 1.
PNORM_SOLVERS = {"pav": pav_pnorm, "merge": merge_pnorm, "dykstra": dykstra_pnorm}


def isotonic_pnorm(s, w, *, lam=1.0, p: float = 2.0, magnitude: bool = False, solver=None):
    r"""Solve, with q = p/(p - 1), along the last axis

      argmin_{v_1 >= ... >= v_n}  ||s - v||_q^q / (q lam^(q-1)) + \sum_i w_i v_i          (mask)
      argmin_{v_1 >= ... >= v_n}  ||s - v||_q^q / (q lam^(q-1)) + 1/2 \sum_i w_i v_i^2   (magnitude)

    Args:
      s: scores `[..., n]` in decreasing order, any n >= 0; for magnitude |x| sorted, so >= 0.
        Entries of -inf, at the end, stand for absent items: they take no part and get v = -inf,
        with dv = ds; read s - v as 0 there (`jnp.where(s == -jnp.inf, 0, s - v)`).
      w: weights in decreasing order, of a shape that broadcasts to that of s; k ones and then
        zeros for top-k. >= 0 for magnitude, and for solver "pav" with p != 2.
      lam: strength > 0; scalar, or an array that broadcasts to `[..., 1]`. May be traced.
      p: of the norm, > 1; static. PAV solves 2, 3/2 and 4/3 in O(n), others in O(n) times the
        width of the pools.
      magnitude: which of the two problems; static.
      solver: as for `isotonic.isotonic_regression`; for p != 2 by default "merge".

    Returns:
      v, of the shape and float dtype of s; integers become the default float. float16 and
      bfloat16 are solved in float32.

    Raises:
      ValueError: on p <= 1 or an unknown solver.

    For p = 2 the mask is the isotonic regression of s - lam w, and magnitude that of
    s/(1 + lam w) with weights 1 + lam w.

    Derivative with respect to s, w and lam, forward and reverse, with d = (s - v)/lam and
    c_i = (q - 1) |d_i|^(q-2), over the block B of a position:
      mask:       dv = (\sum_B c_i (ds_i - d_i dlam) - lam \sum_B dw_i) / \sum_B c_i
      magnitude:  dv = (\sum_B c_i (ds_i - d_i dlam) - lam v \sum_B dw_i) / \sum_B (c_i + lam w_i)
    c diverges or vanishes at d = 0, so it is bounded on both sides, and with it every derivative.
    """
    if not p > 1:
        raise ValueError(f"p must be greater than 1, got {p}")
    if solver is not None:
        find_solver(solver)
    s = jnp.asarray(s)
    dtype = s.dtype if jnp.issubdtype(s.dtype, jnp.floating) else jnp.result_type(float)
    precise = jnp.promote_types(dtype, jnp.float32)
    s = s.astype(precise)
    w = jnp.broadcast_to(jnp.asarray(w, precise), s.shape)
    lam = jnp.broadcast_to(jnp.asarray(lam, precise), (*s.shape[:-1], 1))
    if s.size == 0:
        return s.astype(dtype)
    absent = s == -jnp.inf
    finite_s, finite_w = _without_absent(s, w, lam, absent, magnitude)
    if p != 2:
        fit = jax.jit(_fit, static_argnums=(0, 1, 2))
        solve = PNORM_SOLVERS[solver or "merge"]
        v = fit(solve, float(p), bool(magnitude), finite_s, finite_w, lam).v
    elif magnitude:
        weights = 1 + lam * finite_w
        v = isotonic_regression(finite_s / weights, weights, increasing=False, solver=solver)
    else:
        v = isotonic_regression(finite_s - lam * finite_w, increasing=False, solver=solver)
    return jnp.where(absent, s, v).astype(dtype)


def _without_absent(s, w, lam, absent, magnitude):
    """s and w with absent entries put where no solver pools them with the others."""
    if magnitude:
        floor = jnp.zeros_like(lam)
    else:
        lowest = jnp.where(absent, jnp.inf, s).min(-1, keepdims=True)
        lowest = jnp.where(lowest < jnp.inf, lowest, 0)
        # No pool of the others reaches below lowest - lam max(w^(p-1)).
        heaviest = jnp.maximum(w.max(-1, keepdims=True), 1)
        spread = jnp.maximum(s.max(-1, keepdims=True) - lowest, 0)
        floor = lowest - spread - 2 * lam * heaviest
    floor = jax.lax.stop_gradient(floor)
    return jnp.where(absent, floor, s), jnp.where(absent, 0, w)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _fit(solve, p, magnitude, s, w, lam) -> Fit:
    fit = solve(s, w, lam, p=p, magnitude=magnitude)
    return Fit(fit.v, fit.block)


@_fit.defjvp
def _fit_jvp(solve, p, magnitude, primals, tangents):
    s, w, lam = primals
    ds, dw, dlam = tangents
    fit = _fit(solve, p, magnitude, s, w, lam)
    limit = float(jnp.finfo(s.dtype).max) ** 0.5  # beyond it, products leave the float range
    d = jnp.clip((s - fit.v) / lam, -limit, limit)
    curve = _curvature(d, conjugate_exponent(p), limit)
    total = block_sum(curve + lam * w if magnitude else curve, fit.block)
    pull = jnp.minimum(lam * (fit.v / total) if magnitude else lam / total, limit)
    dv = block_sum(curve / total * (ds - d * dlam) - pull * dw, fit.block)
    return fit, Fit(dv, np.zeros(fit.block.shape, jax.dtypes.float0))


def _curvature(d, exponent: float, limit: float):
    """(q-1) |d|^(q-2), kept away from 0 and infinity."""
    d = jnp.maximum(jnp.abs(d), jnp.finfo(d.dtype).eps)
    return jnp.clip(exponent * power(d, exponent - 1), 1 / limit, limit)
