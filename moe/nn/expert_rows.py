"""Applies each expert's network to its rows at once: what a layer of dropless experts computes.

The rows are sorted by expert, as in `moe.nn.grouped`, whose products do it on TPU and GPU. On CPU
writing and reading an array of all hidden units is slow beside the products themselves; there a
block of rows passes the whole network before the next one comes, and of the hidden units only what
the backward pass needs is kept, once, before the activation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.hosts import mesh
from moe.nn.grouped import each_group, filled, grouped_rows, outer, times, zeros
from moe.nn.mlp import activate

BLOCKS = (128, 32)  # rows: fewer starve a product, more waste the last block of an expert
# So few rows, as in decoding, cost an expert less than a copy of its parameters does: where there
# are two for each expert, so that most are chosen, all rows pass every expert as it lies.
FEW = 32


class Parameters(NamedTuple):
    """Holds the parameters of E networks; None where they have no gate or no biases."""

    wide: jax.Array  # [E, D, F]
    narrow: jax.Array  # [E, F, D]
    bias_wide: jax.Array | None = None  # [E, F]
    bias_narrow: jax.Array | None = None  # [E, D]
    gate: jax.Array | None = None  # [E, D, F]
    bias_gate: jax.Array | None = None  # [E, F]


def mlp_rows(x_ND, parameters: Parameters, sizes_E, exact: bool = False):
    """Returns narrow(activate(wide(x), gate(x))) of each row by its expert, [N, D].

    Rows past the last expert's are zero in the result and in every derivative. `exact` is of
    `moe.nn.mlp.activate`.
    """
    arrays, form = jax.tree.flatten(parameters)
    x_ND, *arrays, sizes_E = mesh.alike(x_ND, *arrays, sizes_E)
    return _rows(exact, x_ND, jax.tree.unflatten(form, arrays), sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(exact: bool, x_ND, parameters: Parameters, sizes_E):
    blocks = functools.partial(_forward_by_blocks, exact, False)
    if 2 * len(sizes_E) <= len(x_ND) <= FEW:
        blocks = functools.partial(_forward_by_all, exact)
    whole = lambda *args: _forward(exact, *args)[:1]  # noqa: E731
    return lax.platform_dependent(x_ND, parameters, sizes_E, cpu=blocks, default=whole)[0]


def _rows_forward(exact, x_ND, parameters, sizes_E):
    blocks = functools.partial(_forward_by_blocks, exact, True)
    whole = functools.partial(_forward, exact)
    y_ND, *hidden = lax.platform_dependent(x_ND, parameters, sizes_E, cpu=blocks, default=whole)
    return y_ND, (x_ND, parameters, sizes_E, hidden)


def _rows_backward(exact, kept, g_ND):
    x_ND, parameters, sizes_E, hidden = kept
    blocks, whole = (functools.partial(f, exact) for f in (_backward_by_blocks, _backward))
    arguments = x_ND, parameters, sizes_E, hidden, g_ND
    return *lax.platform_dependent(*arguments, cpu=blocks, default=whole), None


_rows.defvjp(_rows_forward, _rows_backward)


def _forward(exact, x_ND, parameters: Parameters, sizes_E):
    """Returns the result, and what comes before the activation: of `wide`, and of `gate`."""

    def linear(x, kernel, bias):
        out = times(x, kernel, sizes_E)
        return out if bias is None else out + grouped_rows(bias, sizes_E, len(x))

    hidden = [linear(x_ND, parameters.wide, parameters.bias_wide)]
    if parameters.gate is not None:
        hidden.append(linear(x_ND, parameters.gate, parameters.bias_gate))
    return linear(
        activate(*hidden, exact=exact), parameters.narrow, parameters.bias_narrow
    ), *hidden


def _backward(exact, x_ND, parameters: Parameters, sizes_E, hidden, g_ND):
    """Returns the derivatives by the rows and by the parameters."""

    def total(bias, g):  # of a bias: the sum over an expert's rows
        return None if bias is None else outer(jnp.ones_like(g[:, :1]), g, sizes_E)[:, 0]

    g_ND = jnp.where(filled(g_ND, sizes_E), g_ND, 0)
    active, pull = jax.vjp(lambda *hidden: activate(*hidden, exact=exact), *hidden)
    slopes = pull(times(g_ND, parameters.narrow, sizes_E, transposed=True))
    kernels = [parameters.wide, parameters.gate][: len(slopes)]
    dx_ND = sum(times(s, k, sizes_E, transposed=True) for s, k in zip(slopes, kernels, strict=True))
    slope_gate = slopes[1] if len(slopes) > 1 else None
    return dx_ND, Parameters(
        wide=outer(x_ND, slopes[0], sizes_E),
        narrow=outer(active, g_ND, sizes_E),
        bias_wide=total(parameters.bias_wide, slopes[0]),
        bias_narrow=total(parameters.bias_narrow, g_ND),
        gate=None if slope_gate is None else outer(x_ND, slope_gate, sizes_E),
        bias_gate=total(parameters.bias_gate, slope_gate),
    )


def _forward_by_blocks(exact, keep: bool, x_ND, parameters: Parameters, sizes_E):
    """Does as `_forward`, block by block; without `keep` the result alone."""
    kept = 1 + (parameters.gate is not None) if keep else 0
    widths = [parameters.narrow.shape[2], *[parameters.wide.shape[2]] * kept]

    def visit(own: Parameters, block: Block, out):
        hidden = _hidden(own, block.read(x_ND))
        y = _linear(activate(*hidden, exact=exact), own.narrow, own.bias_narrow)
        return [block.write(a, b) for a, b in zip(out, [y, *hidden], strict=False)]

    def group(own: Parameters, first, size, out):
        visit_own = functools.partial(visit, own)
        return None, _over_blocks(first, size, len(x_ND), visit_own, out)

    out = [zeros((len(x_ND), width), x_ND) for width in widths]
    return tuple(_over_experts(parameters, sizes_E, group, None, out)[1])


def _forward_by_all(exact, x_ND, parameters: Parameters, sizes_E):
    """Does as `_forward`, for the result alone: each row passes every expert, its own counts."""

    def network(own: Parameters, x):
        return _linear(activate(*_hidden(own, x), exact=exact), own.narrow, own.bias_narrow)

    x_END = jnp.broadcast_to(x_ND, (len(sizes_E), *x_ND.shape))  # batched: no kernel is transposed
    y_END = jax.vmap(network)(parameters, x_END)
    ends_E1, row_N = jnp.cumsum(sizes_E)[:, None], jnp.arange(len(x_ND))
    own_EN = (ends_E1 - sizes_E[:, None] <= row_N) & (row_N < ends_E1)
    return (jnp.where(own_EN[..., None], y_END, 0).sum(0),)


def _backward_by_blocks(exact, x_ND, parameters: Parameters, sizes_E, hidden, g_ND):
    """Does as `_backward`, block by block; sums over rows are float32 or better."""
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)

    def visit(own: Parameters, block: Block, carry):
        dx_ND, sums = carry
        x, g, *inner = (block.read(a) for a in (x_ND, g_ND, *hidden))
        x, g = (jnp.where(block.own, a, 0) for a in (x, g))
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

    def group(own: Parameters, first, size, dx_ND):
        none = jax.tree.map(lambda a: zeros(a.shape, g_ND, wide), own)
        visit_own = functools.partial(visit, own)
        dx_ND, sums = _over_blocks(first, size, len(x_ND), visit_own, (dx_ND, none))
        return sums, dx_ND

    start = jax.tree.map(lambda a: zeros(a.shape, g_ND, a.dtype), parameters)
    slopes, dx_ND = _over_experts(parameters, sizes_E, group, start, zeros(x_ND.shape, x_ND))
    return dx_ND, slopes


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


def _over_experts(parameters: Parameters, sizes_E, visit, totals, carry):
    """Calls visit(its parameters, its first row, its rows, carry) for each expert that has rows;
    returns `totals` with what it returned in the expert's place, and the last carry."""
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def step(e, both):
        totals, carry = both
        own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, e, keepdims=False), parameters)
        new, carry = visit(own, starts_E[e], sizes_E[e], carry)

        def put(total, value):
            return lax.dynamic_update_index_in_dim(total, value.astype(total.dtype), e, 0)

        return totals if new is None else jax.tree.map(put, totals, new), carry

    return each_group(sizes_E, step, (totals, carry))


def _hidden(own: Parameters, x):
    """Returns what comes before the activation of one expert's rows."""
    hidden = [_linear(x, own.wide, own.bias_wide)]
    return hidden if own.gate is None else [*hidden, _linear(x, own.gate, own.bias_gate)]


def _linear(x, kernel, bias):
    out = x @ kernel
    return out if bias is None else out + bias[None]


def _plus(total, rows, slopes):
    """Adds rows^T slopes, or the sum of the slopes, to a sum over rows; None stays."""
    if total is None:
        return None
    if rows is None:
        return total + slopes.sum(0, dtype=total.dtype)
    return total + jnp.matmul(rows.T, slopes, preferred_element_type=total.dtype)
