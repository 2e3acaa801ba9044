"""What the isotonic solvers share: fits, their blocks, sums over blocks, and offsets of a row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Fit(NamedTuple):
    """Solution of an isotonic problem along the last axis, and the blocks it is constant on."""

    v: jax.Array  # fitted values [..., n], decreasing; less those of an `Offset` where one is given
    block: jax.Array  # int32 [..., n]: the position at which the block of each position starts


class Offset(NamedTuple):
    """Known parts x_i/unit of a row's values, which solvers never add up.

    Only differences (x_i - x_j)/unit are formed, so that neither a row far from zero nor a small
    unit costs digits.
    """

    x: jax.Array  # [..., n]
    unit: jax.Array  # [..., 1], > 0


def block_sum(x, block):
    """Sum `x` `[..., n]` over the block of each position; the sum is given at every position.

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
    """Returns blocks `[..., n]`, as in `Fit`, from flags `[..., n-1]` that pool i with i + 1."""
    n = pooled.shape[-1] + 1
    index = jnp.broadcast_to(jnp.arange(1, n, dtype=jnp.int32), pooled.shape)
    first = jnp.zeros((*pooled.shape[:-1], 1), jnp.int32)
    starts = jnp.concatenate([first, jnp.where(pooled, 0, index)], -1)
    return jax.lax.cummax(starts, starts.ndim - 1)


def positions(x):
    """Returns 0, 1, ..., n - 1 along the last axis, int32 of x's shape.

    They vary over the devices of a `jax.shard_map` as x does, as a loop that carries both needs.
    """
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.zeros_like(x, jnp.int32) + jnp.broadcast_to(index, x.shape)


def on_any_mesh(solve):
    """Returns the solver, a function of rows, with explicit axes of a mesh left to the compiler.

    A loop over rows may not split them where their sharding is part of their type.
    """

    def solved(*rows):
        shardings = [jax.typeof(a).sharding for a in rows]
        sharding = next((s for s in shardings if any(s.spec)), shardings[0])
        if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
            return solve(*rows)
        return jax.sharding.auto_axes(solve, out_sharding=sharding)(*rows)

    return solved
