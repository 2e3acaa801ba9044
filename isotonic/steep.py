r"""Roots for p > 2, where a selection u^(q-1) leaves 0 with an infinite slope.

A threshold that is a rounding off then selects eps^(q-1) too much: at p = 4 that is 0.005, at
p = 100 a half. So the root is not sought as a threshold but as the lowest item that is selected,
which is exact, and its power y = (gap/lam)^(q-1), in which the sum is well-conditioned: with
gap^* = lam y^(p-1) below that item, the others have

  y_i = ((x_i - item)/lam + y^(p-1))^(q-1),    h_i = min(y_i/cap, 1).
"""

import jax
import jax.numpy as jnp

from isotonic.powers import power
from isotonic.roots import falling_root
from isotonic.rows import Pair, middle_float, row_sum


def steep_root(link, x, k, lam, guess):
    """Returns the selections h `[..., n]` and the threshold, a pair, of rows that add up to k.

    `guess` is a threshold, a pair `[...]`, near the root; NaN where the row shall be NaN.
    """
    zero = jnp.zeros_like(k + lam + x.max(-1) + guess.high)
    count = row_sum((x > -jnp.inf).astype(x.dtype))
    every, wrong = k >= count, jnp.isnan(guess.high)
    settled = every | wrong
    item = _lowest_selected(link, x, k, lam, guess.high + zero, settled)
    item = jnp.where(settled, 0, item)
    tied, selected = (
        jnp.maximum(row_sum(where.astype(x.dtype)), 1)
        for where in (x == item[..., None], x >= item[..., None])
    )
    cap = link.cap(item, zero, lam)[0]

    def missing(y):
        h, slope = selections(link, x, item, y, lam)
        return _missing(h, k), -row_sum(slope)

    # The items above gain from y too: no more than this is left for those tied at the lowest.
    most = missing(zero)[0] / tied * (1 + 4 * jnp.finfo(x.dtype).eps)
    most = jnp.where(settled, 0, jnp.minimum(most, 1) * cap)
    y = falling_root(missing, most, zero, most, cap * k / selected, found=settled)
    h, _ = selections(link, x, item, y, lam)
    tau = Pair(item, zero).plus(-lam * power(y, link.p - 1))
    # A cap that is far below the item has lost its digits in y: there the threshold keeps them.
    far = link.cap(item, y, lam)[0] < cap / 2
    tau = guess.where(far, tau)
    h = jnp.where(far[..., None], link.terms(guess.gap(x), guess.high, lam).h, h)
    least = Pair(zero + jnp.finfo(x.dtype).min, zero)
    tau = least.where(every, tau).where(~wrong, Pair(zero + jnp.nan, zero))
    h = jnp.where(every[..., None], (x > -jnp.inf).astype(x.dtype), h)
    return jnp.where(wrong[..., None], jnp.nan, h), tau


def selections(link, x, item, y, lam):
    """Returns h of each x, and its slope in y, where the lowest selected item has the power y."""
    item, y, lam = item[..., None], y[..., None], lam[..., None]
    cap, fall = link.cap(item, y, lam)
    lowest = x == item
    u = jnp.where(x > item, (x - item) / lam + power(y, link.p - 1), 1)
    powers = jnp.where(lowest, y, power(u, link.exponent))
    inside = (x >= item) & (powers < cap)
    safe = jnp.where(inside & (powers > 0), powers, 1)
    rise = jnp.where(lowest, 1, power(jnp.minimum(y / safe, 1), link.p - 2))
    h = jnp.where(inside, powers / cap, (x >= item).astype(x.dtype))
    return h, jnp.where(inside, (rise - h * fall) / cap, 0)


def _missing(h, k):
    """Returns k less the sum of h; whole items are counted, lest fractions lose their digits."""
    whole = h >= 1
    return (k - row_sum(whole.astype(h.dtype))) - row_sum(jnp.where(whole, 0, h))


def _lowest_selected(link, x, k, lam, guess, settled):
    """Returns the least item at which, taken as the threshold, selections stay below k.

    Tried are the first item above the guess, the one below it, and from then on also the middle
    of what is left, in the order of floats.
    """
    real = x > -jnp.inf

    def below(item):
        return jnp.where(x < item[..., None], x, -jnp.inf).max(-1)

    def unfinished(state):
        return ~state[-2].all()

    def improve(state):
        low, high, item, lower, done, passes = state
        middle = jnp.where(passes % 2 == 0, middle_float(low, high), lower)
        probe = jnp.where(passes == 0, jnp.minimum(guess, high), middle)
        tried = jnp.where(real & (x >= probe[..., None]), x, jnp.inf).min(-1)
        under = _missing(selections(link, x, tried, jnp.zeros_like(guess), lam)[0], k) > 0
        item, high = jnp.where(under, tried, item), jnp.where(under, probe, high)
        low, lower = jnp.where(under, low, tried), below(item)
        return low, high, item, lower, done | (lower <= low), passes + 1

    top = x.max(-1) + jnp.zeros_like(guess)
    low, lower = jnp.full_like(top, -jnp.inf), below(top)
    return jax.lax.while_loop(
        unfinished, improve, (low, top, top, lower, settled | (lower <= low), 0)
    )[2]
