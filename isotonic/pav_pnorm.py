"""Pool adjacent violators for the p-norm problems of `isotonic.pnorm`: how two blocks merge.

Sander et al., "Fast, Differentiable and Sparse Top-k: a Convex Analysis Perspective" (ICML 2023,
arXiv 2302.01425). A block B with value g solves, with q = p/(p - 1) and d_i = (s_i - g)/lam,

  mask:       sum_B d_i^(q-1) = sum_B w_i
  magnitude:  sum_B d_i^(q-1) = g sum_B w_i

where d_i >= 0 for every block that pooling forms: s is sorted, and the last position of a pooled
block would on its own lie above g, yet below s.

A block is known by the d of its first position: g itself keeps no digit of a d that is small
beside s/lam.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from isotonic.blocks import Fit, positions
from isotonic.pav import expand, over_rows, pool
from isotonic.powers import conjugate_exponent, power
from isotonic.roots import falling_root


class Moments(NamedTuple):
    """A block whose equation is a polynomial, for q - 1 in {2, 3}. Scalars, or `[n]`.

    Moments are about the block's own mean and in units of lam: sums of s^3 would keep no digit of
    (s - g)^3 in float32 when s is far from 0.
    """

    start: jax.Array  # first position of the block
    d: jax.Array  # of the first position
    s: jax.Array  # of the first position
    weight: jax.Array  # sum of w
    fall: jax.Array  # from the first s to the mean of s, over lam
    m2: jax.Array  # sum of ((s - mean)/lam)^2
    m3: jax.Array  # sum of ((s - mean)/lam)^3


class Elements(NamedTuple):
    """A block whose equation is solved over its own elements, for any other q. As `Moments`."""

    start: jax.Array
    d: jax.Array
    s: jax.Array
    weight: jax.Array


def pav_pnorm(d, s, w, lam, *, p: float, magnitude: bool) -> Fit:
    """Solves the problem of `isotonic.pnorm.isotonic_pnorm` along the last axis.

    For p in {3/2, 4/3} a merge costs O(1) and a row O(n). For another p a merge passes over
    the new block some five times, so that a row costs O(n) times the width of its pools.

    Args:
      d: (s - v)/lam of each position as a block of its own, `[..., n]`; never pooled if infinite.
      s: finite scores `[..., n]`, decreasing; n >= 1; >= 0 for magnitude.
      w: weights `[..., n]`, decreasing and >= 0.
      lam: strength `[..., 1]` > 0.
      p: of the norm, > 1; magnitude: which of the two problems.

    Returns:
      The fit, with v in units of lam and less s/lam: minus the d of the solution.
    """
    exponent = conjugate_exponent(p)
    merge = _by_moments if exponent in (2, 3) else _by_elements
    row = partial(_row, exponent=exponent, magnitude=magnitude, by=merge)
    return over_rows(row)(d, s, w, lam)


def _row(d, s, w, lam, exponent, magnitude, by) -> Fit:
    lam = lam[0]
    blocks, merge = by(d, s, w, lam, exponent, magnitude)
    stack = pool(blocks, merge, lambda left, right: _distance(left, right, lam) < left.d - right.d)
    block, d, first = expand(stack.start, stack.d, stack.s)
    return Fit((first - s) / lam - d, block)


def _distance(left, right, lam):
    """Returns how far s falls, in units of lam, from one block's start to that of the next."""
    return (left.s - right.s) / lam


def _by_moments(d, s, w, lam, exponent, magnitude):
    def merge(left: Moments, right: Moments, stop) -> Moments:
        n_1 = (right.start - left.start).astype(s.dtype)
        n_2 = (stop - right.start).astype(s.dtype)
        n = n_1 + n_2
        fall = _distance(left, right, lam) + right.fall - left.fall
        share_1, share_2 = n_1 / n, n_2 / n
        # Chan, Golub and LeVeque (1979), and its third-order extension by Pebay (2008).
        m2 = left.m2 + right.m2 + fall**2 * n_1 * share_2
        m3 = left.m3 + right.m3 - fall**3 * n_1 * share_2 * (share_1 - share_2)
        m3 = m3 - 3 * fall * (share_1 * right.m2 - share_2 * left.m2)
        fall = left.fall + fall * share_2
        weight = left.weight + right.weight
        t = _polynomial_root(n, weight, left.s - lam * fall, m2, m3, lam, exponent, magnitude)
        return Moments(left.start, t + fall, left.s, weight, fall, m2, m3)

    zero = jnp.zeros_like(s)
    return Moments(positions(s), d, s, w, zero, zero, zero), merge


def _polynomial_root(n, weight, mean, m2, m3, lam, exponent, magnitude):
    """Solves for t >= 0 that gives a block the value mean - lam t:

    exponent 2:  t^2 + m2/n = b (mean - lam t) / n
    exponent 3:  t^3 + 3 (m2/n) t + m3/n = b (mean - lam t) / n

    with b = weight; for the mask, read b in place of b (mean - lam t). Elementwise.
    """
    right = weight * mean / n if magnitude else weight / n
    linear = lam * (weight / n) if magnitude else jnp.zeros_like(n)
    linear = jnp.minimum(linear, jnp.finfo(mean.dtype).max / 8)
    if exponent == 2:
        right = jnp.maximum(right - m2 / n, 0)
        twice = linear + jnp.hypot(linear, 2 * jnp.sqrt(right))
        return 2 * right / jnp.where(twice > 0, twice, 1)
    return _cubic_root(m2 / n + linear / 3, right - m3 / n)


def _cubic_root(a, b):
    """Returns the real root of t^3 + 3 a t = b, a >= 0, by Cardano, free of cancellation.

    With u = cbrt(b/2 + sqrt(b^2/4 + a^3)), t = u - a/u is written as b / (u^2 + a + (a/u)^2).
    """
    scale = jnp.maximum(jnp.sqrt(a), jnp.cbrt(jnp.abs(b)))
    safe = jnp.where(scale > 0, scale, 1)
    # Powers of the ratios: scale^2 and scale^3 may leave the float range.
    a, b_3 = a / safe / safe, b / safe / safe / safe
    half = jnp.abs(b_3) / 2
    u = jnp.cbrt(half + jnp.sqrt(half**2 + a**3))
    u = jnp.where(scale > 0, u, 1)
    return (b / safe / safe) / (u**2 + a + (a / u) ** 2)


def _by_elements(d, s, w, lam, exponent, magnitude):
    def merge(left: Elements, right: Elements, stop) -> Elements:
        weight = left.weight + right.weight

        def excess(d):
            def add(j, sums):
                size = jnp.maximum(d - (left.s - s[j]) / lam, jnp.finfo(s.dtype).tiny)
                d_power = power(size, exponent)
                return sums[0] - d_power, sums[1] - exponent * (d_power / size)

            sums = (weight * (left.s - lam * d), -lam * weight) if magnitude else (weight, zero)
            return lax.fori_loop(left.start, stop, add, sums)

        zero = jnp.zeros_like(weight)
        low, high = right.d + _distance(left, right, lam), left.d
        share = (stop - right.start).astype(s.dtype) / (stop - left.start).astype(s.dtype)
        d = falling_root(excess, high + (low - high) * share, low, high, high)
        return Elements(left.start, d, left.s, weight)

    return Elements(positions(s), d, s, w), merge
