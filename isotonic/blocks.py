"""What the isotonic solvers share: how a fit names its blocks, and sums over those blocks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Fit(NamedTuple):
    """Solution of an isotonic problem along the last axis, and the blocks it is constant on."""

    v: jax.Array  # fitted values [..., n], decreasing
    block: jax.Array  # int32 [..., n]: the position at which the block of each position starts


def block_sum(x, block):
    """Sum of `x` `[..., n]` over the block of each position, given back at every position.

    Two segmented scans: unlike a scatter they add in the same order on every device and run,
    and unlike differences of one cumulative sum they keep the digits of small blocks. Linear in
    x, so it may be transposed. `block` is as in `Fit`.
    """

    def add(earlier, later):
        (sum_1, block_1), (sum_2, block_2) = earlier, later
        return jnp.where(block_1 == block_2, sum_1, 0) + sum_2, block_2

    last = x.ndim - 1
    before, _ = jax.lax.associative_scan(add, (x, block), axis=last)
    after, _ = jax.lax.associative_scan(add, (x, block), axis=last, reverse=True)
    return before + (after - x)


def block_starts(pooled):
    """Blocks `[..., n]`, as in `Fit`, from flags `[..., n-1]`: is i in one block with i + 1?"""
    n = pooled.shape[-1] + 1
    index = jnp.broadcast_to(jnp.arange(1, n, dtype=jnp.int32), pooled.shape)
    first = jnp.zeros((*pooled.shape[:-1], 1), jnp.int32)
    starts = jnp.concatenate([first, jnp.where(pooled, 0, index)], -1)
    return jax.lax.cummax(starts, starts.ndim - 1)
