"""The search for a row's root: by Newton inside a bracket, and what to do where Newton is lost."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from isotonic.links import Row
from isotonic.rows import Pair, is_spread, middle_float

MAX_PASSES = 300  # never reached: bisection of a float64 alone takes fewer; most rows take 3 to 5
PATIENCE = 12  # passes before bisection is forced on rows that have not converged
MANY_ROWS = 2048  # from so many on, rows that take longer than others are solved apart


class _Search(NamedTuple):
    """Holds the state of the root search, each of shape [...]: the root is in [low, high]."""

    tau: Pair
    low: jax.Array
    high: jax.Array
    above: jax.Array  # sum h - k at low, > 0; infinite as long as low is only a bound
    below: jax.Array  # at high, < 0
    done: jax.Array


def search(link, x, row: Row, k, lam, limit=MAX_PASSES) -> Pair:
    """Returns the root, by Newton inside a bracket: the link's own step while it stays inside."""
    state = _start(link, x.dtype, row, k, lam)
    everywhere = partial(_pass, link, limit=limit)
    if state.done.size < MANY_ROWS or is_spread(x) or is_spread(state.done):
        return everywhere(x, k, lam, state)[0].tau
    apart = partial(_stragglers_apart, everywhere)
    return jax.lax.platform_dependent(
        x, k, lam, state, cpu=apart, default=lambda *rows: everywhere(*rows)[0].tau
    )


def _start(link, dtype, row: Row, k, lam) -> _Search:
    zero = jnp.zeros_like(row.mean + k + lam)  # of all three's place on a mesh
    low, high, start = (zero + bound for bound in link.bracket(row, lam))
    inside = (low < start) & (start < high)
    start = jnp.where(inside, start, middle_float(low, high))
    every = k >= row.n  # such a row selects all that it has
    wrong = jnp.isnan(row.mean) | jnp.isnan(k) | jnp.isnan(lam)
    start = jnp.where(wrong, jnp.nan, jnp.where(every, jnp.finfo(dtype).min, start))
    return _Search(Pair(start, zero), low, high, zero + jnp.inf, zero - jnp.inf, every | wrong)


def _stragglers_apart(everywhere, x, k, lam, state: _Search) -> Pair:
    """Goes on with a quarter of the rows once no more are unfinished: most take few passes."""
    flat = partial(jax.tree.map, lambda a: a.reshape(-1, *a.shape[state.done.ndim :]))
    rows = flat((x, k, lam, state))
    few = state.done.size // 4
    searched, passes = everywhere(*rows, few=few)
    place = jnp.flatnonzero(~searched.done, size=few, fill_value=state.done.size)
    left = jax.tree.map(lambda a: a.at[place].get(mode="clip"), (*rows[:3], searched))
    found = everywhere(*left, passes)[0].tau
    tau = jax.tree.map(lambda a, b: a.at[place].set(b, mode="drop"), searched.tau, found)
    return jax.tree.map(lambda a: a.reshape(state.done.shape), tau)


def _pass(link, x, k, lam, search: _Search, passes=0, *, limit, few=0):
    """Improves all rows until no more than `few` are unfinished; returns them and the passes."""
    eps = jnp.finfo(x.dtype).eps
    enough = 8 * eps * jnp.minimum(k, 1)  # no h moves by more than the sum does

    def unfinished(carry):
        search, passes = carry
        return (passes < limit) & (jnp.count_nonzero(~search.done) > few)

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
        tau, done = jax.lax.cond(
            jnp.count_nonzero(lost) > few // 2,
            turn,
            lambda search: (search.tau, search.done),
            search,
        )
        return search._replace(tau=tau, done=done), passes + 1

    return jax.lax.while_loop(unfinished, improve, (search, passes))


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
    down = step.excess < 0
    sign = jnp.where(down, 1, -1).astype(x.dtype)
    beyond = jnp.where(down[..., None], h < 0.5, h >= 1)
    item = sign * jnp.where(beyond, sign[..., None] * x, -jnp.inf).max(-1)
    return Pair(item, jnp.zeros_like(item)).plus(-link.half_width(item, lam))
