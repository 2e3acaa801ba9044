r"""Isotonic optimization by merging solved halves: exact, data-parallel, of depth log2(n).

If two adjacent halves are solved and the last value of the left one lies below the first of the
right one, exactly one pool straddles the seam: it takes from the left all values below some m, from
the right all above it, and m is where the derivatives of their losses add up to 0. So each level is
one scalar root per seam, over sums along the segment, for any convex separable loss.

All seams of a level are solved together; a level costs a few passes over the data.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from isotonic.blocks import Fit
from isotonic.pav import pav
from isotonic.powers import conjugate_exponent, power
from isotonic.rows import row_sum

# Where loops over scalars are compiled, as on CPU, PAV solves short segments faster than merging.
CPU_LEAF = 256
MAX_PASSES = 300  # of a root search; bisection alone crosses the float64 range in fewer


class _Root(NamedTuple):
    """State of the search at each seam."""

    m: jax.Array
    low: jax.Array
    high: jax.Array
    done: jax.Array


def merge(y, w) -> Fit:
    r"""Solve  argmin_{v_1 >= ... >= v_n}  1/2 \sum_i w_i (y_i - v_i)^2  along the last axis.

    Arguments, zero weights and result as for `isotonic.pav.pav`.
    """
    w = w / jnp.where((top := w.max(-1, keepdims=True)) > 0, top, 1)
    # The limit of small equal weights, to all digits.
    w = jnp.maximum(w, jnp.finfo(w.dtype).tiny ** 0.5)

    def terms(m, y, w):
        return w * (y - m), w

    def on_cpu(y, w):
        leaf = 1
        while leaf < min(CPU_LEAF, y.shape[-1]):
            leaf *= 2
        y, w = _pad(y, leaf, -jnp.inf), _pad(w, leaf, 1)
        segments = (*y.shape[:-1], y.shape[-1] // leaf, leaf)
        fit = pav(y.reshape(segments), w.reshape(segments))
        offset = leaf * jnp.arange(segments[-2], dtype=jnp.int32)[:, None]
        fit = Fit(fit.v.reshape(y.shape), (fit.block + offset).reshape(y.shape))
        return merge_segments(terms, fit, leaf, y, w)

    def alone(y, w):
        return merge_segments(terms, _apart(y), 1, y, w)

    return _cut(lax.platform_dependent(y, w, cpu=on_cpu, default=alone), y.shape[-1])


def merge_pnorm(s, w, lam, *, p: float, magnitude: bool) -> Fit:
    r"""Solve the problem of `isotonic.pnorm.isotonic_pnorm` along the last axis.

    Args:
      s: finite scores `[..., n]`, in any order; >= 0 for magnitude.
      w: weights `[..., n]`, in any order; of any sign for the mask, >= 0 for magnitude.
      lam: strength `[..., 1]` > 0.
      p: of the norm, > 1; magnitude: which of the two problems.
    """
    exponent = conjugate_exponent(p)

    def terms(m, s, w, lam):
        d = (s - m) / lam
        size = jnp.maximum(jnp.abs(d), jnp.finfo(d.dtype).tiny)
        d_power = power(size, exponent)
        slope = exponent * d_power / size / lam
        if magnitude:
            return jnp.sign(d) * d_power - w * m, slope + w
        return jnp.sign(d) * d_power - w, slope

    lam = jnp.broadcast_to(lam, s.shape)
    start = _alone(terms, exponent, magnitude, s, w, lam)
    return _cut(merge_segments(terms, _apart(start), 1, s, w, lam), s.shape[-1])


def _alone(terms, exponent, magnitude, s, w, lam):
    """Each position as a block of its own."""
    root = jnp.sign(w) * power(jnp.abs(w), 1 / exponent)
    if not magnitude:
        return s - lam * root
    zero = jnp.zeros_like(s)
    state = _Root(s / 2, zero, s, ~((s > 0) & (w > 0)))
    return jnp.where(w > 0, _solve(partial(_one, terms, s, w, lam), state), s)


def _one(terms, s, w, lam, m):
    return terms(m, s, w, lam)


def _apart(v) -> Fit:
    index = jnp.arange(v.shape[-1], dtype=jnp.int32)
    return Fit(v, jnp.broadcast_to(index, v.shape))


def merge_segments(terms, fit: Fit, length: int, *data) -> Fit:
    """Merge solved segments of one length into a solution of the row.

    Args:
      terms: (m, *data) -> minus the derivative of each position's loss at m, and minus the
        derivative of that by m, both of the data's shape; the second > 0.
      fit: the segments' fits; blocks are positions in the row.
      length: of the segments, by which the row's length is divisible.
      data: arrays `[..., n]` that `terms` needs.
    """
    n = -(-fit.v.shape[-1] // length)
    total = length << (n - 1).bit_length()
    v, block = _pad(fit.v, total, -jnp.inf), _pad(fit.block, total, 0)
    data = [_pad(a, total, 1) for a in data]  # never pooled: its value is -inf
    while length < total:
        shape = (*v.shape[:-1], total // (2 * length), 2 * length)
        split = [a.reshape(shape) for a in (v, block, *data)]
        pooled = _merge_pairs(terms, *split, length)
        v, block = (a.reshape(v.shape) for a in pooled)
        length *= 2
    return Fit(v, block)


def _merge_pairs(terms, v, block, *rest):
    """One level: v `[..., segments, 2 length]`, each half solved."""
    *data, length = rest
    right = jnp.arange(2 * length) >= length
    a, b = v[..., length - 1], v[..., length]

    def inside(m):
        return jnp.where(right, v > m[..., None], v < m[..., None])

    def sums(m):
        pooled = inside(m)
        value, slope = terms(m[..., None], *data)
        return tuple(row_sum(jnp.where(pooled, x, 0)) for x in (value, slope))

    m = _solve(sums, _Root(a / 2 + b / 2, a, b, ~(a < b)))
    pooled = inside(m) & (a < b)[..., None]
    # A pool starts where the left half's first value below m does.
    first = jnp.where(pooled, block, jnp.iinfo(block.dtype).max).min(-1, keepdims=True)
    return jnp.where(pooled, m[..., None], v), jnp.where(pooled, first, block)


def _solve(sums, state: _Root):
    """Root of a decreasing function, at each seam: Newton's step, or bisection where it leaves.

    `sums` gives its values and minus its slopes. For least squares a step is the mean of a pool, so
    that the root is exact as soon as the pool is right.
    """
    eps = jnp.finfo(state.m.dtype).eps
    scale = jnp.maximum(jnp.abs(state.low), jnp.abs(state.high))

    def unfinished(carry):
        state, passes = carry
        return ~state.done.all() & (passes < MAX_PASSES)

    def improve(carry):
        state, passes = carry
        value, slope = sums(state.m)
        low = jnp.where(value > 0, state.m, state.low)
        high = jnp.where(value < 0, state.m, state.high)
        newton = state.m + value / slope
        converged = ~(jnp.abs(newton - state.m) > 2 * eps * scale) | (value == 0)
        fast = (newton > low) & (newton < high) & ((passes < 12) | (passes % 3 > 0))
        middle = low / 2 + high / 2
        there = jnp.where(fast, newton, jnp.where(converged, state.m, middle))
        done = state.done | converged | (~fast & ((middle <= low) | (middle >= high)))
        return _Root(jnp.where(state.done, state.m, there), low, high, done), passes + 1

    return lax.while_loop(unfinished, improve, (state, 0))[0].m


def _pad(x, multiple: int, value):
    """x `[..., n]` with its last axis filled up to a multiple."""
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=value)


def _cut(fit: Fit, n: int) -> Fit:
    return Fit(fit.v[..., :n], fit.block[..., :n])
