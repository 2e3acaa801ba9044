"""One scalar root per row:  find tau with  sum_i h(x_i; tau, lam) = k,  and its derivative.

With w = 1_k the isotonic problem behind the relaxed top-k operators of Sander et al. (ICML 2023)
pools a single block, so its solution is one number per row. No sort, no PAV, no Dykstra: a
bracketed iteration on a monotone function, every pass of which is a few sums over the row.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from isotonic.links import Link, Row
from isotonic.rows import Pair, below_infinity, middle_float, over_row, per_row, row_sum
from isotonic.steep import steep_root

MAX_PASSES = 300  # never reached: bisection of a float64 alone takes fewer; most rows take 3 to 5
PATIENCE = 12  # passes before bisection is forced on rows that have not converged


class Threshold(NamedTuple):
    """Holds the solution of a row: `h` of shape [..., n], `tau` of shape [...]."""

    h: jax.Array
    tau: jax.Array


class _Search(NamedTuple):
    """Holds the state of the root search, each of shape [...]: the root is in [low, high]."""

    tau: Pair
    low: jax.Array
    high: jax.Array
    above: jax.Array  # sum h - k at low, > 0; infinite as long as low is only a bound
    below: jax.Array  # at high, < 0
    done: jax.Array


def threshold(link: Link, x, k, lam) -> Threshold:
    r"""Solves  \sum_i h(x_i; \tau, \lambda) = k  for tau along the last axis.

    Args:
      link: the selection h, see `isotonic.links`; static.
      x: scores `[..., n]`, float32 or float64. Entries of -inf are selected with weight 0; those of
        +inf are the largest float, so that what is left of k is shared among them.
      k: sum of the selections, real, in (0, n]; scalar or `[...]`, may be traced. Rows with
        fewer than k finite entries select all of them.
      lam: strength > 0; scalar or `[...]`, may be traced.

    Returns:
      The selections `h` and the threshold `tau`; the least float where a row selects all. All is
      NaN, and so are all derivatives, in a row of which a score, k or lam is NaN.

    The error in h is that of one summation, whatever max|x|/lam: tau is carried as the unevaluated
    sum of two floats, so that x - tau keeps its digits, as long as eps^2 |tau| is small beside lam.

    Derivative, forward and reverse, by the implicit function theorem:
      d tau = (dk - \sum_i (h_x dx + h_lam d lam)_i) / \sum_i (h_tau)_i,
    and 0 where no item lies strictly inside the link (the row is already hard).
    """
    return Threshold(*_solve(link, x, k, lam))


# Compiled once for each link: a loop that is called as it stands is compiled at every call.
@partial(jax.jit, static_argnums=0, inline=True)
def _solve(link, x, k, lam):
    h, tau, rest = _threshold(link, x, *per_row(x, k, lam))
    return h, tau + rest


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _threshold(link, x, k, lam):
    x = below_infinity(x)
    row = _statistics(x, k)
    if link.steep:
        h, tau = steep_root(link, x, k, lam, _search(link, x, row, k, lam, link.passes))
    else:
        tau = _search(link, x, row, k, lam, MAX_PASSES)
        h = link.terms(tau.gap(x), tau.high, lam).h
    return h, *tau


def _threshold_jvp(link, primals, tangents):
    h, *tau = _threshold(link, *primals)
    x, k, lam = below_infinity(primals[0]), *primals[1:]
    n = x.shape[-1]
    if link.steep:
        terms = link.slopes(h, tau[0], lam)
    else:
        terms = link.terms(Pair(*tau).gap(x), tau[0], lam)
    total = row_sum(terms.dtau)
    inner = total < 0
    total = jnp.where(inner, total, 0 * tau[0] - jnp.inf)  # divides to 0, or to NaN in rows of NaN
    # Tangents that are zero by construction cost nothing.
    dx, dk, dlam = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    direct = 0 if dx is None else terms.dx * dx
    if dlam is not None:
        direct += terms.dlam * over_row(dlam, n)
    dtau = jnp.zeros_like(k) if isinstance(direct, int) else -row_sum(direct)
    dtau = (dtau if dk is None else dtau + dk) / total
    return (h, *tau), (direct + terms.dtau * over_row(dtau, n), dtau, jnp.zeros_like(dtau))


_threshold.defjvp(_threshold_jvp, symbolic_zeros=True)


def _statistics(x, k) -> Row:
    """Returns the row's statistics, with k kept away from n; means are NaN where a score is."""
    length = x.shape[-1]
    real = (x != -jnp.inf).astype(x.dtype)
    n = row_sum(real)
    count = jnp.maximum(n, 1)
    # Divided first: a sum of huge entries overflows.
    part = jnp.where(real > 0, x / length, 0)
    mean = row_sum(part) * (length / count)
    deviation = row_sum(real * jnp.abs(part - mean[..., None] / length)) * (length / count)
    return Row(n, jnp.where(k < n, k, count / 2), mean, deviation)


def _search(link, x, row: Row, k, lam, limit) -> Pair:
    """Returns the root, by Newton inside a bracket: the link's own step while it stays inside."""
    zero = jnp.zeros_like(row.mean + k + lam)  # of all three's place on a mesh
    eps = jnp.finfo(x.dtype).eps
    enough = 8 * eps * jnp.minimum(k, 1)  # no h moves by more than the sum does

    def unfinished(carry):
        search, passes = carry
        return (passes < limit) & ~search.done.all()

    def improve(carry):
        search, passes = carry
        tau = search.tau
        step = link.step(tau.gap(x), tau.high, k, lam)
        over, under = step.excess > 0, step.excess < 0
        low, high = jnp.where(over, tau.high, search.low), jnp.where(under, tau.high, search.high)
        above = jnp.where(over, step.excess, search.above)
        below = jnp.where(under, step.excess, search.below)
        newton = tau.plus(step.move)
        # A threshold may be any offset from a float, but else the ends are not tried again.
        tiny = jnp.abs(step.move) <= 4 * eps * jnp.abs(tau.high)
        inside = ((low < newton.high) & (newton.high < high)) | tiny  # false for NaN
        # Bisection knows floats alone: it would lose what steps below them have found.
        kept = inside & (~_in_turn(passes) | (tiny & (passes < 4 * PATIENCE)))
        small = jnp.abs(step.move) <= 4 * eps * step.width
        # The negation is true for NaN, which no iteration mends.
        converged = small | ~(jnp.abs(step.excess) > jnp.maximum(enough, step.noise))
        moved = newton.where(inside & ~search.done, tau)
        search = _Search(moved, low, high, above, below, search.done | converged)
        turn = partial(_turn, link, x, lam, step, inside, kept, passes)
        lost = ~(kept | search.done)
        tau, done = jax.lax.cond(lost.any(), turn, lambda search: (search.tau, search.done), search)
        return search._replace(tau=tau, done=done), passes + 1

    low, high, start = (zero + bound for bound in link.bracket(row, lam))
    inside = (low < start) & (start < high)
    start = jnp.where(inside, start, middle_float(low, high))
    every = k >= row.n  # such a row selects all that it has
    wrong = jnp.isnan(row.mean) | jnp.isnan(k) | jnp.isnan(lam)
    start = jnp.where(wrong, jnp.nan, jnp.where(every, jnp.finfo(x.dtype).min, start))
    search = _Search(Pair(start, zero), low, high, zero + jnp.inf, zero - jnp.inf, every | wrong)
    return jax.lax.while_loop(unfinished, improve, (search, 0))[0].tau


def _in_turn(passes):
    """Tells whether every row bisects in this pass, so that none can crawl."""
    return (passes >= PATIENCE) & (passes % 3 == 2)


def _turn(link, x, lam, step, inside, kept, passes, search: _Search):
    """Takes the secant, the next item or bisection, in turns, where the link's step is not kept."""
    low, high, zero = search.low, search.high, jnp.zeros_like(search.low)
    free = ~_in_turn(passes)
    lost = ~search.done & ~kept
    share = search.above / (search.above - search.below)  # 0 or NaN where an end is only a bound
    secant = Pair(low, zero).plus((high - low) * share)
    straight = (passes % 2 == 0) & free & (share > 0) & (secant.high < high)
    tau = secant.where(straight, Pair(_middle(low, high, step.width), zero))
    # It costs a pass of its own, so not for what the secant may mend.
    idle = lost & jnp.isnan(step.move) & free & ((passes % 2 == 1) | (passes > 4))
    next_item = partial(_next_item, link, x, lam)
    item = jax.lax.cond(idle.any(), next_item, lambda *_: tau, search.tau, step)
    near = idle & (low <= item.high) & (item.high <= high)
    tau = item.where(near, tau)
    stuck = ~near & ~straight & ~((low < tau.high) & (tau.high < high))
    return tau.where(lost & ~stuck, search.tau), search.done | (lost & stuck & ~inside)


def _middle(low, high, width):
    """Returns a point between: half way if the bracket is narrow, else half way in float order."""
    half = low / 2 + high / 2
    return jnp.where(high - low <= 1000 * width, half, middle_float(low, high))


def _next_item(link, x, lam, tau: Pair, step) -> Pair:
    """Returns the threshold that has the next item inside: the one below, or the least whole one.

    With a narrow link this is the last step of a selection, which bisection takes one bit a pass.
    """
    h = link.terms(tau.gap(x), tau.high, lam).h
    below = jnp.where(h < 0.5, x, -jnp.inf).max(-1)
    above = jnp.where(h >= 1, x, jnp.inf).min(-1)
    item = jnp.where(step.excess < 0, below, above)
    return Pair(item, jnp.zeros_like(item)).plus(-link.half_width(item, lam))
