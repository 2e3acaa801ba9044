r"""Isotonic optimization by merging solved halves: exact, data-parallel, of depth log2(n).

If two adjacent halves are solved and the last value of the left one lies below the first of the
right one, exactly one pool straddles the seam: it takes from the left all values below some m, from
the right all above it, and m is where the derivatives of their losses add up to 0. So each level is
one scalar root per seam, over sums along the segment, for any convex separable loss.

All seams of a level are solved together; a level costs a few passes over the data.
"""

import jax.numpy as jnp
from jax import lax

from isotonic.blocks import Fit, Offset, positions
from isotonic.pav import pav
from isotonic.powers import conjugate_exponent, power
from isotonic.roots import falling_root
from isotonic.rows import row_sum

# Where loops over scalars are compiled, as on CPU, PAV solves short segments faster than merging.
CPU_LEAF = 256


def merge(y, w, offset: Offset | None = None) -> Fit:
    r"""Solves  argmin_{v_1 >= ... >= v_n}  1/2 \sum_i w_i (y_i - v_i)^2  along the last axis.

    Arguments, zero weights and result as for `isotonic.pav.pav`; the largest weight about 1.
    """
    # The limit of small equal weights, to all digits.
    w = jnp.maximum(w, jnp.finfo(w.dtype).tiny ** 0.5)

    def terms(v, y, w):
        return w * (y - v), -w

    def on_cpu(y, w, *offset):
        leaf = 1
        while leaf < min(CPU_LEAF, y.shape[-1]):
            leaf *= 2
        y, w = _pad(y, leaf, -jnp.inf), _pad(w, leaf, 1)
        segments = (*y.shape[:-1], y.shape[-1] // leaf, leaf)
        parts = [a.reshape(segments) for a in (y, w)]
        if offset:
            x, unit = offset
            unit = jnp.broadcast_to(unit[..., None], (*segments[:-1], 1))
            parts.append(Offset(_pad(x, leaf, 0).reshape(segments), unit))
        fit = pav(*parts)
        first = positions(y) // leaf * leaf
        fit = Fit(fit.v.reshape(y.shape), first + fit.block.reshape(y.shape))
        return merge_segments(terms, fit, leaf, y, w, offset=offset)

    def alone(y, w, *offset):
        return merge_segments(terms, Fit(y, positions(y)), 1, y, w, offset=offset)

    fit = lax.platform_dependent(y, w, *(offset or ()), cpu=on_cpu, default=alone)
    return _cut(fit, y.shape[-1])


def merge_pnorm(d, s, w, lam, *, p: float, magnitude: bool) -> Fit:
    r"""Solves the problem of `isotonic.pnorm.isotonic_pnorm` along the last axis.

    Args:
      d: (s - v)/lam of each position as a block of its own, `[..., n]`; never pooled if infinite.
      s: finite scores `[..., n]`, in any order; >= 0 for magnitude.
      w: weights `[..., n]`, in any order; of any sign for the mask, >= 0 for magnitude.
      lam: strength `[..., 1]` > 0.
      p: of the norm, > 1; magnitude: which of the two problems.

    Returns:
      The fit, with v in units of lam and less s/lam: minus the d of the solution.
    """
    terms = pnorm_terms(p, magnitude)
    data = s, w, jnp.broadcast_to(lam, s.shape)
    fit = merge_segments(terms, Fit(-d, positions(d)), 1, *data, offset=(s, lam))
    return _cut(fit, s.shape[-1])


def pnorm_terms(p: float, magnitude: bool):
    """Returns the function that gives minus the derivative of each loss, and the slope of that.

    Its arguments are v, less s/lam and in units of lam, and s, w and lam.
    """
    exponent = conjugate_exponent(p)

    def terms(v, s, w, lam):
        size = jnp.maximum(jnp.abs(v), jnp.finfo(v.dtype).tiny)
        d_power = power(size, exponent)
        slope = -exponent * (d_power / size)
        if magnitude:
            return -jnp.sign(v) * d_power - w * (s + lam * v), slope - lam * w
        return -jnp.sign(v) * d_power - w, slope

    return terms


def merge_segments(terms, fit: Fit, length: int, *data, offset=()) -> Fit:
    """Merges solved segments of one length into a solution of the row.

    Args:
      terms: (v, *data) -> minus the derivative of each position's loss at v, and the derivative
        of that by v, both of the data's shape; the second < 0.
      fit: the segments' fits; blocks are positions in the row.
      length: of the segments, by which the row's length is divisible.
      data: arrays `[..., n]` that `terms` needs.
      offset: the fields of an `Offset`, if values are less known parts.
    """
    n = -(-fit.v.shape[-1] // length)
    total = length << (n - 1).bit_length()
    v, block = _pad(fit.v, total, -jnp.inf), _pad(fit.block, total, 0)
    data = [_pad(a, total, 1) for a in data]  # never pooled: its value is -inf
    while length < total:
        shape = (*v.shape[:-1], total // (2 * length), 2 * length)
        split = [a.reshape(shape) for a in (v, block, *data)]
        gap = 0
        if offset:
            x = _pad(offset[0], total, 0).reshape(shape)
            gap = (x - x[..., length - 1 : length]) / offset[1][..., None]
        pooled = _merge_pairs(terms, *split, gap, length)
        v, block = (a.reshape(v.shape) for a in pooled)
        length *= 2
    return Fit(v, block)


def _merge_pairs(terms, v, block, *rest):
    """Merges one level: v `[..., segments, 2 length]`, each half solved.

    A pool's value m is less the offset at the seam, `gap` lower than each position's own.
    """
    *data, gap, length = rest
    right = jnp.arange(2 * length) >= length
    level = v + gap
    a, b = level[..., length - 1], level[..., length]

    def inside(m):
        return jnp.where(right, level > m[..., None], level < m[..., None])

    def sums(m):
        pooled = inside(m)
        value, slope = terms(m[..., None] - gap, *data)
        return tuple(row_sum(jnp.where(pooled, x, 0)) for x in (value, slope))

    scale = jnp.maximum(jnp.abs(a), jnp.abs(b))
    m = falling_root(sums, a / 2 + b / 2, a, b, scale, ~(a < b))
    pooled = inside(m) & (a < b)[..., None]
    # A pool starts where the left half's first value below m does.
    first = jnp.where(pooled, block, jnp.iinfo(block.dtype).max).min(-1, keepdims=True)
    return jnp.where(pooled, m[..., None] - gap, v), jnp.where(pooled, first, block)


def _pad(x, multiple: int, value):
    """Returns x `[..., n]` with its last axis filled up to a multiple."""
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=value)


def _cut(fit: Fit, n: int) -> Fit:
    return Fit(fit.v[..., :n], fit.block[..., :n])
