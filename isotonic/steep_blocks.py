"""Digits for p > 2: there y = d^(q-1) has an infinite slope at d = 0.

An error of eps in d = (s - v)/lam is one of eps^(1/(p-1)) in y. So each block is solved once more,
for the y of the position where d is nearest to 0. From there

  d_i = y^(p-1) + (s_i - s)/lam

adds nothing up that cancels, and the sum of the y_i is convex in y, with slopes of 1 at most.
"""

import jax
import jax.numpy as jnp

from isotonic.blocks import block_sum
from isotonic.powers import conjugate_exponent, signed_power
from isotonic.roots import falling_root


def solve_again(d, block, s, w, lam, p: float, magnitude: bool):
    """Returns d to the digits that d^(q-1) needs.

    Args:
      d, block: of a solution `[..., n]` whose blocks are right.
      s, w, lam, p, magnitude: the problem, as for `isotonic.merge.merge_pnorm`.
    """
    exponent = conjugate_exponent(p)
    near, s_near = _nearest_to_zero(d, s, block)
    gap = (s - s_near) / lam
    weight, count, size = (
        block_sum(a, block) for a in (w, jnp.ones_like(w), jnp.abs(signed_power(d, exponent)))
    )

    def excess(y_near):
        d_near = signed_power(y_near, p - 1)
        y = signed_power(d_near + gap, exponent)
        y = jnp.where(gap == 0, y_near, y)
        slope = jnp.abs(y_near / jnp.where(y == 0, 1, y)) ** (p - 2)
        slope = jnp.where(gap == 0, 1, slope)
        pull, pull_slope = weight, 0
        if magnitude:
            pull = weight * (s_near - lam * d_near)
            pull_slope = weight * lam * (p - 1) * jnp.abs(y_near) ** (p - 2)
        return pull - block_sum(y, block), -block_sum(slope, block) - pull_slope

    start = signed_power(near, exponent)
    y_near = falling_root(excess, start, -size, size, size / count, size == 0)
    return signed_power(y_near, p - 1) + gap


def _nearest_to_zero(d, s, block):
    """Returns d and s of the position in each block where |d| is least."""

    def nearer(a, b):
        keep = (a[2] == b[2]) & (jnp.abs(a[0]) < jnp.abs(b[0]))
        return tuple(jnp.where(keep, x, y) for x, y in zip(a, b, strict=True))

    last = d.ndim - 1
    before = jax.lax.associative_scan(nearer, (d, s, block), axis=last)
    after = jax.lax.associative_scan(nearer, (d, s, block), axis=last, reverse=True)
    return nearer(before, after)[:2]
