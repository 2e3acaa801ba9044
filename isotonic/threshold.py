"""One scalar root per row:  find tau with  sum_i h(x_i; tau, lam) = k,  and its derivative.

With w = 1_k the isotonic problem behind the relaxed top-k operators of Sander et al. (ICML 2023)
pools a single block, so its solution is one number per row. No sort, no PAV, no Dykstra: a
bracketed Newton iteration on a monotone function, every pass of which is one reduction of the row.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from isotonic.links import Link

MAX_PASSES = 300  # bisection alone crosses the float64 range in fewer; typical rows take 6 to 10


class Threshold(NamedTuple):
    """Solution of a row: `h` of shape [..., n], `tau` of shape [..., 1]."""

    h: jax.Array
    tau: jax.Array


class _Search(NamedTuple):
    """State of the root search, each of shape [..., 1]."""

    t: jax.Array
    low: jax.Array
    high: jax.Array
    step: jax.Array  # size of the step before last
    last_step: jax.Array
    done: jax.Array


def threshold(link: Link, x, k, lam) -> Threshold:
    r"""Solve  \sum_i h(x_i; \tau, \lambda) = k  for tau along the last axis.

    Args:
      link: the selection h, see `isotonic.links`; static.
      x: scores `[..., n]`, float32 or float64. Entries of -inf are selected with weight 0.
      k: sum of the selections, real, in (0, n]; scalar or `[..., 1]`, may be traced. Rows with
        fewer than k finite entries select all of them.
      lam: strength > 0; scalar or `[..., 1]`, may be traced.

    Returns:
      The selections `h` and the threshold `tau`.

    The error in h is that of one summation, whatever max|x|/lam: tau is carried as the unevaluated
    sum of two floats, so that x - tau keeps its digits, as long as eps^2 |tau| is small beside lam.

    Derivative, forward and reverse, by the implicit function theorem:
      d tau = (dk - \sum_i (h_x dx + h_lam d lam)_i) / \sum_i (h_tau)_i,
    and 0 where no item lies strictly inside the link (the row is already hard).
    """
    row = (*x.shape[:-1], 1)
    k, lam = (jnp.broadcast_to(jnp.asarray(a, x.dtype), row) for a in (k, lam))
    h, tau, rest = _threshold(link, x, k, lam)
    return Threshold(h, tau + rest)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _threshold(link, x, k, lam):
    x = jnp.minimum(x, jnp.finfo(x.dtype).max)  # +inf would turn the bracket into NaN
    real = x > -jnp.inf
    n = real.sum(-1, keepdims=True)
    low, high, start = _bracket(link, x, real, n, k, lam)
    low = jnp.where(k < n, low, jnp.inf)  # an empty bracket: nothing to search, all are selected
    zero = jnp.zeros_like(start)
    first = _search(link, x, zero, k, lam, low, high, start)
    # Again from there: x - tau is exact for the x near tau, so the second root, small, corrects
    # the rounding of the first.
    tau = first.t
    rounding = 4 * jnp.finfo(x.dtype).eps * jnp.abs(tau)  # of the first bracket's ends
    low, high = first.low - tau - rounding, first.high - tau + rounding
    rest = _search(link, x - tau, tau, k, lam, low, high, zero).t
    h = link.terms((x - tau) - rest, tau + rest, lam).h
    return jnp.where(k >= n, real.astype(x.dtype), h), tau, rest


@_threshold.defjvp
def _threshold_jvp(link, primals, tangents):
    x, k, lam = primals
    dx, dk, dlam = tangents
    h, tau, rest = _threshold(link, x, k, lam)
    terms = link.terms((x - tau) - rest, tau + rest, lam)
    soft = k < (x > -jnp.inf).sum(-1, keepdims=True)
    direct = jnp.where(soft, terms.dx * dx + terms.dlam * dlam, 0)
    slope = jnp.where(soft, terms.dtau, 0)
    total = slope.sum(-1, keepdims=True)
    inner = total < 0
    dtau = (dk - direct.sum(-1, keepdims=True)) / jnp.where(inner, total, -1)
    dtau = jnp.where(inner, dtau, 0)
    return (h, tau, rest), (direct + slope * dtau, dtau, jnp.zeros_like(rest))


def _bracket(link, x, real, n, k, lam):
    """Two thresholds around the root, and the root of a normal row with this mean and variance."""
    count = jnp.maximum(n, 1)
    low = jnp.where(real, x, jnp.inf).min(-1, keepdims=True)
    high = x.max(-1, keepdims=True)
    low, high = (jnp.where(n > 0, a, 0) for a in (low, high))
    share = jnp.clip(k / count, 0, 1)
    low, high = link.bracket(low, high, share, lam)
    scaled = jnp.where(real, x / count, 0)  # divided first: a sum of huge entries overflows
    mean = scaled.sum(-1, keepdims=True)
    spread = jnp.sqrt((jnp.where(real, x - mean, 0) ** 2).sum(-1, keepdims=True) / count)
    start = mean - spread * ndtri(jnp.clip(share, 1e-6, 1 - 1e-6)) - lam * share
    return low, high, jnp.where((start > low) & (start < high), start, (low / 2 + high / 2))


def _search(link, z, base, k, lam, low, high, start) -> _Search:
    """Root t of  sum_i h(z_i - t; base + t, lam) = k  in [low, high]: Newton inside a bracket.

    A Newton step that leaves the bracket, or is not half the step before last, is replaced by
    bisection (the safeguard of Brent and Dekker), so that every row ends.
    """
    eps = jnp.finfo(z.dtype).eps

    def unfinished(carry):
        search, passes = carry
        return (passes < MAX_PASSES) & ~search.done.all()

    def improve(carry):
        search, passes = carry
        terms = link.terms(z - search.t, base + search.t, lam)
        excess, noise = _excess(terms.h, k, eps)
        newton = search.t - excess / jnp.minimum(
            terms.dtau.sum(-1, keepdims=True), -jnp.finfo(z.dtype).tiny
        )
        low = jnp.where(excess > 0, search.t, search.low)
        high = jnp.where(excess < 0, search.t, search.high)
        middle = low / 2 + high / 2
        fast = jnp.abs(newton - search.t) <= search.step / 2
        converged = ~(jnp.abs(excess) > noise)  # true for NaN, which no iteration mends
        newton_ok = (newton > low) & (newton < high) & (fast | converged)
        t = jnp.where(newton_ok, newton, jnp.where(converged, search.t, middle))
        stuck = ~newton_ok & ((middle <= low) | (middle >= high))
        t = jnp.where(search.done, search.t, t)
        moved = jnp.abs(t - search.t)
        done = search.done | converged | stuck
        return _Search(t, low, high, search.last_step, moved, done), passes + 1

    width = high - low
    search = _Search(start, low, high, width, width, ~(low <= high))
    return jax.lax.while_loop(unfinished, improve, (search, 0))[0]


def _excess(h, k, eps):
    """sum(h) - k, and the size of its rounding error.

    Items near 1 are counted in integers and only their deficits are summed: beside 50,000 whole
    items, the digits of the few fractional ones would be lost in float32.
    """
    whole = h > 0.5
    rest = jnp.where(whole, h - 1, h)
    count = whole.sum(-1, keepdims=True).astype(h.dtype)
    return (count - k) + rest.sum(-1, keepdims=True), eps * jnp.abs(rest).sum(-1, keepdims=True)
