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

from isotonic.blocks import Fit, Offset, positions
from isotonic.rows import Pair


class Mean(NamedTuple):
    """A block of the L2 problem. Fields are scalars, or `[n]` for a row of blocks.

    Mean and weight are carried as two floats each: a million merges that round would add up.
    """

    start: jax.Array  # first position of the block
    value: Pair  # weighted mean of y over the block, as if its offset were that of `start`
    weight: Pair  # sum of w over the block
    x: jax.Array | None  # offset at `start`, if any


def pav(y, w, offset: Offset | None = None) -> Fit:
    r"""Solves  argmin_{v_1 >= ... >= v_n}  1/2 \sum_i w_i (y_i - v_i)^2  along the last axis.

    Args:
      y: data `[..., n]`, n >= 1, float32 or float64. Entries of -inf are never pooled.
      w: weights `[..., n]` >= 0, of the same dtype. A position of zero weight has no say in the
        others' values and gets the value it has in the limit of small equal weights.
      offset: what is to be added to y and, in the result, to v.

    Returns:
      The fit and its blocks. Neighbours that are equal without pooling stay separate blocks.
    """
    return over_rows(_pav_row)(y, w, *(offset or ()))


def _pav_row(y, w, x=None, unit=None):
    def gap(left, right):
        """Returns how far the offset falls from one block's start to the other's."""
        return 0 if x is None else (left.x - right.x) / unit[0]

    def violates(left: Mean, right: Mean):
        return left.value.high + gap(left, right) < right.value.high

    def merge(left: Mean, right: Mean, stop) -> Mean:
        weight = left.weight.plus(right.weight.low).plus(right.weight.high)
        # Without weight on either side, count positions: the limit of small equal weights.
        count = (stop - left.start).astype(y.dtype)
        count_right = (stop - right.start).astype(y.dtype)
        weighted = weight.high > 0
        total = jnp.where(weighted, weight.high, count)
        share = jnp.where(weighted, right.weight.high, count_right) / total
        rise = (right.value.high - left.value.high) + (right.value.low - left.value.low)
        return Mean(left.start, left.value.plus((rise - gap(left, right)) * share), weight, left.x)

    zero = jnp.zeros_like(y)
    stack = pool(Mean(positions(y), Pair(y, zero), Pair(w, zero), x), merge, violates)
    block, value, *start = expand(stack.start, stack.value.high, *([] if x is None else [stack.x]))
    return Fit(value if x is None else value + (start[0] - x) / unit[0], block)


def pool(blocks, merge, violates):
    """Pool adjacent violators of one row, given how two blocks compare and are merged.

    Args:
      blocks: pytree of arrays `[n]` with a field `start` (0, 1, ..., n - 1): each position as a
        block of its own.
      merge: (left, right, stop) -> block, for adjacent blocks that cover the positions from
        left.start to stop - 1.
      violates: (left, right) -> whether the value of the left one is the lower.

    Returns:
      `blocks` with the block that ends at position i at index i, where one does.
    """
    tree_map = jax.tree.map

    def push(i, stack):
        def left_of(block):
            return tree_map(lambda field: field[block.start - 1], stack)

        def unordered(block):
            return (block.start > 0) & violates(left_of(block), block)

        def absorb(block):
            return merge(left_of(block), block, i + 1)

        block = lax.while_loop(unordered, absorb, tree_map(lambda field: field[i], stack))
        return tree_map(lambda field, x: field.at[i].set(x), stack, block)

    # The block that ends at position i is kept at index i: under vmap all rows then write to one
    # index, and the loops carry scalars alone, so that a step costs O(1) per row.
    return lax.fori_loop(1, blocks.start.shape[0], push, blocks)


def expand(*fields):
    """Returns the fields of its block at every position, from the stack that `pool` leaves.

    The first is `start`; the stack is read from the right.
    """

    def step(current, at):
        position, *ends_here = at
        current = tuple(
            jnp.where(position < current[0], new, old)
            for new, old in zip(ends_here, current, strict=True)
        )
        return current, current

    position = positions(fields[0])
    # No block starts at n: the last position replaces all of it.
    init = (position[-1] + 1, *(field[-1] for field in fields[1:]))
    return lax.scan(step, init, (position, *fields), reverse=True)[1]


def over_rows(solve):
    """Lifts `solve`, a function of rows `[n]`, to arrays with equal leading axes, `[..., n]`.

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
