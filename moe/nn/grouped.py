"""Multiplies rows that are sorted by group by their group's matrix: the core of dropless experts.

Row n of x belongs to the group g with sizes[:g].sum() <= n < sizes[:g + 1].sum(); rows past the
last group are zero in every result and derivative (kernels, left alone, may leave anything there).
Letters as in `routers.routing`: here N rows, E groups, inner width D, outer width F.

TPU and GPU have a kernel, `jax.lax.ragged_dot`. On CPU that operation multiplies every row by every
matrix; there two loops, over groups and over blocks of their rows, do the work of the rows alone.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe.hosts import mesh

BLOCK = 64  # rows of a product on CPU: fewer starve it, more waste the last block of a group


def grouped_matmul(x_ND, kernel_EDF, sizes_E):
    """Returns out[n] = x[n] @ kernel[group of n], [N, F]."""
    return _matmul(*mesh.alike(x_ND, kernel_EDF, sizes_E))


def grouped_rows(bias_EF, sizes_E, rows: int):
    """Returns out[n] = bias[group of n], [rows, F]."""
    return _spread(rows, *mesh.alike(bias_EF, sizes_E))


@jax.custom_vjp
def _matmul(x_ND, kernel_EDF, sizes_E):
    return times(x_ND, kernel_EDF, sizes_E)


def _matmul_forward(x_ND, kernel_EDF, sizes_E):
    return times(x_ND, kernel_EDF, sizes_E), (x_ND, kernel_EDF, sizes_E)


def _matmul_backward(kept, g_NF):
    x_ND, kernel_EDF, sizes_E = kept
    dx_ND = times(g_NF, kernel_EDF, sizes_E, transposed=True)
    return dx_ND, outer(x_ND, g_NF, sizes_E), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(rows: int, bias_EF, sizes_E):
    row, ends = jnp.arange(rows), jnp.cumsum(sizes_E)
    group = jnp.searchsorted(ends, row, side="right", method="compare_all")
    return jnp.where((row < ends[-1])[:, None], bias_EF[jnp.minimum(group, len(ends) - 1)], 0)


def _spread_forward(rows, bias_EF, sizes_E):
    return _spread(rows, bias_EF, sizes_E), sizes_E


def _spread_backward(rows, sizes_E, g_NF):
    ones_N1 = jnp.ones_like(g_NF[:, :1])
    return outer(ones_N1, g_NF, sizes_E)[:, 0], None


_spread.defvjp(_spread_forward, _spread_backward)


def times(x_ND, kernel_EDF, sizes_E, transposed: bool = False):
    """Returns x @ kernel or x @ kernel^T, each row with its group's matrix."""

    def kernel(x_ND, kernel_EDF, sizes_E):
        if transposed:
            kernel_EDF = kernel_EDF.swapaxes(1, 2)
        out = lax.ragged_dot(x_ND, kernel_EDF, sizes_E, preferred_element_type=x_ND.dtype)
        return jnp.where(filled(x_ND, sizes_E), out, 0)

    blocks = functools.partial(_times_by_blocks, transposed=transposed)
    return lax.platform_dependent(x_ND, kernel_EDF, sizes_E, cpu=blocks, default=kernel)


def outer(x_ND, g_NF, sizes_E):
    """Sums x[n]^T g[n] over the rows of each group, [E, D, F]."""

    def kernel(x_ND, g_NF, sizes_E):
        contract_rows = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(([0], [0]), ([], [])),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        real = filled(x_ND, sizes_E)
        x_ND, g_NF = jnp.where(real, x_ND, 0), jnp.where(real, g_NF, 0)
        return lax.ragged_dot_general(
            x_ND, g_NF, sizes_E, contract_rows, preferred_element_type=g_NF.dtype
        )

    return lax.platform_dependent(x_ND, g_NF, sizes_E, cpu=_outer_by_blocks, default=kernel)


def _times_by_blocks(x_ND, kernel_EDF, sizes_E, transposed: bool):
    """Does as `times`; a group of n rows costs ceil(n / BLOCK) products of BLOCK rows."""
    width = kernel_EDF.shape[1 if transposed else 2]
    product = "nf,df->nd" if transposed else "nd,df->nf"
    size = min(BLOCK, len(x_ND))
    ends_E = jnp.cumsum(sizes_E)

    def group(e, out):
        matrix = lax.dynamic_index_in_dim(kernel_EDF, e, keepdims=False)

        def block(i, out):
            start, own = _block(ends_E, sizes_E, e, i, size, len(x_ND))
            x = lax.dynamic_slice_in_dim(x_ND, start, size)
            old = lax.dynamic_slice_in_dim(out, start, size)
            new = jnp.where(own, jnp.einsum(product, x, matrix), old)
            return lax.dynamic_update_slice_in_dim(out, new, start, 0)

        return lax.fori_loop(0, -(-sizes_E[e] // size), block, out)

    return each_group(sizes_E, group, zeros((len(x_ND), width), x_ND))


def _outer_by_blocks(x_ND, g_NF, sizes_E):
    """Does as `outer`; sums are float32 or better."""
    size = min(BLOCK, len(x_ND))
    ends_E = jnp.cumsum(sizes_E)
    wide = jnp.promote_types(g_NF.dtype, jnp.float32)
    shape = x_ND.shape[1], g_NF.shape[1]

    def group(e, out):
        def block(i, total):
            start, own = _block(ends_E, sizes_E, e, i, size, len(x_ND))
            x = jnp.where(own, lax.dynamic_slice_in_dim(x_ND, start, size), 0)
            g = jnp.where(own, lax.dynamic_slice_in_dim(g_NF, start, size), 0)
            return total + jnp.einsum("nd,nf->df", x, g, preferred_element_type=wide)

        blocks = -(-sizes_E[e] // size)
        total = lax.fori_loop(0, blocks, block, zeros(shape, g_NF, wide))
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), e, 0)

    return each_group(sizes_E, group, zeros((len(sizes_E), *shape), g_NF))


def each_group(sizes_E, visit: Callable, out):
    """Returns what visit(group, out) makes of `out`, over the groups that have rows.

    A visit copies the group's matrix: of a few tokens, a step of decoding, most groups have none.
    """
    order_E = jnp.argsort(sizes_E == 0, stable=True)
    return lax.fori_loop(0, (sizes_E > 0).sum(), lambda i, out: visit(order_E[i], out), out)


def _block(ends_E, sizes_E, e, i, size: int, rows: int):
    """Returns the first row of the group's block i, moved to lie within the array, and a mask
    [size, 1] of the block's rows that belong to it."""
    first = ends_E[e] - sizes_E[e] + i * size
    start = jnp.minimum(first, rows - size)
    row = start + jnp.arange(size)
    return start, ((row >= first) & (row < ends_E[e]))[:, None]


def filled(x_ND, sizes_E):
    """Returns a mask [N, 1], True on the rows that belong to a group."""
    return (jnp.arange(len(x_ND)) < sizes_E.sum())[:, None]


def zeros(shape, like, dtype=None):
    """Returns zeros that vary over the same axes of a mesh as `like`, as a loop's carry must."""
    return mesh.vary_like(jnp.zeros(shape, dtype or like.dtype), like)
