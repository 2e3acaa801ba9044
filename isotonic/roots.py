"""Roots of decreasing functions, for all blocks or seams at once."""

import jax.numpy as jnp
from jax import lax

MAX_STEPS = 300  # bisection alone crosses the float64 range in fewer


def falling_root(excess, start, low, high, scale, found=False):
    """Returns the root in [low, high] of a decreasing g, to its rounding and `scale`, elementwise.

    Newton's steps, replaced by bisection where they leave the bracket, and every third one once
    there are many: slopes may be infinite at the ends.

    Args:
      excess: g -> value and derivative at g, of one shape.
      start, low, high, scale: of that shape.
      found: where `start` is the answer, or the answer is not wanted.
    """
    eps = jnp.finfo(start.dtype).eps

    def unfinished(state):
        *_, done, steps = state
        return ~done.all() & (steps < MAX_STEPS)

    def improve(state):
        g, low, high, done, steps = state
        value, slope = excess(g)
        low, high = jnp.where(value > 0, g, low), jnp.where(value < 0, g, high)
        newton, middle = g - value / slope, low + (high - low) / 2
        small = ~(jnp.abs(newton - g) > eps * jnp.maximum(jnp.abs(g), scale))  # true for NaN
        inside = (newton > low) & (newton < high) & ((steps < 12) | (steps % 3 > 0))
        there = jnp.where(inside, newton, jnp.where(small, g, middle))
        there = jnp.where((value == 0) | done, g, there)
        stuck = ~inside & ((middle <= low) | (middle >= high))
        return there, low, high, done | small | (value == 0) | stuck, steps + 1

    done = jnp.broadcast_to(jnp.asarray(found), start.shape)
    return lax.while_loop(unfinished, improve, (start, low, high, done, 0))[0]
