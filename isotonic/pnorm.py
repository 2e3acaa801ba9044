r"""The isotonic problems behind top-k operators regularised by a p-norm.

Sander et al., "Fast, Differentiable and Sparse Top-k: a Convex Analysis Perspective" (ICML 2023,
arXiv 2302.01425): with s the sorted scores and v the solution, y = ((s - v)/lam)^(q-1) is the
relaxed mask, or magnitude, of the sorted scores; q = p/(p - 1).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from isotonic.blocks import Offset, block_sum, on_any_mesh, positions
from isotonic.merge import merge_pnorm
from isotonic.pav_pnorm import pav_pnorm
from isotonic.powers import conjugate_exponent, power, signed_power
from isotonic.regression import as_floats, known, solver_of
from isotonic.roots import falling_root
from isotonic.steep_blocks import solve_again

# (d, s, w, lam, *, p, magnitude) -> Fit, for any p > 1.
PNORM_SOLVERS = {"pav": pav_pnorm, "merge": merge_pnorm}


def isotonic_pnorm(s, w, *, lam=1.0, p: float = 2.0, magnitude: bool = False, solver=None):
    r"""Solves, with q = p/(p - 1), along the last axis

      argmin_{v_1 >= ... >= v_n}  ||s - v||_q^q / (q lam^(q-1)) + \sum_i w_i v_i          (mask)
      argmin_{v_1 >= ... >= v_n}  ||s - v||_q^q / (q lam^(q-1)) + 1/2 \sum_i w_i v_i^2   (magnitude)

    Args:
      s: scores `[..., n]` in decreasing order, any n >= 0; for magnitude |x| sorted, so >= 0.
        Entries of -inf, at the end, stand for absent items: they take no part and get v = -inf,
        with dv = ds; read s - v as 0 there (`jnp.where(s == -jnp.inf, 0, s - v)`).
      w: weights in decreasing order, of a shape that broadcasts to that of s; k ones and then
        zeros for top-k. >= 0 for magnitude, and for solver "pav" with p != 2.
      lam: strength > 0; scalar, or an array that broadcasts to `[..., 1]`. May be traced.
      p: of the norm, > 1, static; at most 6 in float32 and 20 in float64, where |d|^(q-1) has the
        digits of w, and some eps/(p - 1) for p near 1. PAV solves 2, 3/2 and 4/3 in O(n), others
        in O(n) times the width of the pools.
      magnitude: which of the two problems; static.
      solver: as for `isotonic.isotonic_regression`, "dykstra" for p = 2 alone; for p != 2 by
        default "merge".

    Returns:
      v, of the shape and float dtype of s; integers become the default float. float16 and
      bfloat16 are solved in float32. NaN in rows that hold a NaN, or a traced strength or weight
      outside its range, and in no others.

    Raises:
      ValueError: on p outside its range, an unknown solver, w or lam of the wrong shape or, where
        not traced, outside its range.

    For p = 2 the mask is the isotonic regression of s - lam w, and magnitude that of
    s/(1 + lam w) with weights 1 + lam w.

    Derivative with respect to s, w and lam, forward and reverse, with d = (s - v)/lam and
    c_i = (q - 1) |d_i|^(q-2), over the block B of a position:
      mask:       dv = (\sum_B c_i (ds_i - d_i dlam) - lam \sum_B dw_i) / \sum_B c_i
      magnitude:  dv = (\sum_B c_i (ds_i - d_i dlam) - lam v \sum_B dw_i) / \sum_B (c_i + lam w_i)
    c diverges or vanishes at d = 0, so it is bounded on both sides, and with it every derivative.
    """
    s, w, lam, dtype = _operands(s, w, lam, p, magnitude, solver)
    if s.size == 0:
        return s.astype(dtype)
    d, block = _fitted(s, w, lam, p, magnitude, solver)
    # The first of a block speaks for all of it: each difference rounds on its own.
    return jnp.take_along_axis(s - lam * d, block, -1).astype(dtype)


def isotonic_dual(s, w, *, lam=1.0, p: float = 2.0, magnitude: bool = False, solver=None):
    """Returns d = (s - v)/lam of the solution v of `isotonic_pnorm`, to the rounding of w.

    v holds few digits of it, or none, where max|s|/lam is large; here only differences of s enter.
    Arguments, derivatives and errors as there. d = 0 at absent items.
    """
    s, w, lam, dtype = _operands(s, w, lam, p, magnitude, solver)
    return (_fitted(s, w, lam, p, magnitude, solver)[0] if s.size else s).astype(dtype)


def _operands(s, w, lam, p, magnitude, solver):
    """Check the arguments; return s, w `[..., n]` and lam `[..., 1]`, as solved, and s's dtype."""
    if not 1 < p < float("inf"):
        raise ValueError(f"p must be greater than 1 and finite, got {p}")
    solver_of(solver)  # raises if there is none
    if p != 2 and solver not in (None, *PNORM_SOLVERS):
        raise ValueError(f"solver {solver!r} is for p = 2 alone; use 'merge' for p = {p}")
    s, dtype = as_floats(s)
    most = 1 + math.log(jnp.finfo(s.dtype).tiny) / math.log(jnp.finfo(s.dtype).eps)
    if p > most:
        raise ValueError(
            f"p must be at most {most:.3g} in {s.dtype}, whose range y^(p-1) leaves beyond it; got "
            f"{p}. Top-k operators take it with solver='threshold'"
        )
    if s.ndim == 0:
        raise ValueError("scores must have an axis of items; got a scalar")
    rows = (*s.shape[:-1], 1)
    nonnegative = magnitude or (p != 2 and solver == "pav")
    w, lam = (
        _in_range(name, a, s, shape, low)
        for name, a, shape, low in (
            ("w", w, s.shape, 0 if nonnegative else None),
            ("lam", lam, rows, jnp.finfo(s.dtype).tiny),
        )
    )
    # Zeros of each are added to the others: in a loop all have to vary over the same devices.
    return s + (jnp.zeros_like(w) + jnp.zeros_like(lam)), w, lam, dtype


def _in_range(name, value, s, shape, low):
    """Broadcast to a shape; an error below `low`, or NaN where that is not known."""
    numbers = known(value)
    high = float(jnp.finfo(s.dtype).max)
    if low is not None and numbers is not None and not ((low <= numbers) & (numbers <= high)).all():
        limit = "not negative" if low == 0 else "above 0"
        raise ValueError(f"{name} must be finite and {limit}, got {numbers}")
    try:
        value = jnp.zeros_like(s[..., : shape[-1]]) + jnp.broadcast_to(
            jnp.asarray(value, s.dtype), shape
        )
    except ValueError:
        given = np.shape(value)
        raise ValueError(f"{name} of shape {given} does not broadcast to {shape}") from None
    return value if low is None else jnp.where((low <= value) & (value <= high), value, jnp.nan)


def _fitted(s, w, lam, p, magnitude, solver):
    """Returns d and its blocks, with rows of NaN where an argument has one."""
    fit = jax.jit(_fit, static_argnums=(0, 1, 2))  # so that eager calls do not retrace the loops
    d, block = on_any_mesh(partial(fit, solver, float(p), bool(magnitude)))(s, w, lam)
    wrong = (jnp.isnan(s) | jnp.isnan(w) | jnp.isnan(lam)).any(-1, keepdims=True)
    return d * jnp.where(wrong, jnp.nan, 1).astype(d.dtype), block


def _fit(solver, p, magnitude, s, w, lam):
    """Returns d and its blocks."""
    d, block = _solve(solver, p, magnitude, *jax.lax.stop_gradient((s, w, lam)))
    return _differentiable(p, magnitude, d, block, s, w, lam), block


def _solve(solver, p, magnitude, s, w, lam):
    """Returns d and its blocks, which are not differentiated."""
    absent = s == -jnp.inf
    s = jnp.where(absent, 0, jnp.minimum(s, jnp.finfo(s.dtype).max))
    if p == 2:
        share = 1 / (1 + lam) if magnitude else 1
        weights = share + lam / (1 + lam) * w if magnitude else jnp.ones_like(s)
        weights = jnp.maximum(weights, jnp.finfo(s.dtype).tiny)
        d = s * share * (w / weights) if magnitude else w
        args = -jnp.where(absent, jnp.inf, d), weights, Offset(s, lam)
        fit = solver_of(solver)(*args)
    else:
        d = jnp.where(absent, jnp.inf, _alone(s, w, lam, p, magnitude))
        solve = partial(PNORM_SOLVERS[solver or "merge"], p=p, magnitude=magnitude)
        fit = solve(d, s, w, lam)
    d = jnp.where(absent, 0, 0 - fit.v)  # and not -0
    if p > 2:
        d = solve_again(d, fit.block, s, jnp.where(absent, 0, w), lam, p, magnitude)
    return d, fit.block


def _alone(s, w, lam, p: float, magnitude: bool):
    """Solves each position as a block of its own: d = (s - v)/lam, to all its digits."""
    exponent = conjugate_exponent(p)
    if not magnitude:
        return signed_power(w, 1 / exponent)
    # d^(q-1) + lam w d = s w, where one of the two terms is at least half of the right side.
    most = jnp.minimum(s / lam, power(w * s, 1 / exponent))
    least = jnp.minimum(s / lam / 2, power(w * s / 2, 1 / exponent))

    def excess(d):
        size = jnp.maximum(d, jnp.finfo(d.dtype).tiny)
        d_power = power(size, exponent)
        return w * (s - lam * d) - d_power, -exponent * (d_power / size) - lam * w

    return falling_root(excess, most, least, most, jnp.zeros_like(s), ~(least < most))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _differentiable(p, magnitude, d, block, s, w, lam):
    """Returns d, the solution on these blocks, with its derivatives in s, w and lam."""
    return d


@_differentiable.defjvp
def _differentiable_jvp(p, magnitude, primals, tangents):
    _, block, s, w, lam = primals
    *_, ds, dw, dlam = tangents
    d = _differentiable(p, magnitude, *primals)
    limit = float(jnp.finfo(s.dtype).max) ** 0.5  # beyond it, products leave the float range
    d_near = jnp.clip(d, -limit, limit)
    curve = _curvature(d_near, conjugate_exponent(p), limit)
    total = block_sum(curve, block)
    move = ds - d_near * dlam
    mean = block_sum(curve / total * move, block)
    # What a block moves by as one; its positions move about it by their distance to the mean.
    if magnitude:
        weight = block_sum(w, block)
        v = jnp.maximum(s - lam * d, 0)
        total += lam * weight
        common = mean * jnp.minimum(weight / total, limit)
        common += block_sum(jnp.minimum(v / total, limit) * dw, block)
    else:
        common = block_sum(jnp.minimum(1 / total, limit) * dw, block)
    # Of a position by itself the first is 0, but in reverse order its parts would not cancel.
    apart = jnp.where(_alone_in(block), 0, (move - mean) / lam)
    return d, jnp.where(s == -jnp.inf, 0, apart + common)


def _alone_in(block):
    """Returns which positions `[..., n]` are blocks of their own."""
    starts = block == positions(block)
    return starts & jnp.concatenate([starts[..., 1:], jnp.ones_like(starts[..., :1])], -1)


def _curvature(d, exponent: float, limit: float):
    """Returns (q-1) |d|^(q-2), kept away from 0 and infinity."""
    d = jnp.maximum(jnp.abs(d), jnp.finfo(d.dtype).eps)
    return jnp.clip(exponent * power(d, exponent - 1), 1 / limit, limit)
