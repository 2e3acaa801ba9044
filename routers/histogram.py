"""Counts of scores, as sums from which the k-th largest of a whole batch is found.

The k-th largest score is no sum over tokens, but it can be read from counts, which are: they add up
over groups, micro-batches and devices. A score counts for the two nearest places of a grid in
proportion to its nearness, so that counts are continuous in the scores and a rounding moves no
result by more than itself.
"""

import jax
import jax.numpy as jnp

PLACES = 512


def count(x_GTE, low: float, high: float, mask=None):
    """Returns for each of E columns how many scores lie about each place of a grid, [E, PLACES].

    The grid is even from `low` to `high`; scores outside count at its ends, padding does not.
    """
    step = (high - low) / (PLACES - 1)
    at = jnp.clip((x_GTE - low) / step, 0, PLACES - 1)
    place = jnp.minimum(jnp.floor(at), PLACES - 2).astype(jnp.int32)
    upper = at - place
    lower = 1 - upper
    if mask is not None:
        upper, lower = (jnp.where(mask[..., None], a, 0) for a in (upper, lower))
    column = jnp.arange(x_GTE.shape[-1])

    def of_group(place_TE, lower_TE, upper_TE):
        counts = jnp.zeros((x_GTE.shape[-1], PLACES), lower_TE.dtype)
        return counts.at[column, place_TE].add(lower_TE).at[column, place_TE + 1].add(upper_TE)

    return jax.vmap(of_group)(place, lower, upper).sum(0)


def kth_largest(counts, k, low: float, high: float):
    """Returns each column's k-th largest score, [E], from `count`; k is real, 1 for the largest.

    Between places of the grid it is interpolated.
    """
    above = jnp.cumsum(counts[:, ::-1], axis=-1) - counts[:, ::-1] / 2  # from the largest down
    grid = jnp.linspace(high, low, counts.shape[-1])
    # The middle of the k-th score's own mass: between two scores the counts are level.
    return jax.vmap(lambda column: jnp.interp(k - 0.5, column, grid))(above)


def threshold(counts, k, low: float, high: float, mask):
    """Returns each column's tau, [E], with sum_t mask(x_t - tau) = k, from `count`.

    `mask` is increasing, 0 below 0 and 1 above some number. Where tau is free, between a score that
    is wholly in and one that is wholly out, it is the middle.
    """
    grid = jnp.linspace(low, high, counts.shape[-1])
    width = high - low

    def root(k):
        def halve(_, bounds):
            below, above = bounds
            middle = (below + above) / 2
            total = (counts * mask(grid[None] - middle[:, None])).sum(-1)
            return jnp.where(total > k, middle, below), jnp.where(total > k, above, middle)

        ends = jnp.full(len(counts), low - width), jnp.full(len(counts), high)
        return sum(jax.lax.fori_loop(0, 40, halve, ends)) / 2

    return (root(k - 0.5) + root(k + 0.5)) / 2
