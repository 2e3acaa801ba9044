"""Differentiable, exactly sparse top-k operators (Sander et al., ICML 2023).

Top-k is a linear program over the permutahedron P(1_k) = {0 <= y <= 1, sum y = k}; adding the
regulariser (lam/p) ||y||_p^p makes its solution a continuous function of the scores that still has
exact zeros. p = 2 is piecewise linear, p = 4/3 continuously differentiable. With q = p/(p - 1):

  solver      what it does                                    p      work per row
  threshold   one scalar root (`isotonic.threshold`)          any    a few passes
  pav         sort, then pool adjacent violators              any    sequential
  merge       sort, then join solved halves                   any    log n levels
  dykstra     sort, then the paper's alternating projections  2      many passes, inexact
"""

import jax.numpy as jnp

from isotonic.cap_link import CapLink
from isotonic.power_links import MagnitudeLink, MaskLink
from isotonic.threshold import threshold
from routers.operands import check_norm, nan_rows, rows
from routers.permutahedron import project_rows


def sparse_topk_mask(x, k, *, p=2.0, strength=1.0, solver="threshold", axis=-1):
    r"""Relaxes the top-k mask: weights in [0, 1] that sum to k, zero for all but the largest.

    argmax_{0 <= y <= 1, \sum y = k}  <x, y> - (lam/p) ||y||_p^p,    lam = strength.

    Args:
      x: scores, any shape; float16, bfloat16, float32 or float64 (solved in float32 or better).
        Entries of -inf get weight 0, those of +inf are the largest float.
      k: how many to select, real, in (0, n]: a number, or an array that broadcasts against x
        without `axis` (one k per row). May be traced.
      p: norm of the regulariser, > 1, static.
      strength: lam > 0; a number or an array like k. May be traced. The mask is the hard one
        exactly where x_(k) - x_(k+1) >= lam, and tends to k/n as lam grows.
      solver: "threshold", or a solver of `isotonic.isotonic_regression`.
      axis: the axis of the items.

    Returns:
      The mask, of x's shape and dtype. At least k entries are non-zero (k whole).

    Derivative in x, k and strength, forward and reverse: with d_i = d y_i/d x_i at fixed threshold,
    J = diag(d) - d d^T / sum(d); finite everywhere, 0 where the mask is hard.

    Raises:
      ValueError: p <= 1, an unknown solver, k outside (0, n] or strength <= 0 (where not traced).

    Source: Sander et al. 2023, the relaxed top-k mask.
    """
    p = check_norm(p)
    x, k, lam, restore = rows(x, k, strength, axis)
    if solver == "threshold":
        link = CapLink(p) if p < 1.125 else MaskLink(p)
        return restore(threshold(link, x, k, lam).h)
    return restore(project_rows(nan_rows(x, k, lam), _top(k, x), lam, p, solver)[0])


def sparse_topk_magnitude(x, k, *, p=2.0, strength=1.0, solver="threshold", axis=-1):
    r"""Relaxes top-k in magnitude: returns x with all but its largest entries shrunk to 0.

    sign(x) (y + lam y^(p-1)) = sign(x) (y + |x| - u), with y = ((|x| - u)/lam)^(q-1) and u of

      min_u  || |x| - u ||_q^q / (q lam^(q-1)) + max_{0 <= m <= 1, \sum m = k} <u^2/2, m>.

    Entries well above the rest come back unchanged, those well below are exactly 0, and those in
    between are shrunk. Hard top-k where |x|_(k) >= |x|_(k+1) + lam |x|_(k+1)^(p-1).

    Arguments, errors and derivatives as for `sparse_topk_mask`, except that x must be
    finite and p from 1.1 to 4.

    Returns:
      The shrunk x, of x's shape and dtype.

    Source: Sander et al. 2023, the relaxed top-k in magnitude (phi(x) = x^2/2).
    """
    p = check_norm(p)
    if not 1.1 <= p <= 4:
        why = (
            "powers of the scores, which others take out of the range of floats or of their digits"
        )
        raise ValueError(f"p must be from 1.1 to 4 for magnitudes, that divide by {why}; got {p}")
    x, k, lam, restore = rows(x, k, strength, axis)
    x = x * jnp.where(jnp.abs(x) < jnp.inf, 1, jnp.nan)  # the derivative too is NaN there
    sign, a = jnp.sign(x), jnp.abs(x)
    if solver == "threshold":
        # Zeros are absent: with fewer than k others the root is tau = 0, far for a bisection.
        h, tau = threshold(MagnitudeLink(p), jnp.where(a == 0, -jnp.inf, a), k, lam)
        # y = h tau and lam y^(p-1) = a - tau where 0 < h < 1. A row of NaN stays one.
        tau = tau[..., None]
        out = jnp.where(h >= 1, a, jnp.where(h <= 0, 0, h * tau + (a - tau)))
    else:
        a = nan_rows(a, k, lam)
        y, shift = project_rows(a, _top(k, x), lam, p, solver, magnitude=True)
        out = y + jnp.maximum(shift, 0)
    return restore(sign * out)


def _top(k, x):
    """Returns the vector 1_k: k ones, then zeros; for a fractional k its rest in between."""
    return jnp.clip(k[..., None] - jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape), 0, 1)
