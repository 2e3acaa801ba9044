"""Pool adjacent violators for the p-norm problems of `isotonic.pnorm`: how two blocks merge.

Sander et al., "Fast, Differentiable and Sparse Top-k: a Convex Analysis Perspective" (ICML 2023,
arXiv 2302.01425). A block B with value g solves, with q = p/(p - 1) and d_i = (s_i - g)/lam,

  mask:       sum_B d_i^(q-1) = sum_B w_i
  magnitude:  sum_B d_i^(q-1) = g sum_B w_i

where d_i >= 0 for every block that pooling forms: s is sorted, and the last position of a pooled
block would on its own lie above g, yet below s.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from isotonic.blocks import Fit
from isotonic.pav import over_rows, pool
from isotonic.powers import conjugate_exponent, power
from isotonic.roots import falling_root


class Moments(NamedTuple):
    """A block whose equation is a polynomial, for q - 1 in {2, 3}. Scalars, or `[n]`.

    Moments are about the block's own mean and in units of lam: sums of s^3 would keep no digit of
    (s - g)^3 in float32 when s is far from 0.
    """

    start: jax.Array  # first position of the block
    value: jax.Array  # g
    weight: jax.Array  # sum of w
    mean: jax.Array  # of s
    m2: jax.Array  # sum of ((s - mean)/lam)^2
    m3: jax.Array  # sum of ((s - mean)/lam)^3


class Elements(NamedTuple):
    """A block whose equation is solved over its own elements, for any other q. As `Moments`."""

    start: jax.Array
    value: jax.Array
    weight: jax.Array


def pav_pnorm(s, w, lam, *, p: float, magnitude: bool) -> Fit:
    """Solve the problem of `isotonic.pnorm.isotonic_pnorm` along the last axis.

    For p in {3/2, 4/3} a merge costs O(1) and a row O(n). For another p a merge passes over
    the new block some five times, so that a row costs O(n) times the width of its pools.

    Args:
      s: finite scores `[..., n]`, decreasing; n >= 1; >= 0 for magnitude.
      w: weights `[..., n]`, decreasing and >= 0.
      lam: strength `[..., 1]` > 0.
      p: of the norm, > 1; magnitude: which of the two problems.
    """
    exponent = conjugate_exponent(p)
    solve = _by_moments if exponent in (2, 3) else _by_elements
    solve = partial(solve, exponent=exponent, magnitude=magnitude)
    return over_rows(solve)(s, w, lam)


def _by_moments(s, w, lam, exponent, magnitude) -> Fit:
    lam = lam[0]

    def merge(left: Moments, right: Moments, stop) -> Moments:
        n_1 = (right.start - left.start).astype(s.dtype)
        n_2 = (stop - right.start).astype(s.dtype)
        n = n_1 + n_2
        gap = (right.mean - left.mean) / lam
        share_1, share_2 = n_1 / n, n_2 / n
        # Chan, Golub and LeVeque (1979), and its third-order extension by Pebay (2008).
        m2 = left.m2 + right.m2 + gap**2 * n_1 * share_2
        m3 = left.m3 + right.m3 + gap**3 * n_1 * share_2 * (share_1 - share_2)
        m3 = m3 + 3 * gap * (share_1 * right.m2 - share_2 * left.m2)
        mean = left.mean + (right.mean - left.mean) * share_2
        weight = left.weight + right.weight
        value = _polynomial_root(n, weight, mean, m2, m3, lam, exponent, magnitude)
        return Moments(left.start, value, weight, mean, m2, m3)

    zero = jnp.zeros_like(s)
    value = _polynomial_root(jnp.ones_like(s), w, s, zero, zero, lam, exponent, magnitude)
    start = jnp.arange(s.shape[0], dtype=jnp.int32)
    return pool(Moments(start, value, w, s, zero, zero), merge)


def _polynomial_root(n, weight, mean, m2, m3, lam, exponent, magnitude):
    """Value g = mean - lam t of a block, where t >= 0 solves

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
        t = 2 * right / jnp.where(twice > 0, twice, 1)
    else:
        t = _cubic_root(m2 / n + linear / 3, right - m3 / n)
    g = mean - lam * t
    return jnp.maximum(g, 0) if magnitude else g


def _cubic_root(a, b):
    """Real root t of t^3 + 3 a t = b for a >= 0: Cardano's, free of cancellation and overflow.

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


def _by_elements(s, w, lam, exponent, magnitude) -> Fit:
    lam = lam[0]

    def terms(s_i, g):
        """d_i^(q-1) and its derivative by g."""
        d = jnp.maximum((s_i - g) / lam, jnp.finfo(s.dtype).tiny)
        d_power = power(d, exponent)
        return d_power, -exponent * (d_power / d) / lam

    def balance(total, slope, weight, g):
        """The block's equation: left side minus right side, and its slope."""
        if magnitude:
            return total - weight * g, slope - weight
        return total - weight, slope

    def merge(left: Elements, right: Elements, stop) -> Elements:
        weight = left.weight + right.weight

        def excess(g):
            def add(j, sums):
                return jax.tree.map(jnp.add, sums, terms(s[j], g))

            zero = jnp.zeros_like(g)
            return balance(*lax.fori_loop(left.start, stop, add, (zero, zero)), weight, g)

        share = (stop - right.start).astype(s.dtype) / (stop - left.start).astype(s.dtype)
        guess = left.value + (right.value - left.value) * share
        scale = s[left.start] - left.value
        value = falling_root(excess, guess, left.value, right.value, scale)
        return Elements(left.start, value, weight)

    if magnitude:
        zero = jnp.zeros_like(s)
        alone = falling_root(lambda g: balance(*terms(s, g), w, g), s / 2, zero, s, zero)
        # d^(q-1) underflows long before d does, and would pass for 0.
        alone = jnp.where(w > 0, alone, s)
    else:
        alone = s - lam * w ** (1 / exponent)
    return pool(Elements(jnp.arange(s.shape[0], dtype=jnp.int32), alone, w), merge)
