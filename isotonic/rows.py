"""Sums along rows, and thresholds carried as two floats: what the threshold search is made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SHORT = 8  # rows of so few items are added up by fours,
LARGE = 2**18  # and where there are so many in all, writing them takes longer than adding
LONGEST_DOT = 4096  # a matrix-vector product adds some n/32 terms in sequence: digits go beyond it


def row_sum(x):
    """Sums over the last axis, `[..., n]` to `[...]`.

    Written as a product with ones: on CPU that is the vectorised routine, three times faster than
    a reduction and its derivative; elsewhere XLA turns it back into a reduction and fuses it.
    """
    n = x.shape[-1]
    if n > LONGEST_DOT:
        return x.sum(-1)
    ones = jnp.ones(n, x.dtype)
    return jax.lax.dot_general(x, ones, (((x.ndim - 1,), (0,)), ((), ())), precision="highest")


def row_total(x):
    """As `row_sum`, for sums that are not differentiated: on CPU faster where x is large.

    XLA computes what is summed while it adds up four neighbours, and writes a quarter of it.
    Neighbours, so that no device needs those of another.
    """
    n = x.shape[-1]
    if n % 4 or is_spread(x) or not (n <= SHORT or x.size >= LARGE):
        return row_sum(x)
    return jax.lax.platform_dependent(x, cpu=_by_fours, default=row_sum)


def _by_fours(x):
    fours = x.reshape(*x.shape[:-1], x.shape[-1] // 4, 4)
    a, b, c, d = (fours[..., i] for i in range(4))
    return row_sum((a + b) + (c + d))


def is_spread(x):
    """Tells whether an axis of x is spread over devices of a mesh that types know of."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def over_row(t, n):
    """`t` `[...]` at each of n items, `[..., n]`: a broadcast whose transpose is `row_sum`."""
    if n > LONGEST_DOT:
        return jnp.broadcast_to(t[..., None], (*t.shape, n))
    ones = jnp.ones(n, t.dtype)
    return jax.lax.dot_general(t, ones, (((), ()), ((), ())), precision="highest")


def per_row(x, *numbers):
    """Returns each number, broadcast, at every row of x `[..., n]`: `[...]` of x's dtype.

    On a mesh they lie where the rows lie, which a broadcast alone would not tell.
    """
    zero = jnp.zeros_like(x.sum(-1))
    return tuple(zero + jnp.asarray(number, x.dtype) for number in numbers)


def below_infinity(x):
    """Returns x, its entries of +inf as the largest float: inf - inf is no gap to a threshold."""
    return jnp.minimum(x, jnp.finfo(x.dtype).max)


def count_inside(u):
    """How many of u `[..., n]` are between 0 and 1, and how many at least 1."""
    if u.shape[-1] > LONGEST_DOT:
        return row_total(((u > 0) & (u < 1)).astype(u.dtype)), row_total((u >= 1).astype(u.dtype))
    # One sum for both: whole numbers below 2^26, of few bits, are exact.
    base = 2.0 ** (LONGEST_DOT.bit_length())
    packed = row_total(jnp.where(u >= 1, base, jnp.where(u > 0, 1, 0)).astype(u.dtype))
    whole = jnp.floor(packed / base)
    return packed - base * whole, whole


class Pair(NamedTuple):
    """Holds a number as the unevaluated sum of two floats, |low| at most an ulp of high."""

    high: jax.Array
    low: jax.Array

    def plus(self, step) -> "Pair":
        """Returns self + step, by Knuth's exact two-sum."""
        step = self.low + step
        total = self.high + step
        part = total - self.high
        return Pair(total, (self.high - (total - part)) + (step - part))

    def gap(self, x):
        """Returns x - self for x `[..., n]`, self `[...]`, without the rounding of |self|."""
        return (x - self.high[..., None]) - self.low[..., None]

    def where(self, condition, other: "Pair") -> "Pair":
        """self where the condition holds, else the other."""
        return Pair(*(jnp.where(condition, a, b) for a, b in zip(self, other, strict=True)))


def middle_float(low, high):
    """Returns the float half way between two in the order of floats, by 8 steps on exponents.

    Bisecting values instead takes a hundred steps to get from 1e30 to 1.
    """
    whole = jnp.int64 if low.dtype == jnp.float64 else jnp.int32
    least = jnp.iinfo(whole).min

    def flip(i):  # between the bits of a float and its rank; its own inverse
        return jnp.where(i < 0, least - i, i)

    rank_low, rank_high = (flip(jax.lax.bitcast_convert_type(x, whole)) for x in (low, high))
    rank = (rank_low >> 1) + (rank_high >> 1) + (rank_low & rank_high & 1)
    return jax.lax.bitcast_convert_type(flip(rank), low.dtype)
