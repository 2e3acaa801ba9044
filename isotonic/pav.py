"""Pool adjacent violators (PAV): exact isotonic regression in one pass over the row.

Positions enter from the left; while the last block lies above the one before it, the two are
merged. Each position is merged away at most once, so the pass is O(n), but it is sequential: on
accelerators prefer a solver of low depth. Best and Chakravarti, "Active set algorithms for
isotonic regression; a unifying framework" (Mathematical Programming, 1990).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from isotonic.blocks import Fit


class Mean(NamedTuple):
    """A block of the L2 problem. Fields are scalars, or `[n]` for a row of blocks."""

    start: jax.Array  # first position of the block
    value: jax.Array  # weighted mean of y over the block
    weight: jax.Array  # sum of w over the block


def pav(y, w) -> Fit:
    r"""Solve  argmin_{v_1 >= ... >= v_n}  1/2 \sum_i w_i (y_i - v_i)^2  along the last axis.

    Args:
      y: data `[..., n]`, n >= 1, float32 or float64.
      w: weights `[..., n]` >= 0, of the same dtype. A position of zero weight has no say in the
        others' values and gets the value it has in the limit of small equal weights.

    Returns:
      The fit and its blocks. Neighbours that are equal without pooling stay separate blocks.
    """
    return over_rows(_pav_row)(y, w)


def _pav_row(y, w):
    return pool(Mean(jnp.arange(y.shape[0], dtype=jnp.int32), y, w), _merge_means)


def _merge_means(left: Mean, right: Mean, stop) -> Mean:
    weight = left.weight + right.weight
    # Without weight on either side, count positions: the limit of small equal weights.
    count = (stop - left.start).astype(weight.dtype)
    count_right = (stop - right.start).astype(weight.dtype)
    weighted = weight > 0
    share = jnp.where(weighted, right.weight, count_right) / jnp.where(weighted, weight, count)
    value = left.value + (right.value - left.value) * share
    return Mean(left.start, value, weight)


def pool(blocks, merge) -> Fit:
    """Pool adjacent violators of one row, given how two blocks are merged.

    Args:
      blocks: pytree of arrays `[n]` with fields `start` (0, 1, ..., n - 1) and `value`: each
        position as a block of its own.
      merge: (left, right, stop) -> block, for adjacent blocks that cover the positions from
        left.start to stop - 1.
    """
    tree_map = jax.tree.map

    def push(i, stack):
        def violates(block):
            return (block.start > 0) & (stack.value[block.start - 1] < block.value)

        def absorb(block):
            left = tree_map(lambda field: field[block.start - 1], stack)
            return merge(left, block, i + 1)

        block = lax.while_loop(violates, absorb, tree_map(lambda field: field[i], stack))
        return tree_map(lambda field, x: field.at[i].set(x), stack, block)

    # The block that ends at position i is kept at index i: under vmap all rows then write to one
    # index, and the loops carry scalars alone, so that a step costs O(1) per row.
    stack = lax.fori_loop(1, blocks.value.shape[0], push, blocks)
    return _expand(stack.start, stack.value)


def _expand(start, value) -> Fit:
    """Values and blocks of every position from the stack `pool` leaves, read from the right."""

    def step(current, at):
        position, *ends_here = at
        current = tuple(
            jnp.where(position < current[0], new, old)
            for new, old in zip(ends_here, current, strict=True)
        )
        return current, current

    n = value.shape[0]
    position = jnp.arange(n, dtype=jnp.int32)
    init = (jnp.int32(n), value[-1])
    block, v = lax.scan(step, init, (position, start, value), reverse=True)[1]
    return Fit(v, block)


def over_rows(solve):
    """Lift `solve`, a function of rows `[n]`, to arrays with equal leading axes, `[..., n]`.

    On CPU rows are solved one after another, as compiled scalar loops: 20 to 100 times faster
    than in lockstep, where every step is a dozen calls of small kernels. Elsewhere rows advance
    together. The custom rule keeps that choice when a caller applies vmap.
    """

    @custom_vmap
    def lifted(*arrays):
        batch = arrays[0].shape[:-1]
        rows = [a.reshape(math.prod(batch), a.shape[-1]) for a in arrays]
        out = lax.platform_dependent(
            *rows,
            cpu=lambda *rows: lax.map(lambda row: solve(*row), rows),
            default=jax.vmap(solve),
        )
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), out)

    @lifted.def_vmap
    def _(axis_size, batched, *arrays):
        arrays = [
            a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
            for a, is_batched in zip(arrays, batched, strict=True)
        ]
        out = lifted(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    return lifted
