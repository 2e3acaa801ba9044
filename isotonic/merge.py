r"""Isotonic optimization by merging solved halves: exact, data-parallel, of depth log2(n).

If two adjacent halves are solved and the last value of the left one lies below the first of the
right one, exactly one pool straddles the seam: it takes from the left all values below some m, from
the right all above it, and m is where the derivatives of their losses add up to 0. So each level is
one scalar root per seam, over sums along the segment, for any convex separable loss.

All seams of a level are solved together; a level costs a few passes over the data.
"""

import jax.numpy as jnp
from jax import lax

from isotonic.blocks import Fit
from isotonic.pav import pav
from isotonic.powers import conjugate_exponent, power, signed_power
from isotonic.roots import falling_root
from isotonic.rows import row_sum

# Where loops over scalars are compiled, as on CPU, PAV solves short segments faster than merging.
CPU_LEAF = 256


def merge(y, w) -> Fit:
    r"""Solve  argmin_{v_1 >= ... >= v_n}  1/2 \sum_i w_i (y_i - v_i)^2  along the last axis.

    Arguments, zero weights and result as for `isotonic.pav.pav`.
    """
    w = w / jnp.where((top := w.max(-1, keepdims=True)) > 0, top, 1)
    # The limit of small equal weights, to all digits.
    w = jnp.maximum(w, jnp.finfo(w.dtype).tiny ** 0.5)

    def terms(m, y, w):
        return w * (y - m), -w

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
    lam = jnp.broadcast_to(lam, s.shape)
    terms = pnorm_terms(p, magnitude)
    alone = alone_pnorm(s, w, lam, 0.0, p, magnitude)
    return _cut(merge_segments(terms, _apart(alone), 1, s, w, lam), s.shape[-1])


def pnorm_terms(p: float, magnitude: bool):
    """(m, s, w, lam) -> minus the derivative of each position's loss at m, and its slope in m."""
    exponent = conjugate_exponent(p)

    def terms(m, s, w, lam):
        d = (s - m) / lam
        size = jnp.maximum(jnp.abs(d), jnp.finfo(d.dtype).tiny)
        d_power = power(size, exponent)
        slope = -exponent * (d_power / size / lam)
        if magnitude:
            return jnp.sign(d) * d_power - w * m, slope - w
        return jnp.sign(d) * d_power - w, slope

    return terms


def alone_pnorm(s, w, lam, tilt, p: float, magnitude: bool):
    """Each position as a block of its own: where minus the derivative of its loss is `tilt`."""
    exponent = conjugate_exponent(p)
    if not magnitude:
        return s - lam * signed_power(w + tilt, 1 / exponent)
    terms = pnorm_terms(p, magnitude)

    def excess(v):
        value, slope = terms(v, s, w, lam)
        return value - tilt, slope

    other = s - lam * signed_power(w * s + tilt, 1 / exponent)
    low, high = jnp.minimum(s, other), jnp.maximum(s, other)
    return falling_root(excess, (low + high) / 2, low, high, jnp.zeros_like(s), low == high)


def _apart(v) -> Fit:
    index = jnp.arange(v.shape[-1], dtype=jnp.int32)
    return Fit(v, jnp.broadcast_to(index, v.shape))


def merge_segments(terms, fit: Fit, length: int, *data) -> Fit:
    """Merge solved segments of one length into a solution of the row.

    Args:
      terms: (m, *data) -> minus the derivative of each position's loss at m, and the derivative
        of that by m, both of the data's shape; the second < 0.
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

    scale = jnp.maximum(jnp.abs(a), jnp.abs(b))
    m = falling_root(sums, a / 2 + b / 2, a, b, scale, ~(a < b))
    pooled = inside(m) & (a < b)[..., None]
    # A pool starts where the left half's first value below m does.
    first = jnp.where(pooled, block, jnp.iinfo(block.dtype).max).min(-1, keepdims=True)
    return jnp.where(pooled, m[..., None], v), jnp.where(pooled, first, block)


def _pad(x, multiple: int, value):
    """x `[..., n]` with its last axis filled up to a multiple."""
    missing = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=value)


def _cut(fit: Fit, n: int) -> Fit:
    return Fit(fit.v[..., :n], fit.block[..., :n])
