"""Passes rows that are sorted by expert through the experts' networks in a loop of blocks, on CPU.

Writing and reading an array of all hidden units is slow there beside the products themselves. So a
block of rows passes the whole network before the next one comes, and of the hidden units only what
the backward pass needs is kept, once, before the activation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.nn.grouped import each_group
from moe.nn.mlp import activate

BLOCKS = (128, 32)  # rows: fewer starve a product, more waste the last block of an expert


class Parameters(NamedTuple):
    """Holds the parameters of E networks; None where they have no gate or no biases."""

    wide: jax.Array  # [E, D, F]
    narrow: jax.Array  # [E, F, D]
    bias_wide: jax.Array | None = None  # [E, F]
    bias_narrow: jax.Array | None = None  # [E, D]
    gate: jax.Array | None = None  # [E, D, F]
    bias_gate: jax.Array | None = None  # [E, F]


class Runs(NamedTuple):
    """Says which rows are an expert's: `sizes_E` of them from `firsts_E` on."""

    firsts_E: jax.Array
    sizes_E: jax.Array


def runs(sizes_E) -> Runs:
    """Returns the rows of experts whose rows follow one another."""
    return Runs(jnp.cumsum(sizes_E) - sizes_E, sizes_E)


def forward(exact, x_ND, parameters: Parameters, runs: Runs, out):
    """Writes the result of the experts' rows into the first array of `out`, and what comes before
    the activation, of `wide` and of `gate`, into the others as far as there are any."""

    def visit(own: Parameters, block: Block, out):
        hidden = before(own, block.read(x_ND))
        y = linear(activate(*hidden, exact=exact), own.narrow, own.bias_narrow)
        return [block.write(a, b) for a, b in zip(out, [y, *hidden], strict=False)]

    def group(own: Parameters, _, first, size, out):
        visit_own = functools.partial(visit, own)
        return None, _over_blocks(first, size, len(x_ND), visit_own, out)

    return _over_experts(parameters, None, runs, group, list(out))[1]


def backward(exact, x_ND, parameters: Parameters, runs: Runs, hidden, g_ND, dx_ND, totals):
    """Writes the derivative of the experts' rows into dx_ND and adds that by the parameters to
    `totals`; sums over an expert's rows are float32 or better. Without `hidden`, what comes before
    the activation is computed again."""

    def visit(own: Parameters, block: Block, carry):
        dx_ND, sums = carry
        x, g = (jnp.where(block.own, block.read(a), 0) for a in (x_ND, g_ND))
        inner = [block.read(a) for a in hidden] if hidden else before(own, x)
        active, pull = jax.vjp(lambda *inner: activate(*inner, exact=exact), *inner)
        slopes = pull((g @ own.narrow.T).astype(active.dtype))
        dx = slopes[0] @ own.wide.T
        if own.gate is not None:
            dx += slopes[1] @ own.gate.T
        gate = slopes[1] if own.gate is not None else None
        sums = Parameters(
            wide=_plus(sums.wide, x, slopes[0]),
            narrow=_plus(sums.narrow, active, g),
            bias_wide=_plus(sums.bias_wide, None, slopes[0]),
            bias_narrow=_plus(sums.bias_narrow, None, g),
            gate=_plus(sums.gate, x, gate),
            bias_gate=_plus(sums.bias_gate, None, gate),
        )
        return block.write(dx_ND, dx), sums

    def group(own: Parameters, sums: Parameters, first, size, dx_ND):
        sums = jax.tree.map(lambda a: a.astype(sums_in(a.dtype)), sums)
        visit_own = functools.partial(visit, own)
        dx_ND, sums = _over_blocks(first, size, len(x_ND), visit_own, (dx_ND, sums))
        return sums, dx_ND

    totals, dx_ND = _over_experts(parameters, totals, runs, group, dx_ND)
    return dx_ND, totals


class Block(NamedTuple):
    """Stands for some rows, from `start` on, of which those of one expert are its `own`."""

    start: jax.Array
    own: jax.Array  # [rows, 1], bool

    def read(self, a_ND):
        return lax.dynamic_slice_in_dim(a_ND, self.start, len(self.own))

    def write(self, a_ND, new):
        """Returns a_ND with the own rows replaced."""
        new = jnp.where(self.own, new.astype(a_ND.dtype), self.read(a_ND))
        return lax.dynamic_update_slice_in_dim(a_ND, new, self.start, 0)


def _over_blocks(first, size, rows: int, visit, carry):
    """Calls visit(block, carry) for blocks that cover `size` rows from `first` on, and returns the
    last carry: large blocks as far as they are full, small ones for the rest."""
    end = first + size
    for length in (min(length, rows) for length in BLOCKS):
        smallest = length == min(BLOCKS[-1], rows)
        count = -(-(end - first) // length) if smallest else (end - first) // length

        def step(i, carry, first=first, length=length):
            wanted = first + i * length
            start = jnp.minimum(wanted, rows - length)  # the last one may not reach past the rows
            row = start + jnp.arange(length)
            return visit(Block(start, ((row >= wanted) & (row < end))[:, None]), carry)

        carry = lax.fori_loop(0, count, step, carry)
        first += count * length
    return carry


def _over_experts(parameters: Parameters, totals: Parameters | None, runs: Runs, visit, carry):
    """Calls visit(its parameters, its total, its first row, its rows, carry) for each expert that
    has rows; returns `totals` with what it returned in the expert's place, and the last carry."""

    def step(e, both):
        totals, carry = both
        own, total = jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, e, keepdims=False), (parameters, totals)
        )
        new, carry = visit(own, total, runs.firsts_E[e], runs.sizes_E[e], carry)

        def put(total, value):
            return lax.dynamic_update_index_in_dim(total, value.astype(total.dtype), e, 0)

        return jax.tree.map(put, totals, new), carry

    return each_group(runs.sizes_E, step, (totals, carry))


def before(own: Parameters, x):
    """Returns what comes before the activation of one expert's rows."""
    hidden = [linear(x, own.wide, own.bias_wide)]
    return hidden if own.gate is None else [*hidden, linear(x, own.gate, own.bias_gate)]


def linear(x, kernel, bias):
    out = x @ kernel
    return out if bias is None else out + bias[None]


def sums_in(dtype):
    """Returns the type in which values of a type are summed over rows: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def _plus(total, rows, slopes):
    """Adds rows^T slopes, or the sum of the slopes, to a sum over rows; None stays."""
    if total is None:
        return None
    if rows is None:
        return total + slopes.sum(0, dtype=total.dtype)
    return total + jnp.matmul(rows.T, slopes, preferred_element_type=total.dtype)
